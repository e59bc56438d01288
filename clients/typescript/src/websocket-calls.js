/**
 * Calls: messages from the client to which the server responds. The protocol has no correlation ID
 * for calls: a response contains the ID of its request. At most one call per request is in flight,
 * and at most one call without a request. Calls without a response are sent again on the next
 * connection. No dependencies; runs in browsers.
 */

import { Backoff } from './backoff.js';
import { RequestCancelled } from './errors.js';
import { errorFrom } from './websocket-server-messages.js';

/** Maximum number of calls without a response on one connection. */
const MAX_IN_FLIGHT = 64;
/** Maximum number of retries of a call after transient errors. */
const MAX_RETRIES = 6;
/**
 * Maximum number of retries of a subscription that exceeds the limit of watches: the watches of a
 * broken connection count for 50 s.
 */
const MAX_SUBSCRIBE_RETRIES = 30;
/** Name of the limit whose error means that the server did not process the message. */
const MESSAGE_RATE = 'gateway.rate_limit';

/** @typedef {import('./websocket-server-messages.js').Message} Message */
/** @typedef {'submit' | 'subscribe' | 'unsubscribe' | 'cancel' | 'get' | 'list' | 'auth'} Kind */

/**
 * @typedef {object} Call
 * @property {Kind} kind
 * @property {string} requestId ID of the request that the call is about; empty if none.
 * @property {() => string} frame Returns the message to send.
 * @property {boolean} sent Whether the call waits for a response on the current connection.
 * @property {number} times Number of times that the message was sent.
 * @property {Backoff} backoff
 * @property {(message: Message) => void} resolve
 * @property {(error: unknown) => void} reject
 */

/** Kinds of calls to which each type of message responds; an error responds to any call. */
const ANSWERS = /** @type {Record<string, Kind[]>} */ ({
  acknowledgment: ['submit', 'cancel'],
  response: ['submit'],
  subscribed: ['subscribe'],
  unsubscribed: ['unsubscribe'],
  request: ['get'],
  requests: ['list'],
  authenticated: ['auth'],
});

/** Sends the calls of one client, across reconnects. */
export class Calls {
  /** @type {Map<string, Call[]>} By request; the first call of a queue is in flight or sendable. */
  #queues = new Map();
  /** @type {Set<Call>} */
  #sendable = new Set();
  #inFlight = 0;

  /**
   * @param {(frame: string) => boolean} send Sends a message. Returns whether the message was sent;
   *   throws if it can never be sent.
   */
  constructor(send) {
    this.send = send;
  }

  /**
   * Queues a call.
   * @param {Kind} kind
   * @param {string} requestId
   * @param {() => string} frame
   * @param {(message: Message) => void} resolve Receives the response, before any later message is
   *   handled.
   * @param {(error: unknown) => void} reject Receives the error from the server.
   */
  add(kind, requestId, frame, resolve, reject) {
    const backoff = new Backoff({ initialMs: 200 });
    const call = { kind, requestId, frame, sent: false, times: 0, backoff, resolve, reject };
    const queue = this.#queues.get(requestId);
    if (queue) {
      queue.push(call);
      return;
    }
    this.#queues.set(requestId, [call]);
    this.#sendable.add(call);
    this.flush();
  }

  /**
   * Withdraws a submission that was never sent.
   * @param {string} requestId
   * @returns {boolean} Whether a submission was withdrawn.
   */
  withdraw(requestId) {
    const queue = this.#queues.get(requestId) ?? [];
    const call = queue.find(({ kind, times }) => kind === 'submit' && times === 0);
    if (!call) return false;
    this.#remove(call);
    call.reject(new RequestCancelled('cancelled before it was sent', { requestId }));
    return true;
  }

  /** Sends as many calls as possible. */
  flush() {
    for (const call of this.#sendable) {
      if (this.#inFlight >= MAX_IN_FLIGHT) return;
      try {
        if (!this.send(call.frame())) return;
      } catch (error) {
        this.#remove(call);
        call.reject(error);
        continue;
      }
      this.#sendable.delete(call);
      this.#inFlight += 1;
      call.sent = true;
      call.times += 1;
    }
  }

  /** Handles the loss of the connection: calls without a response are sent again. */
  onDisconnect() {
    this.#inFlight = 0;
    for (const [call] of this.#queues.values()) {
      call.sent = false;
      this.#sendable.add(call);
    }
  }

  /**
   * Passes a response to its call.
   * @param {Message} message
   * @returns {boolean} Whether the message is the response to a call.
   */
  onMessage(message) {
    const { type, seq, request_id: requestId, uid } = message.body;
    if (seq !== undefined) return false;
    const kinds = ANSWERS[type];
    if (!kinds && type !== 'error') return false;
    const ids = requestId === undefined ? [''] : [requestId, uid];
    const heads = ids.map((id) => this.#queues.get(id)?.[0]);
    const call = heads.find((head) => head?.sent && (!kinds || kinds.includes(head.kind)));
    if (!call) return false;
    this.#inFlight -= 1;
    call.sent = false;
    if (type === 'error') this.#onError(call, errorFrom(message.body.error));
    else this.#settle(call, () => call.resolve(message));
    return true;
  }

  /**
   * Rejects every call, because the connection is permanently closed.
   * @param {unknown} error
   */
  failAll(error) {
    const calls = [...this.#queues.values()].flat();
    this.#queues.clear();
    this.#sendable.clear();
    for (const { reject } of calls) reject(error);
  }

  /**
   * @param {Call} call
   * @param {import('./errors.js').StreamerError} error
   */
  #onError(call, error) {
    const unprocessed = error.details?.limit === MESSAGE_RATE;
    // The watches of a broken connection count for a while, as may the watches that replace them.
    const delayed = call.kind === 'subscribe' && error.retryAfterMs !== undefined;
    const limited = error.code === 'RATE_LIMITED' && (call.times > 1 || delayed);
    const transient = error.code === 'UNAVAILABLE' || limited;
    const maxRetries = delayed ? MAX_SUBSCRIBE_RETRIES : MAX_RETRIES;
    if (!unprocessed && !(transient && call.backoff.failures < maxRetries)) {
      this.#settle(call, () => call.reject(error));
      return;
    }
    setTimeout(
      () => {
        if (this.#queues.get(call.requestId)?.[0] !== call || call.sent) return;
        this.#sendable.add(call);
        this.flush();
      },
      (error.retryAfterMs ?? 0) + call.backoff.next(),
    );
  }

  /**
   * @param {Call} call
   * @param {() => void} callback
   */
  #settle(call, callback) {
    this.#remove(call);
    callback();
    this.flush();
  }

  /** @param {Call} call */
  #remove(call) {
    this.#sendable.delete(call);
    const queue = this.#queues.get(call.requestId) ?? [];
    const index = queue.indexOf(call);
    if (index >= 0) queue.splice(index, 1);
    if (queue.length === 0) this.#queues.delete(call.requestId);
    else if (index === 0) this.#sendable.add(queue[0]);
  }
}
