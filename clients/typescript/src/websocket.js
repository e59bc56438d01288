/**
 * The WebSocket client, for browsers and Node: requests, their progress and their results over one
 * connection, with automatic reconnects. An ES module without dependencies: a page requires only
 * `import { StreamerSocket } from './websocket.js'`.
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
import { Follower, abortReason, followerError, onAbort } from './websocket-follower.js';
import { message, randomId, requestFrame } from './websocket-client-messages.js';
import { Connection } from './websocket-connection.js';
import {
  errorFrom,
  eventFrom,
  pageFrom,
  payloadFrom,
  positionFrom,
  requestFrom,
} from './websocket-server-messages.js';

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

/** @typedef {import('./websocket-server-messages.js').RequestInfo} RequestInfo */
/** @typedef {import('./websocket-server-messages.js').Message} Message */
/** @typedef {import('./websocket-client-messages.js').RequestOptions} RequestOptions */
/** @typedef {import('./websocket-client-messages.js').Accepted} Accepted */
/** @typedef {import('./websocket-follower.js').FollowOptions} FollowOptions */
/** @typedef {import('./events.js').Observer} Observer */

/**
 * @typedef {object} SocketOptions
 * @property {string} url `ws://host:port/ws`, or `wss://…` for TLS.
 * @property {string | (() => string | Promise<string>)} token A JWT, or a function that returns
 *   one; it is called for each connection and before the token expires.
 * @property {any} [WebSocket] WebSocket class to use if the platform has none, such as that of
 *   package `ws` in Node.
 * @property {(change: import('./websocket-connection.js').StateChange) => void} [onStateChange]
 * @property {(message: {topic: string, data: any, payload: Payload}) => void} [onMessage]
 *   Receives messages that a service sends through the Connections API.
 */

