/** One attempt in a worker: its handler, and what it has reported. */

import { checkSize } from './errors.js';
import { JSON_TYPE, toJson } from './payload.js';
import { inHandlerSpan } from './tracing.js';
import { Context } from './worker-context.js';
import { Cancelled, errorReport, handlerError } from './worker-errors.js';
import { ReportQueue } from './worker-reports.js';

/** A handler that says that it lives is believed for so long, in milliseconds. */
const MAX_KEEP_ALIVE_MS = 1000;

/**
 * What the server said in `welcome`; sizes are bytes, times milliseconds.
 * @typedef {object} Limits
 * @property {number} heartbeatMs
 * @property {number} leaseMs
 * @property {number} maxPayloadBytes
 * @property {number} maxOutputChunkBytes
 * @property {number} maxUnacknowledged
 * @property {number} maxUnacknowledgedBytes
 */

/**
 * @typedef {object} Waiting Something that a handler wants to report, in its turn.
 * @property {'counted' | 'other' | 'last'} kind What is counted needs room.
 * @property {() => void} add
 * @property {() => void} resolve
 * @property {(reason: unknown) => void} reject
 */

/** From the task to the acknowledgment of its end; where its context's reports go. */
export class Attempt {
  #controller = new AbortController();
  /** @type {Waiting[]} */
  #waiting = [];
  #reports = new ReportQueue();
  /** Nothing more is sent, and the handler should be gone. */
  #stopped = false;
  #cancelled = false;
  #changed;
  #keepAliveMs;
  #keepAliveAt = -Infinity;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #keepAliveTimer;

  /**
   * @param {import('./worker-context.js').AttemptInfo & {sync: boolean}} info
   * @param {Limits} limits Those of the stream in use.
   * @param {number} heartbeatTimeoutMs Longest silence that its action allows; 0 for no limit.
   * @param {(attempt: Attempt) => void} changed Told when there may be something to send.
   */
  constructor(info, limits, heartbeatTimeoutMs, changed) {
    this.#keepAliveMs = Math.min(heartbeatTimeoutMs / 4 || Infinity, MAX_KEEP_ALIVE_MS);
    this.info = info;
    this.limits = limits;
    this.#changed = changed;
  }

  get signal() {
    return this.#controller.signal;
  }

  /** What names it in the protocol. */
  get name() {
    return { uid: this.info.uid, attempt: this.info.attempt };
  }

  /**
   * Runs the handler to its end and reports it.
   * @param {import('./worker-actions.js').Handler} handler
   */
  async run(handler) {
    const context = new Context(this.info, this);
    try {
      const run = async () => handler(context, context.payload);
      const result = await inHandlerSpan(this.info, run);
      const data = Buffer.from(toJson(result, 'result'));
      checkSize('result', data.length, this.limits.maxPayloadBytes);
      this.#end('result', { contentType: JSON_TYPE, data });
    } catch (thrown) {
      this.fail(handlerError(thrown, this.#cancelled));
    }
  }

  /** @param {import('./worker-errors.js').HandlerError} error Why it failed. */
  fail(error) {
    this.#end('error', errorReport(error));
  }

  /**
   * Hands it back unfinished, unless its end is on the way already.
   * @param {string} reason
   */
  release(reason) {
    if (this.#reports.ended || this.#stopped) return;
    this.#reject(new Cancelled(reason));
    this.#reports.addLast('release', { reason });
    this.#changed(this);
    this.#controller.abort(new Cancelled(reason));
  }

  /**
   * Cancellation was asked for: the handler is told.
   * @param {string} reason
   */
  cancel(reason) {
    this.#cancelled = true;
    this.#controller.abort(new Cancelled(reason));
  }

  /**
   * It is not this worker's any more: the handler is told, and nothing more is sent.
   * @param {string} reason
   */
  stop(reason) {
    this.#stopped = true;
    this.#controller.abort(new Cancelled(reason));
    this.#reject(this.signal.reason);
  }

  /** How often the server asked for dropped reports on this stream. */
  get resends() {
    return this.#reports.resends;
  }

  /**
   * Reports were dropped.
   * @param {number} number Reports up to this one have arrived.
   * @param {number} resends How often the server asked on this stream.
   */
  resend(number, resends) {
    this.#reports.resend(number, resends);
    this.#changed(this);
  }

  /** @returns {import('./worker-reports.js').Report | null} What to send now. */
  next() {
    return this.#stopped ? null : this.#reports.next(this.limits);
  }

  /**
   * Reports were stored.
   * @param {number} number Reports up to this one are durable.
   * @param {number} [maxUnacknowledgedBytes] From now on; 0 for no change.
   */
  acknowledge(number, maxUnacknowledgedBytes = 0) {
    if (maxUnacknowledgedBytes > 0) this.limits = { ...this.limits, maxUnacknowledgedBytes };
    this.#reports.acknowledge(number);
    this.#admit();
  }

  /**
   * Goes on over a new stream.
   * @param {number} number Reports up to this one are durable.
   * @param {Limits} limits
   */
  resume(number, limits) {
    this.limits = limits;
    this.#reports.restart(number);
    this.#admit();
    this.#changed(this);
  }

  /**
   * @param {'progress' | 'output'} kind
   * @param {any} body
   * @param {number} bytes
   */
  report(kind, body, bytes) {
    return this.#enqueue('counted', () => this.#reports.addCounted(kind, body, bytes));
  }

  /** @param {Uint8Array} bytes */
  checkpoint(bytes) {
    return this.#enqueue('other', () => this.#reports.addCheckpoint(bytes));
  }

  /** Of many calls in a short time the last one is passed on when the time is over. */
  async keepAlive() {
    if (this.#stopped) throw this.signal.reason;
    const wait = this.#keepAliveAt + this.#keepAliveMs - performance.now();
    if (wait > 0) {
      this.#keepAliveTimer ??= setTimeout(() => this.#passKeepAlive(), wait).unref();
    } else {
      this.#passKeepAlive();
    }
  }

  #passKeepAlive() {
    clearTimeout(this.#keepAliveTimer);
    this.#keepAliveTimer = undefined;
    this.#keepAliveAt = performance.now();
    this.#enqueue('other', () => this.#reports.addKeepAlive()).catch(() => {});
  }

  /**
   * @param {'result' | 'error'} kind
   * @param {any} body
   */
  #end(kind, body) {
    // What the handler did not wait for still goes first. After release or stop nothing is said.
    this.#enqueue('last', () => this.#reports.addLast(kind, body)).catch(() => {});
  }

  /**
   * @param {Waiting['kind']} kind
   * @param {() => void} add
   * @returns {Promise<void>} Resolves once it was added.
   */
  #enqueue(kind, add) {
    return new Promise((resolve, reject) => {
      if (this.#stopped) return reject(this.signal.reason);
      this.#waiting.push({ kind, add, resolve, reject });
      this.#admit();
    });
  }

  /** Takes in what waits, in order, as far as there is room. */
  #admit() {
    let first = this.#waiting[0];
    for (; first && !this.#reports.ended; first = this.#waiting[0]) {
      if (first.kind === 'counted' && !this.#reports.hasRoom(this.limits)) break;
      this.#waiting.shift();
      // A sync action is answered by its end alone.
      if (!this.info.sync || first.kind === 'last') first.add();
      first.resolve();
    }
    if (this.#reports.ended) this.#reject(new Cancelled('the attempt has ended'));
    this.#changed(this);
  }

  /** @param {unknown} reason */
  #reject(reason) {
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const { reject } of waiting) reject(reason);
  }
}
