/**
 * The WebSocket client, for browsers and Node: requests, their progress and their results over
 * one connection that is opened again whenever it is lost. A plain ES module without
 * dependencies: `import { StreamerSocket } from './websocket.js'` is all a page needs.
 */

import { OutputBuffer } from './events.js';
import {
  ConnectionClosed,
  IntegrityError,
  LimitError,
  RequestCancelled,
  RequestFailed,
  StreamerError,
} from './errors.js';
import { Payload, RawJson, utf8 } from './payload.js';
import { Calls } from './websocket-calls.js';
import { Follower, abortReason, onAbort, refusal } from './websocket-follower.js';
import { message, randomId, requestFrame } from './websocket-frames.js';
import { Link } from './websocket-link.js';
import {
  errorFrom,
  eventFrom,
  pageFrom,
  payloadFrom,
  positionFrom,
  requestFrom,
} from './websocket-messages.js';

export {
  ConnectionClosed,
  IntegrityError,
  LimitError,
  OutputBuffer,
  Payload,
  RawJson,
  RequestCancelled,
  RequestFailed,
  StreamerError,
};

/** @typedef {import('./websocket-messages.js').RequestInfo} RequestInfo */
/** @typedef {import('./websocket-messages.js').Message} Message */
/** @typedef {import('./websocket-frames.js').RequestOptions} RequestOptions */
/** @typedef {import('./websocket-frames.js').Accepted} Accepted */
/** @typedef {import('./websocket-follower.js').FollowOptions} FollowOptions */
/** @typedef {import('./events.js').Observer} Observer */

/**
 * @typedef {object} SocketOptions
 * @property {string} url `ws://host:port/ws`, or `wss://…` for TLS.
 * @property {string | (() => string | Promise<string>)} token A JWT, or what returns one: asked for
 *   each connection and before the token expires.
 * @property {any} [WebSocket] The class to use, where there is none built in: that of `ws` in Node.
 * @property {(change: import('./websocket-link.js').StateChange) => void} [onStateChange]
 * @property {(message: {topic: string, data: any, payload: Payload}) => void} [onMessage] A service
 *   pushed something through the Connections API.
 */

/** One client of one server. */
export class StreamerSocket {
  #options;
  #link;
  #calls;
  /** @type {Set<Follower>} */
  #followers = new Set();
  #maxMessageBytes = Infinity;
  /** @type {ConnectionClosed | null} */
  #closed = null;

