/**
 * A WebSocket connection that detects failures and reconnects with full jitter. No dependencies;
 * runs in browsers.
 */

import { Backoff } from './backoff.js';
import { ConnectionClosed } from './errors.js';

/** Time within which the server must send `connected`, in milliseconds. */
const CONNECT_TIMEOUT_MS = 20_000;
/** Time for which a connection must stay open to reset the backoff, in milliseconds. */
const STABLE_MS = 5000;
/** Additional delay before a reconnect after close code `RATE_LIMITED`, in milliseconds. */
const RATE_LIMITED_DELAY_MS = 1000;

/** Matches the characters that a subprotocol, and therefore a token, may contain. */
const TOKEN = /^[\w!#$%&'*+.^`|~-]+$/;

const BAD_PROTOCOL = 4400;
const UNAUTHENTICATED = 4401;
const FORBIDDEN = 4403;
const RATE_LIMITED = 4429;

/**
 * A change of the connection's state.
 * @typedef {object} StateChange
 * @property {'connecting' | 'open' | 'waiting' | 'closed'} state `waiting` lasts until the
 *   next reconnect; `closed` is permanent.
 * @property {Error} [error] Reason for `waiting` or `closed`.
 * @property {number} [retryInMs] Delay before the next reconnect, in milliseconds; set only in
 *   state `waiting`.
 */

/**
 * Callbacks of a connection.
 * @typedef {object} Listener
 * @property {(greeting: any) => void} onOpen Called when the server has sent `connected`.
 * @property {(message: import('./websocket-server-messages.js').Message) => void} onMessage
 * @property {() => void} onDisconnect Called when the connection is lost; a reconnect may follow.
 * @property {(error: ConnectionClosed) => void} onClose Called when the connection is permanently
 *   closed.
 * @property {(change: StateChange) => void} onStateChange
 */

/** Maintains one WebSocket at a time, across reconnects. */
export class Connection {
  /** @type {any} The current WebSocket; `null` while disconnected. */
  #socket = null;
  #open = false;
  #openedAt = 0;
  #closed = false;
  /** Whether the server rejected the last token. */
  #tokenRejected = false;
  /** Reconnect delay set by a draining server; `null` if there is none. */
  #reconnectAfterMs = /** @type {number | null} */ (null);
  #backoff = new Backoff();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {ReturnType<typeof setInterval> | undefined} */
  #livenessTimer;
  /** Number of consecutive liveness checks without a message in between. */
  #silentIntervals = 0;

  /**
   * @param {object} options
   * @param {string} options.url
   * @param {string | (() => string | Promise<string>)} options.token
   * @param {any} options.WebSocket
   * @param {Listener} listener
   */
  constructor(options, listener) {
    this.options = options;
    this.listener = listener;
  }

  /** Connects. */
  async open() {
    this.listener.onStateChange({ state: 'connecting' });
    const { url, token, WebSocket } = this.options;
    let value;
    try {
      value = typeof token === 'function' ? await token() : token;
    } catch (error) {
      this.#retry(error instanceof Error ? error : new Error(String(error)));
      return;
    }
    if (this.#closed) return;
    const bearer = typeof value === 'string' ? value.trim() : '';
    if (!TOKEN.test(bearer)) {
      // The browser's error message would contain the token.
      const rule = 'token must be a JWT, or a function that returns one';
      this.#closePermanently(new ConnectionClosed(rule, UNAUTHENTICATED));
      return;
    }
    try {
      this.#attach(new WebSocket(url, ['streamer.v1.json', `bearer.${bearer}`]));
    } catch (error) {
      // The URL is invalid.
      this.#closePermanently(new ConnectionClosed(String(error)));
    }
  }

  /**
   * Sends a message.
   * @param {string} text
   * @returns {boolean} Whether it was sent; `false` while disconnected.
   */
  send(text) {
    if (!this.#open) return false;
    this.#socket.send(text);
    return true;
  }

  /** Closes the connection permanently. */
  close() {
    this.#closePermanently(new ConnectionClosed('closed by the client'));
  }

  /** @param {any} socket */
  #attach(socket) {
    this.#socket = socket;
    this.#reconnectAfterMs = null;
    this.#timer = setTimeout(
      () => this.#onSocketClosed(socket, 0, 'timeout while connecting'),
      CONNECT_TIMEOUT_MS,
    );
    socket.addEventListener('message', (/** @type {any} */ event) => {
      if (socket === this.#socket) this.#onFrame(event.data);
    });
    socket.addEventListener('close', (/** @type {any} */ event) => {
      this.#onSocketClosed(socket, event.code, String(event.reason ?? ''));
    });
    // The close event that follows contains the reason.
    socket.addEventListener('error', () => {});
  }

  /** @param {unknown} data */
  #onFrame(data) {
    this.#silentIntervals = 0;
    if (typeof data !== 'string') return;
    let body;
    try {
      body = JSON.parse(data);
    } catch {
      return;
    }
    if (body.type === 'connected') this.#onConnected(body);
    else if (body.type === 'draining') this.#reconnectAfterMs = body.reconnect_after_ms;
    else this.listener.onMessage({ body, text: data });
  }

  /** @param {any} greeting */
  #onConnected(greeting) {
    clearTimeout(this.#timer);
    this.#open = true;
    this.#openedAt = Date.now();
    this.#tokenRejected = false;
    this.#silentIntervals = 0;
    const intervalMs = greeting.heartbeat_ms || 25_000;
    this.#livenessTimer = setInterval(() => this.#checkLiveness(), intervalMs);
    this.listener.onStateChange({ state: 'open' });
    this.listener.onOpen(greeting);
  }

  /** Pings a silent connection, and closes it if no message follows. */
  #checkLiveness() {
    this.#silentIntervals += 1;
    if (this.#silentIntervals > 2) this.#onSocketClosed(this.#socket, 0, 'no answer to ping');
    else if (this.#silentIntervals > 1) this.send('{"type":"ping"}');
  }

  /**
   * @param {any} socket
   * @param {number} code
   * @param {string} reason
   */
  #onSocketClosed(socket, code, reason) {
    if (socket !== this.#socket) return;
    this.#detach();
    if (Date.now() - this.#openedAt > STABLE_MS && this.#openedAt > 0) this.#backoff.reset();
    this.#openedAt = 0;
    this.listener.onDisconnect();
    const message = `the connection was closed: ${code} ${reason}`;
    const renewable = typeof this.options.token === 'function' && !this.#tokenRejected;
    if (code === BAD_PROTOCOL || code === FORBIDDEN || (code === UNAUTHENTICATED && !renewable)) {
      this.#closePermanently(new ConnectionClosed(message, code));
      return;
    }
    if (code === UNAUTHENTICATED) this.#tokenRejected = true;
    this.#retry(new Error(message), code === RATE_LIMITED ? RATE_LIMITED_DELAY_MS : 0);
  }

  #detach() {
    const socket = this.#socket;
    this.#socket = null;
    this.#open = false;
    clearTimeout(this.#timer);
    clearInterval(this.#livenessTimer);
    try {
      socket?.close(1000);
    } catch {
      // The socket was never open.
    }
  }

  /**
   * @param {Error} error
   * @param {number} [atLeastMs]
   */
  #retry(error, atLeastMs = 0) {
    if (this.#closed) return;
    const maxMs = this.#reconnectAfterMs;
    const delay = maxMs === null ? this.#backoff.next() : this.#backoff.random() * maxMs;
    const retryInMs = atLeastMs + delay;
    this.listener.onStateChange({ state: 'waiting', error, retryInMs });
    this.#timer = setTimeout(() => this.open(), retryInMs);
  }

  /** @param {ConnectionClosed} error */
  #closePermanently(error) {
    if (this.#closed) return;
    this.#closed = true;
    this.#detach();
    this.listener.onStateChange({ state: 'closed', error });
    this.listener.onClose(error);
  }
}
