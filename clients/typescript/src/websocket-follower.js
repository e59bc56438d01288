/**
 * Follows one request over the WebSocket, from its submission or subscription to its end. No
 * dependencies; runs in browsers.
 */

import {
  ConnectionClosed,
  IntegrityError,
  LimitError,
  RequestFailed,
  StreamerError,
} from './errors.js';
import { isTerminal, notify, requestFailed, resultOf } from './events.js';
import { LogReader } from './log-reader.js';

/**
 * @typedef {object} FollowOptions
 * @property {'all' | 'latest'} [mode] Progress events to receive: `all` (default), or `latest` for
 *   at most 10 per second, always the newest.
 * @property {boolean} [raw] Whether to return the result as JSON text, in which numbers keep their
 *   full precision, instead of the parsed value; default `false`.
 */

/** Follows one request, and settles a promise with its result. */
export class Follower {
  /** Whether the request is subscribed, or was subscribed before a reconnect. */
  subscribed = false;
  /** Whether a subscription was requested and not confirmed yet. */
  subscribing = false;
  /** The server's ID of the request; empty while unknown. */
  uid = '';
  settled = false;
  /** @type {number | null} `seq` after which missing events were last requested. */
  #gapRequestedAfter = null;
  /** @type {(result: any) => void} */
  #resolve = () => {};
  /** @type {(error: unknown) => void} */
  #reject = () => {};

  /**
   * @param {string} requestId `requestId` or `uid`, as given by the caller.
   * @param {number | null} afterSeq
   * @param {FollowOptions & import('./events.js').Observer} options
   */
  constructor(requestId, afterSeq, options) {
    this.requestId = requestId;
    this.options = options;
    this.latest = options.mode === 'latest';
    this.reader = new LogReader({ afterSeq, allowGaps: this.latest });
    /** Promise of the result. */
    this.promise = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  /**
   * @param {{request_id?: string, uid?: string}} ids
   * @returns {boolean} Whether the IDs identify the followed request.
   */
  matches({ request_id: requestId, uid }) {
    if (requestId === this.requestId || uid === this.requestId) return true;
    return uid !== undefined && uid === this.uid;
  }

  /**
   * @param {Follower} other
   * @returns {boolean} Whether both are known to follow the same request.
   */
  hasSameRequest(other) {
    return this.matches({ request_id: other.requestId, uid: other.uid || other.requestId });
  }

  /**
   * Handles the start of the subscription.
   * @param {{uid: string, last_seq: number, state: string}} snapshot
   * @param {number} [afterSeq] `seq` after which events were requested.
   * @returns {boolean} Whether the terminal event must be requested separately: the request has
   *   ended, and the requested position is at or after its last event.
   */
  onSubscribed({ uid, last_seq: lastSeq, state }, afterSeq) {
    this.subscribing = false;
    this.subscribed = true;
    this.uid = uid;
    const running = state === 'QUEUED' || state === 'RUNNING';
    if (running && this.reader.lastSeq === null) this.reader.skipTo(lastSeq);
    return !running && afterSeq !== undefined && afterSeq >= lastSeq;
  }

  /**
   * Handles the next event.
   * @param {import('./events.js').Event} event
   * @returns {boolean} Whether events before it are missing and must be requested.
   */
  onEvent(event) {
    try {
      if (this.reader.hasGapBefore(event)) return this.#onGap(event);
      // A terminal event settles the promise even if `afterSeq` excludes it.
      if (this.reader.accept(event)) notify(this.options, event);
      if (isTerminal(event)) this.succeed(resultOf(event));
    } catch (error) {
      this.fail(error);
    }
    return false;
  }

  /** @param {import('./payload.js').Payload} result */
  succeed(result) {
    this.settled = true;
    try {
      this.#resolve(this.options.raw ? result.text : result.value);
    } catch (error) {
      this.#reject(error);
    }
  }

  /** @param {unknown} error */
  fail(error) {
    this.settled = true;
    this.#reject(error);
  }

  /** @param {import('./events.js').Event} event */
  #onGap(event) {
    const { lastSeq } = this.reader;
    if (this.subscribing) return false;
    if (this.#gapRequestedAfter === lastSeq) {
      throw new IntegrityError(`received event ${event.seq} after event ${lastSeq}, twice`);
    }
    this.#gapRequestedAfter = lastSeq;
    return true;
  }
}

/**
 * @param {unknown} error The error of a call.
 * @param {string} requestId
 * @returns {unknown} The error for the caller: `RequestFailed` for an error from the server.
 */
export function followerError(error, requestId) {
  const local =
    error instanceof RequestFailed ||
    error instanceof LimitError ||
    error instanceof ConnectionClosed;
  return error instanceof StreamerError && !local
    ? requestFailed(error, { requestId, uid: '' })
    : error;
}

/**
 * Calls `action` if the signal aborts while the request is followed.
 * @param {AbortSignal | undefined} signal
 * @param {Follower} follower
 * @param {() => void} action
 */
export function onAbort(signal, follower, action) {
  if (!signal || follower.settled) return;
  if (signal.aborted) {
    action();
    return;
  }
  signal.addEventListener('abort', action, { once: true });
  const removeListener = () => signal.removeEventListener('abort', action);
  follower.promise.then(removeListener, removeListener);
}

/**
 * @param {AbortSignal | undefined} signal
 * @returns {string}
 */
export function abortReason(signal) {
  return signal?.reason instanceof Error ? signal.reason.message : 'aborted';
}