  /**
   * Connects.
   * @param {SocketOptions} options
   */
  constructor(options) {
    const WebSocket = options.WebSocket ?? globalThis.WebSocket;
    if (!WebSocket) throw new TypeError('there is no WebSocket here: pass one (that of `ws`)');
    this.#options = options;
    /** Who the server says that this is; `null` before it has said so. */
    this.identity = /** @type {{connectionId: string, userId: string, tenantId: string} | null} */ (
      null
    );
    this.#calls = new Calls((frame) => this.#send(frame));
    this.#link = new Link(
      { url: options.url, token: options.token, WebSocket },
      {
        opened: (greeting) => this.#onOpened(greeting),
        heard: (message) => this.#onMessage(message),
        lost: () => this.#calls.lost(),
        closed: (error) => this.#onClosed(error),
        changed: (change) => options.onStateChange?.(change),
      },
    );
    this.#link.open();
  }

  /**
   * Asks for an action and follows it to its end, over as many connections as it takes. Until it
   * is acknowledged it is sent again under the same `id`; a sync action may then run twice.
   * @param {string} action
   * @param {unknown} [payload] A JSON value, or a `RawJson`; default `{}`.
   * @param {RequestOptions & FollowOptions & Observer} [options]
   * @returns {Promise<any>} The result.
   * @throws {RequestFailed} When it was refused or ended in failure.
   * @throws {RequestCancelled} When it was cancelled.
   * @throws {IntegrityError} When its log does not prove itself.
   * @throws {ConnectionClosed} When the connection is closed for good; the request goes on.
   */
  request(action, payload = {}, options = {}) {
    if (this.#closed) return Promise.reject(this.#closed);
    const id = options.id ?? randomId();
    const frame = requestFrame(id, action, payload, options);
    const follower = this.#follow(id, 0, options);
    this.#calls.make(
      'submit',
      id,
      () => frame,
      (answer) => this.#onSubmitted(follower, answer, options),
      (error) => this.#settle(follower, () => follower.fail(refusal(error, id))),
    );
    onAbort(options.signal, follower, () => {
      if (this.#calls.withdraw(id)) return;
      this.cancel(id, abortReason(options.signal)).catch((error) =>
        this.#settle(follower, () => follower.fail(error)),
      );
    });
    return follower.promise;
  }

  /**
   * Follows a request that was submitted before, to its end.
   * @param {string} requestId Its `request_id` or `uid`.
   * @param {{afterSeq?: number | null, signal?: AbortSignal} & FollowOptions & Observer} [options]
   *   Events after `afterSeq`; default 0: all, and the output is proved at the end. `null`: only
   *   what is new. Aborting `signal` ends the following, not the request.
   * @returns {Promise<any>} The result; errors as of {@link request}.
   */
  watch(requestId, options = {}) {
    if (this.#closed) return Promise.reject(this.#closed);
    const { afterSeq = 0, signal } = options;
    const follower = this.#follow(requestId, afterSeq, options);
    this.#subscribe(follower);
    onAbort(signal, follower, () => {
      this.#settle(follower, () => follower.fail(signal?.reason));
      if ([...this.#followers].some((other) => other.follows(follower))) return;
      const frame = message('unsubscribe', { request_id: requestId });
      this.#call('unsubscribe', requestId, frame).catch(() => {});
    });
    return follower.promise;
  }

  /**
   * Asks that a request end: a queued one is cancelled at once, a running one when its handler
   * notices. Safe to repeat.
   * @param {string} requestId Its `request_id` or `uid`.
   * @param {string} [reason] At most 1,024 bytes.
   * @returns {Promise<string>} `cancelling`, or the state in which it has ended.
   */
  async cancel(requestId, reason = '') {
    const frame = message('cancel', { request_id: requestId, reason });
    const { body } = await this.#call('cancel', requestId, frame);
    return body.status;
  }

  /**
   * One request, with its payload and result.
   * @param {string} requestId Its `request_id` or `uid`.
   * @returns {Promise<RequestInfo>}
   */
  async get(requestId) {
    const frame = message('get', { request_id: requestId });
    return requestFrom(await this.#call('get', requestId, frame));
  }

  /**
   * A page of the caller's requests, newest first.
   * @param {object} [options]
   * @param {RequestInfo['state'][]} [options.states] Only these; default all.
   * @param {number} [options.limit] 1 to 500; default 50.
   * @param {string} [options.pageToken] `nextPageToken` of the page before.
   * @returns {Promise<{requests: RequestInfo[], nextPageToken: string}>} The token is empty after
   *   the last page.
   */
  async list({ states, limit, pageToken } = {}) {
    const frame = message('list', { states, limit, page_token: pageToken });
    return pageFrom(await this.#call('list', '', frame));
  }

  /** Closes the connection. Requests go on; promises reject with `ConnectionClosed`. */
  close() {
    this.#link.close();
  }

  /**
   * @param {import('./websocket-calls.js').Kind} kind
   * @param {string} name
   * @param {string} frame
   * @returns {Promise<Message>}
   */
  async #call(kind, name, frame) {
    if (this.#closed) throw this.#closed;
    return new Promise((resolve, reject) => {
      this.#calls.make(kind, name, () => frame, resolve, reject);
    });
  }

  /**
   * @param {string} name
   * @param {number | null} afterSeq
   * @param {FollowOptions & Observer} options
   */
  #follow(name, afterSeq, options) {
    const follower = new Follower(name, afterSeq, options);
    this.#followers.add(follower);
    return follower;
  }

  /**
   * Settles a follower, once.
   * @param {Follower} follower
   * @param {() => void} how
   */
  #settle(follower, how) {
    if (!follower.settled) how();
    this.#followers.delete(follower);
  }

  /**
   * @param {Follower} follower Wants the events after those it has.
   * @param {boolean} [outcome] The terminal event is all that is left.
   */
  #subscribe(follower, outcome = false) {
    if (follower.subscribing || follower.settled) return;
    follower.subscribing = true;
    const name = follower.uid || follower.name;
    /** @type {number | undefined} */
    let afterSeq;
    const frame = () => {
      // The connection has one place in each log: that of whoever is furthest behind.
      const same = [...this.#followers].filter((other) => other.follows(follower));
      const mode = same.every((other) => other.latest) ? 'latest' : 'all';
      const places = same.flatMap(({ reader }) => reader.lastSeq ?? []);
      afterSeq = places.length > 0 && !outcome ? Math.min(...places) : undefined;
      return message('subscribe', { request_id: name, after_seq: afterSeq, mode });
    };
    const begin = (/** @type {Message} */ { body }) => {
      if (follower.begin(/** @type {any} */ (body), afterSeq)) this.#subscribe(follower, true);
    };
    const fail = (/** @type {unknown} */ error) =>
      this.#settle(follower, () => follower.fail(error));
    this.#calls.make('subscribe', name, frame, begin, fail);
  }

  /**
   * @param {Follower} follower
   * @param {Message} answer
   * @param {RequestOptions} options
   */
  #onSubmitted(follower, answer, options) {
    const { body } = answer;
    follower.uid = body.uid;
    if (body.type === 'response') {
      this.#settle(follower, () => follower.succeed(payloadFrom(answer, 'data')));
      return;
    }
    follower.subscribed = true;
    // The acknowledgment stands for the first event.
    follower.reader.skipTo(1);
    const { request_id: requestId, uid, duplicate = false } = body;
    try {
      const queuePosition = positionFrom(body.queue_position);
      options.onAccepted?.({ requestId, uid, duplicate, queuePosition });
    } catch (error) {
      this.#settle(follower, () => follower.fail(error));
      return;
    }
    // Its events are sent to a connection once, and others here may have had them already.
    if (duplicate) this.#subscribe(follower);
  }

  /** @param {any} greeting */
  #onOpened(greeting) {
    const { connection_id: connectionId, user_id: userId, tenant_id: tenantId } = greeting;
    this.identity = { connectionId, userId, tenantId };
    this.#maxMessageBytes = greeting.max_message_bytes || Infinity;
    for (const follower of this.#followers) if (follower.subscribed) this.#subscribe(follower);
    this.#calls.flush();
  }

  /** @param {Message} received */
  #onMessage(received) {
    const { body } = received;
    if (body.seq !== undefined) this.#onEvent(received);
    else if (this.#calls.answer(received)) return;
    else if (body.type === 'auth_expiring') this.#renewToken();
    else if (body.type === 'error' && body.request_id) this.#onLost(received);
    else if (body.type === 'message') {
      const payload = payloadFrom(received, 'data');
      this.#options.onMessage?.({ topic: body.topic, data: payload.value, payload });
    }
  }

  /** @param {Message} received An event of a log. */
  #onEvent(received) {
    const followers = [...this.#followers].filter(
      (follower) => follower.subscribed && follower.is(received.body),
    );
    if (followers.length === 0) return;
    const event = eventFrom(received);
    for (const follower of followers) {
      if (follower.take(event)) this.#subscribe(follower);
      if (follower.settled) this.#followers.delete(follower);
    }
  }

  /** @param {Message} received The server gave up a subscription. */
  #onLost({ body }) {
    for (const follower of this.#followers) {
      if (!follower.is(body) || !follower.subscribed) continue;
      this.#settle(follower, () => follower.fail(refusal(errorFrom(body.error), follower.name)));
    }
  }

  /** @param {ConnectionClosed} error */
  #onClosed(error) {
    this.#closed = error;
    this.#calls.fail(error);
    for (const follower of this.#followers) this.#settle(follower, () => follower.fail(error));
  }

  /** Without a fresh token the server closes the connection, and the next one gets one. */
  async #renewToken() {
    if (typeof this.#options.token !== 'function') return;
    try {
      const token = await this.#options.token();
      await this.#call('auth', '', message('auth', { token }));
    } catch {
      // As said above.
    }
  }

  /**
   * @param {string} frame
   * @returns {boolean}
   */
  #send(frame) {
    if (frame.length * 3 > this.#maxMessageBytes) {
      const size = utf8(frame).length;
      if (size > this.#maxMessageBytes) {
        throw new LimitError('message', size, this.#maxMessageBytes);
      }
    }
    return this.#link.send(frame);
  }
}