/** A client of one server, over one WebSocket. */
export class StreamerSocket {
  #options;
  #connection;
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
    if (!WebSocket) throw new TypeError('WebSocket is not defined: pass the class of package `ws`');
    this.#options = options;
    /** Identity of the connection, as reported by the server; `null` before it is connected. */
    this.identity = /** @type {{connectionId: string, userId: string, tenantId: string} | null} */ (
      null
    );
    this.#calls = new Calls((frame) => this.#send(frame));
    this.#connection = new Connection(
      { url: options.url, token: options.token, WebSocket },
      {
        onOpen: (greeting) => this.#onOpen(greeting),
        onMessage: (message) => this.#onMessage(message),
        onDisconnect: () => this.#calls.onDisconnect(),
        onClose: (error) => this.#onClose(error),
        onStateChange: (change) => options.onStateChange?.(change),
      },
    );
    this.#connection.open();
  }

  /**
   * Submits a request and follows it until it ends, across reconnects. The submission is sent again
   * with the same `id` until it is acknowledged; a sync action may then run more than once.
   * @param {string} action
   * @param {unknown} [payload] A JSON value, or a `RawJson`; default `{}`.
   * @param {RequestOptions & FollowOptions & Observer} [options]
   * @returns {Promise<any>} The result.
   * @throws {RequestFailed} If the request was rejected or failed.
   * @throws {RequestCancelled} If the request was cancelled.
   * @throws {IntegrityError} If events or output are missing.
   * @throws {ConnectionClosed} If the connection is permanently closed; the request continues.
   */
  request(action, payload = {}, options = {}) {
    if (this.#closed) return Promise.reject(this.#closed);
    const id = options.id ?? randomId();
    const frame = requestFrame(id, action, payload, options);
    const follower = this.#follow(id, 0, options);
    this.#calls.add(
      'submit',
      id,
      () => frame,
      (answer) => this.#onSubmitted(follower, answer, options),
      (error) => this.#settle(follower, () => follower.fail(followerError(error, id))),
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
   * Follows an existing request until it ends.
   * @param {string} requestId `request_id` or `uid`.
   * @param {{afterSeq?: number | null, signal?: AbortSignal} & FollowOptions & Observer} [options]
   *   `afterSeq` is the `seq` after which events are delivered: 0 (default) delivers all events,
   *   and the output is verified at the end; `null` delivers only new events. Aborting `signal`
   *   ends the watch, not the request.
   * @returns {Promise<any>} The result; throws the same errors as {@link request}.
   */
  watch(requestId, options = {}) {
    if (this.#closed) return Promise.reject(this.#closed);
    const { afterSeq = 0, signal } = options;
    const follower = this.#follow(requestId, afterSeq, options);
    this.#subscribe(follower);
    onAbort(signal, follower, () => {
      this.#settle(follower, () => follower.fail(signal?.reason));
      if ([...this.#followers].some((other) => other.hasSameRequest(follower))) return;
      const frame = message('unsubscribe', { request_id: requestId });
      this.#call('unsubscribe', requestId, frame).catch(() => {});
    });
    return follower.promise;
  }

  /**
   * Requests cancellation. A queued request is cancelled immediately, a running request when its
   * handler stops. Safe to retry.
   * @param {string} requestId `request_id` or `uid`.
   * @param {string} [reason] At most 1,024 bytes.
   * @returns {Promise<string>} `cancelling`, or the terminal state of the request.
   */
  async cancel(requestId, reason = '') {
    const frame = message('cancel', { request_id: requestId, reason });
    const { body } = await this.#call('cancel', requestId, frame);
    return body.status;
  }

  /**
   * Returns a request, with its payload and result.
   * @param {string} requestId `request_id` or `uid`.
   * @returns {Promise<RequestInfo>}
   */
  async get(requestId) {
    const frame = message('get', { request_id: requestId });
    return requestFrom(await this.#call('get', requestId, frame));
  }

  /**
   * Returns a page of the caller's requests, newest first.
   * @param {object} [options]
   * @param {RequestInfo['state'][]} [options.states] States of the requests to return; default
   *   all.
   * @param {number} [options.limit] Number of requests per page, 1 to 500; default 50.
   * @param {string} [options.pageToken] `nextPageToken` of the previous page.
   * @returns {Promise<{requests: RequestInfo[], nextPageToken: string}>} The token is empty on the
   *   last page.
   */
  async list({ states, limit, pageToken } = {}) {
    const frame = message('list', { states, limit, page_token: pageToken });
    return pageFrom(await this.#call('list', '', frame));
  }

  /** Closes the connection. Pending promises reject with `ConnectionClosed`; requests continue. */
  close() {
    this.#connection.close();
  }

  /**
   * @param {import('./websocket-calls.js').Kind} kind
   * @param {string} requestId
   * @param {string} frame
   * @returns {Promise<Message>}
   */
  async #call(kind, requestId, frame) {
    if (this.#closed) throw this.#closed;
    return new Promise((resolve, reject) => {
      this.#calls.add(kind, requestId, () => frame, resolve, reject);
    });
  }

  /**
   * @param {string} requestId
   * @param {number | null} afterSeq
   * @param {FollowOptions & Observer} options
   */
  #follow(requestId, afterSeq, options) {
    const follower = new Follower(requestId, afterSeq, options);
    this.#followers.add(follower);
    return follower;
  }

  /**
   * Settles a follower unless it is settled, and removes it.
   * @param {Follower} follower
   * @param {() => void} settle
   */
  #settle(follower, settle) {
    if (!follower.settled) settle();
    this.#followers.delete(follower);
  }

  /**
   * Subscribes to the events after those that the follower has received.
   * @param {Follower} follower
   * @param {boolean} [terminalOnly] Whether only the terminal event is missing.
   */
  #subscribe(follower, terminalOnly = false) {
    if (follower.subscribing || follower.settled) return;
    follower.subscribing = true;
    const requestId = follower.uid || follower.requestId;
    /** @type {number | undefined} */
    let afterSeq;
    const frame = () => {
      // A connection has one position in each log: that of the follower that is furthest behind.
      const same = [...this.#followers].filter((other) => other.hasSameRequest(follower));
      const mode = same.every((other) => other.latest) ? 'latest' : 'all';
      const positions = same.flatMap(({ reader }) => reader.lastSeq ?? []);
      afterSeq = positions.length > 0 && !terminalOnly ? Math.min(...positions) : undefined;
      return message('subscribe', { request_id: requestId, after_seq: afterSeq, mode });
    };
    const onSubscribed = (/** @type {Message} */ { body }) => {
      const needsTerminal = follower.onSubscribed(/** @type {any} */ (body), afterSeq);
      if (needsTerminal) this.#subscribe(follower, true);
    };
    const fail = (/** @type {unknown} */ error) =>
      this.#settle(follower, () => follower.fail(error));
    this.#calls.add('subscribe', requestId, frame, onSubscribed, fail);
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
    // The acknowledgment replaces the first event.
    follower.reader.skipTo(1);
    const { request_id: requestId, uid, duplicate = false } = body;
    try {
      const queuePosition = positionFrom(body.queue_position);
      options.onAccepted?.({ requestId, uid, duplicate, queuePosition });
    } catch (error) {
      this.#settle(follower, () => follower.fail(error));
      return;
    }
    // The server sends an event once per connection: other followers may have received it.
    if (duplicate) this.#subscribe(follower);
  }

  /** @param {any} greeting */
  #onOpen(greeting) {
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
    else if (this.#calls.onMessage(received)) return;
    else if (body.type === 'auth_expiring') this.#renewToken();
    else if (body.type === 'error' && body.request_id) this.#onSubscriptionError(received);
    else if (body.type === 'message') {
      const payload = payloadFrom(received, 'data');
      this.#options.onMessage?.({ topic: body.topic, data: payload.value, payload });
    }
  }

  /** @param {Message} received An event of a log. */
  #onEvent(received) {
    const followers = [...this.#followers].filter(
      (follower) => follower.subscribed && follower.matches(received.body),
    );
    if (followers.length === 0) return;
    const event = eventFrom(received);
    for (const follower of followers) {
      if (follower.onEvent(event)) this.#subscribe(follower);
      if (follower.settled) this.#followers.delete(follower);
    }
  }

  /** @param {Message} received An error that ends a subscription. */
  #onSubscriptionError({ body }) {
    for (const follower of this.#followers) {
      if (!follower.matches(body) || !follower.subscribed) continue;
      const error = followerError(errorFrom(body.error), follower.requestId);
      this.#settle(follower, () => follower.fail(error));
    }
  }

  /** @param {ConnectionClosed} error */
  #onClose(error) {
    this.#closed = error;
    this.#calls.failAll(error);
    for (const follower of this.#followers) this.#settle(follower, () => follower.fail(error));
  }

  /** Sends a fresh token on the current connection. */
  async #renewToken() {
    if (typeof this.#options.token !== 'function') return;
    try {
      const token = await this.#options.token();
      await this.#call('auth', '', message('auth', { token }));
    } catch {
      // The server closes the connection, and the reconnect requests a fresh token.
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
    return this.#connection.send(frame);
  }
}
