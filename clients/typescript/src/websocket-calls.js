/**
 * Messages of the client that are answered. The protocol has no number for them: an answer names
 * the request that it is about. So there is one call at a time about each request, and those that
 * are about none wait for each other too. What a lost connection left unanswered is sent again on
 * the next one. No dependencies; runs in browsers.
 */

import { Backoff } from './backoff.js';
import { RequestCancelled } from './errors.js';
import { errorFrom } from './websocket-messages.js';

/** Unanswered messages on one connection at most. */
const MAX_IN_FLIGHT = 64;
/** So often a call is repeated that could not be served just then. */
const MAX_REFUSALS = 6;
/** The same, of a subscription that finds no room: watches of a connection that broke off count for 50 s. */
const MAX_LIMITED = 30;
/** The limit of which a server says that it did not look at the message at all. */
const MESSAGE_RATE = 'gateway.messages_per_second';

/** @typedef {import('./websocket-messages.js').Message} Message */
/** @typedef {'submit' | 'subscribe' | 'unsubscribe' | 'cancel' | 'get' | 'list' | 'auth'} Kind */

/**
 * @typedef {object} Call
 * @property {Kind} kind
 * @property {string} name The request that it is about; empty when it is about none.
 * @property {() => string} frame What to send, as of now.
 * @property {boolean} sent Whether it waits for an answer on this connection.
 * @property {number} times How often it was sent.
 * @property {Backoff} refusals
 * @property {(message: Message) => void} resolve
 * @property {(error: unknown) => void} reject
 */

/** Which calls each type of message answers; an error answers all. */
const ANSWERS = /** @type {Record<string, Kind[]>} */ ({
  acknowledgment: ['submit', 'cancel'],
  response: ['submit'],
  subscribed: ['subscribe'],
  unsubscribed: ['unsubscribe'],
  request: ['get'],
  requests: ['list'],
  authenticated: ['auth'],
});

/** The calls of one client, over all its connections. */
export class Calls {
  /** @type {Map<string, Call[]>} By the request; the first of each is the one on its way. */
  #lines = new Map();
  /** @type {Set<Call>} Those that may be sent. */
  #due = new Set();
  #inFlight = 0;

  /** @param {(frame: string) => boolean} send Whether a connection took it; throws if none will. */
  constructor(send) {
    this.send = send;
  }

  /**
   * @param {Kind} kind
   * @param {string} name
   * @param {() => string} frame
   * @param {(message: Message) => void} resolve Gets the answer, before any message after it.
   * @param {(error: unknown) => void} reject Gets the server's error.
   */
  make(kind, name, frame, resolve, reject) {
    const refusals = new Backoff({ initialMs: 200 });
    const call = { kind, name, frame, sent: false, times: 0, refusals, resolve, reject };
    const line = this.#lines.get(name);
    if (line) {
      line.push(call);
      return;
    }
    this.#lines.set(name, [call]);
    this.#due.add(call);
    this.flush();
  }

  /**
   * Takes back a submission that no connection has taken yet.
   * @param {string} name
   * @returns {boolean} Whether there was one.
   */
  withdraw(name) {
    const line = this.#lines.get(name) ?? [];
    const call = line.find(({ kind, times }) => kind === 'submit' && times === 0);
    if (!call) return false;
    this.#remove(call);
    call.reject(new RequestCancelled('it was never sent', { requestId: name }));
    return true;
  }

  /** Sends what may be sent. */
  flush() {
    for (const call of this.#due) {
      if (this.#inFlight >= MAX_IN_FLIGHT) return;
      try {
        if (!this.send(call.frame())) return;
      } catch (error) {
        this.#remove(call);
        call.reject(error);
        continue;
      }
      this.#due.delete(call);
      this.#inFlight += 1;
      call.sent = true;
      call.times += 1;
    }
  }

  /** The connection is lost: what was not answered is due again. */
  lost() {
    this.#inFlight = 0;
    for (const [call] of this.#lines.values()) {
      call.sent = false;
      this.#due.add(call);
    }
  }

  /**
   * @param {Message} message
   * @returns {boolean} Whether it answers a call.
   */
  answer(message) {
    const { type, seq, request_id: requestId, uid } = message.body;
    if (seq !== undefined) return false;
    const kinds = ANSWERS[type];
    if (!kinds && type !== 'error') return false;
    const names = requestId === undefined ? [''] : [requestId, uid];
    const heads = names.map((name) => this.#lines.get(name)?.[0]);
    const call = heads.find((head) => head?.sent && (!kinds || kinds.includes(head.kind)));
    if (!call) return false;
    this.#inFlight -= 1;
    call.sent = false;
    if (type === 'error') this.#refused(call, errorFrom(message.body.error));
    else this.#settle(call, () => call.resolve(message));
    return true;
  }

  /** @param {unknown} error Why nothing will be answered any more. */
  fail(error) {
    const calls = [...this.#lines.values()].flat();
    this.#lines.clear();
    this.#due.clear();
    for (const { reject } of calls) reject(error);
  }

  /**
   * @param {Call} call
   * @param {import('./errors.js').StreamerError} error
   */
  #refused(call, error) {
    const unseen = error.details?.limit === MESSAGE_RATE;
    // Watches of a connection that broke off count for a while, and so may those that replace them.
    const later = call.kind === 'subscribe' && error.retryAfterMs !== undefined;
    const limited = error.code === 'RATE_LIMITED' && (call.times > 1 || later);
    const busy = error.code === 'UNAVAILABLE' || limited;
    const refusals = later ? MAX_LIMITED : MAX_REFUSALS;
    if (!unseen && !(busy && call.refusals.failures < refusals)) {
      this.#settle(call, () => call.reject(error));
      return;
    }
    setTimeout(
      () => {
        if (this.#lines.get(call.name)?.[0] !== call || call.sent) return;
        this.#due.add(call);
        this.flush();
      },
      (error.retryAfterMs ?? 0) + call.refusals.next(),
    );
  }

  /**
   * @param {Call} call
   * @param {() => void} tell
   */
  #settle(call, tell) {
    this.#remove(call);
    tell();
    this.flush();
  }

  /** @param {Call} call */
  #remove(call) {
    this.#due.delete(call);
    const line = this.#lines.get(call.name) ?? [];
    const index = line.indexOf(call);
    if (index >= 0) line.splice(index, 1);
    if (line.length === 0) this.#lines.delete(call.name);
    else if (index === 0) this.#due.add(line[0]);
  }
}
