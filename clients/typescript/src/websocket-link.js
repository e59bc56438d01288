/**
 * Keeps a WebSocket open: connects, notices when it is dead, and connects again with full jitter.
 * No dependencies; runs in browsers.
 */

import { Backoff } from './backoff.js';
import { ConnectionClosed } from './errors.js';

/** How long a connection may take to be let in, in milliseconds. */
const CONNECT_TIMEOUT_MS = 20_000;
/** A connection that lasted so long, in milliseconds, was a good one. */
const GOOD_MS = 5000;
/** More time for a server that says that there are too many connections, in milliseconds. */
const TOO_MANY_MS = 1000;

/** What a subprotocol may be made of, and so a token. */
const TOKEN = /^[\w!#$%&'*+.^`|~-]+$/;

const BAD_PROTOCOL = 4400;
const UNAUTHENTICATED = 4401;
const FORBIDDEN = 4403;
const TOO_MANY = 4429;

/**
 * What became of the connection.
 * @typedef {object} StateChange
 * @property {'connecting' | 'open' | 'waiting' | 'closed'} state `waiting`: until it is tried
 *   again; `closed`: for good.
 * @property {Error} [error] Why it is `waiting` or `closed`.
 * @property {number} [retryInMs] When `waiting`: for so many milliseconds.
 */

/**
 * Who uses it.
 * @typedef {object} User
 * @property {(greeting: any) => void} opened The server let it in.
 * @property {(message: import('./websocket-messages.js').Message) => void} heard
 * @property {() => void} lost What was not answered will not be.
 * @property {(error: ConnectionClosed) => void} closed For good.
 * @property {(change: StateChange) => void} changed
 */

/** One connection after the other. */
export class Link {
  /** @type {any} The WebSocket in use; `null` in between. */
  #socket = null;
  #admitted = false;
  #admittedAt = 0;
  #closed = false;
  /** The last connection was refused for its token. */
  #refused = false;
  /** After how long the server asked to come back; `null` when it did not. */
  #reconnectAfterMs = /** @type {number | null} */ (null);
  #backoff = new Backoff();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {ReturnType<typeof setInterval> | undefined} */
  #pulse;
  #silentBeats = 0;

  /**
   * @param {object} options
   * @param {string} options.url
   * @param {string | (() => string | Promise<string>)} options.token
   * @param {any} options.WebSocket
   * @param {User} user
   */
  constructor(options, user) {
    this.options = options;
    this.user = user;
  }

  /** Connects. */
  async open() {
    this.user.changed({ state: 'connecting' });
    const { url, token, WebSocket } = this.options;
    let current;
    try {
      current = typeof token === 'function' ? await token() : token;
    } catch (error) {
      this.#retry(error instanceof Error ? error : new Error(String(error)));
      return;
    }
    if (this.#closed) return;
    const bearer = typeof current === 'string' ? current.trim() : '';
    if (!TOKEN.test(bearer)) {
      // A browser's own message would contain it.
      this.#end(new ConnectionClosed('token must be a JWT, or a function that returns one', UNAUTHENTICATED));
      return;
    }
    try {
      this.#attach(new WebSocket(url, ['streamer.v1.json', `bearer.${bearer}`]));
    } catch (error) {
      // The URL is none.
      this.#end(new ConnectionClosed(String(error)));
    }
  }

  /**
   * @param {string} text
   * @returns {boolean} Whether there is a connection to take it.
   */
  send(text) {
    if (!this.#admitted) return false;
    this.#socket.send(text);
    return true;
  }

  /** Closes it for good. */
  close() {
    this.#end(new ConnectionClosed('closed by this side'));
  }

  /** @param {any} socket */
  #attach(socket) {
    this.#socket = socket;
    this.#reconnectAfterMs = null;
    this.#timer = setTimeout(() => this.#drop(socket, 0, 'not let in'), CONNECT_TIMEOUT_MS);
    socket.addEventListener('message', (/** @type {any} */ event) => {
      if (socket === this.#socket) this.#onFrame(event.data);
    });
    socket.addEventListener('close', (/** @type {any} */ event) => {
      this.#drop(socket, event.code, String(event.reason ?? ''));
    });
    // The close event that follows says more.
    socket.addEventListener('error', () => {});
  }

  /** @param {unknown} data */
  #onFrame(data) {
    this.#silentBeats = 0;
    if (typeof data !== 'string') return;
    let body;
    try {
      body = JSON.parse(data);
    } catch {
      return;
    }
    if (body.type === 'connected') this.#onConnected(body);
    else if (body.type === 'draining') this.#reconnectAfterMs = body.reconnect_after_ms;
    else this.user.heard({ body, text: data });
  }

  /** @param {any} greeting */
  #onConnected(greeting) {
    clearTimeout(this.#timer);
    this.#admitted = true;
    this.#admittedAt = Date.now();
    this.#refused = false;
    this.#silentBeats = 0;
    this.#pulse = setInterval(() => this.#beat(), greeting.heartbeat_ms || 25_000);
    this.user.changed({ state: 'open' });
    this.user.opened(greeting);
  }

  /** Pings a connection that is silent, and gives up one that stays so. */
  #beat() {
    this.#silentBeats += 1;
    if (this.#silentBeats > 2) this.#drop(this.#socket, 0, 'the server is silent');
    else if (this.#silentBeats > 1) this.send('{"type":"ping"}');
  }

  /**
   * @param {any} socket
   * @param {number} code
   * @param {string} reason
   */
  #drop(socket, code, reason) {
    if (socket !== this.#socket) return;
    this.#detach();
    if (Date.now() - this.#admittedAt > GOOD_MS && this.#admittedAt > 0) this.#backoff.reset();
    this.#admittedAt = 0;
    this.user.lost();
    const message = `the connection was closed: ${code} ${reason}`;
    const renewable = typeof this.options.token === 'function' && !this.#refused;
    if (code === BAD_PROTOCOL || code === FORBIDDEN || (code === UNAUTHENTICATED && !renewable)) {
      this.#end(new ConnectionClosed(message, code));
      return;
    }
    if (code === UNAUTHENTICATED) this.#refused = true;
    this.#retry(new Error(message), code === TOO_MANY ? TOO_MANY_MS : 0);
  }

  #detach() {
    const socket = this.#socket;
    this.#socket = null;
    this.#admitted = false;
    clearTimeout(this.#timer);
    clearInterval(this.#pulse);
    try {
      socket?.close(1000);
    } catch {
      // It never opened.
    }
  }

  /**
   * @param {Error} error
   * @param {number} [atLeastMs]
   */
  #retry(error, atLeastMs = 0) {
    if (this.#closed) return;
    const asked = this.#reconnectAfterMs;
    const wait = asked === null ? this.#backoff.next() : this.#backoff.random() * asked;
    const retryInMs = atLeastMs + wait;
    this.user.changed({ state: 'waiting', error, retryInMs });
    this.#timer = setTimeout(() => this.open(), retryInMs);
  }

  /** @param {ConnectionClosed} error */
  #end(error) {
    if (this.#closed) return;
    this.#closed = true;
    this.#detach();
    this.user.changed({ state: 'closed', error });
    this.user.closed(error);
  }
}
