/**
 * One request that somebody follows over the WebSocket, from its submission or subscription to
 * its end. No dependencies; runs in browsers.
 */

import {
  ConnectionClosed,
  IntegrityError,
  LimitError,
  RequestFailed,
  StreamerError,
} from './errors.js';
import { isTerminal, requestFailed, resultOf, tell } from './events.js';
import { LogReader } from './log-reader.js';

/**
 * @typedef {object} FollowOptions
 * @property {'all' | 'latest'} [mode] `latest`: at most 10 progress events a second, always the
 *   newest. Default `all`.
 * @property {boolean} [raw] Gives the result as the JSON text it is, in which no number loses
 *   digits; default `false`: parsed.
 */

/** What it knows, and whom it tells. */
export class Follower {
  /** Whether the server has it among this client's subscriptions, or had before a cut. */
  subscribed = false;
  /** A subscription is asked for and not answered. */
  subscribing = false;
  /** The server's id; empty until it is known. */
  uid = '';
  settled = false;
  /** @type {number | null} `seq` after which missing events were asked for. */
  #askedAfter = null;
  /** @type {(result: any) => void} */
  #resolve = () => {};
  /** @type {(error: unknown) => void} */
  #reject = () => {};

  /**
   * @param {string} name The request, as its caller names it.
   * @param {number | null} afterSeq
   * @param {FollowOptions & import('./events.js').Observer} options
   */
  constructor(name, afterSeq, options) {
    this.name = name;
    this.options = options;
    this.latest = options.mode === 'latest';
    this.reader = new LogReader({ afterSeq, gaps: this.latest });
    /** The result. */
    this.promise = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  /**
   * @param {{request_id?: string, uid?: string}} about
   * @returns {boolean} Whether that is this request.
   */
  is({ request_id: requestId, uid }) {
    return requestId === this.name || uid === this.name || (uid !== undefined && uid === this.uid);
  }

  /**
   * @param {Follower} other
   * @returns {boolean} Whether both follow the same request, as far as is known.
   */
  follows(other) {
    return this.is({ request_id: other.name, uid: other.uid || other.name });
  }

  /**
   * The server says where the subscription begins.
   * @param {{uid: string, last_seq: number, state: string}} snapshot
   * @param {number} [afterSeq] What was asked for.
   * @returns {boolean} Whether the terminal event still has to be asked for: the request has ended,
   *   and its log up to there was said to be known.
   */
  begin({ uid, last_seq: lastSeq, state }, afterSeq) {
    this.subscribing = false;
    this.subscribed = true;
    this.uid = uid;
    const running = state === 'QUEUED' || state === 'RUNNING';
    if (running && this.reader.lastSeq === null) this.reader.skipTo(lastSeq);
    return !running && afterSeq !== undefined && afterSeq >= lastSeq;
  }

  /**
   * Takes in the next event.
   * @param {import('./events.js').Event} event
   * @returns {boolean} Whether events before it are missing and have to be asked for.
   */
  take(event) {
    try {
      if (this.reader.misses(event)) return this.#miss(event);
      // A terminal event that its caller claims to know is the outcome all the same.
      if (this.reader.accept(event)) tell(this.options, event);
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
  #miss(event) {
    const { lastSeq } = this.reader;
    if (this.subscribing) return false;
    if (this.#askedAfter === lastSeq) {
      throw new IntegrityError(`event ${event.seq} came after event ${lastSeq}, twice`);
    }
    this.#askedAfter = lastSeq;
    return true;
  }
}

/**
 * @param {unknown} error Why a call failed.
 * @param {string} requestId
 * @returns {unknown} What whoever follows the request is told.
 */
export function refusal(error, requestId) {
  const ours =
    error instanceof RequestFailed ||
    error instanceof LimitError ||
    error instanceof ConnectionClosed;
  return error instanceof StreamerError && !ours
    ? requestFailed(error, { requestId, uid: '' })
    : error;
}

/**
 * Does something when the signal aborts while the request is followed.
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
  const forget = () => signal.removeEventListener('abort', action);
  follower.promise.then(forget, forget);
}

/**
 * @param {AbortSignal | undefined} signal
 * @returns {string}
 */
export function abortReason(signal) {
  return signal?.reason instanceof Error ? signal.reason.message : 'aborted';
}
