/** Runs one attempt: its handler and its reports. */

import { checkSize } from './errors.js';
import { JSON_TYPE, toJson } from './payload.js';
import { inHandlerSpan } from './tracing.js';
import { Context } from './worker-context.js';
import { Cancelled, errorReport, handlerError } from './worker-errors.js';
import { ReportQueue } from './worker-report-queue.js';

/** Maximum interval between keep-alives, in milliseconds. */
const MAX_KEEP_ALIVE_MS = 1000;

/**
 * Limits in the server's `welcome`. Sizes are in bytes, times in milliseconds.
 * @typedef {object} Limits
 * @property {number} heartbeatMs
 * @property {number} leaseMs
 * @property {number} maxPayloadBytes
 * @property {number} maxOutputChunkBytes
 * @property {number} maxUnacknowledged
 * @property {number} maxUnacknowledgedBytes
 */

/**
 * @typedef {object} PendingReport Report that waits for queue capacity, or for an earlier report.
 * @property {'counted' | 'other' | 'final'} kind Only `counted` reports (progress and output)
 *   require capacity.
 * @property {() => void} add
 * @property {() => void} resolve
 * @property {(reason: unknown) => void} reject
 */

/** Runs the handler of an attempt, and sends its reports as `Reporter` of its context. */
export class Attempt {
  #controller = new AbortController();
  /** @type {PendingReport[]} */
  #pending = [];
  #reports = new ReportQueue();
  /** Whether the attempt was stopped, so that it sends no more reports. */
  #stopped = false;
  #cancelled = false;
  #onChange;
  #keepAliveMs;
  #keepAliveAt = -Infinity;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #keepAliveTimer;

  /**
   * @param {import('./worker-context.js').AttemptInfo & {sync: boolean}} info
   * @param {Limits} limits Limits of the current stream.
   * @param {number} heartbeatTimeoutMs Heartbeat timeout of the action; 0 for no limit.
   * @param {(attempt: Attempt) => void} onChange Called when a report may be ready to send.
   */
  constructor(info, limits, heartbeatTimeoutMs, onChange) {
    this.#keepAliveMs = Math.min(heartbeatTimeoutMs / 4 || Infinity, MAX_KEEP_ALIVE_MS);
    this.info = info;
    this.limits = limits;
    this.#onChange = onChange;
  }

  get signal() {
    return this.#controller.signal;
  }

  /** Identity of the attempt in the protocol. */
  get id() {
    return { uid: this.info.uid, attempt: this.info.attempt };
  }

  /**
   * Runs the handler, and reports its result or error.
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

  /**
   * Reports a failure.
   * @param {import('./worker-errors.js').HandlerError} error
   */
  fail(error) {
    this.#end('error', errorReport(error));
  }

  /**
   * Releases the attempt, unless it has ended, and aborts the handler.
   * @param {string} reason
   */
  release(reason) {
    if (this.#reports.ended || this.#stopped) return;
    this.#reject(new Cancelled(reason));
    this.#reports.addFinal('release', { reason });
    this.#onChange(this);
    this.#controller.abort(new Cancelled(reason));
  }

  /**
   * Notifies the handler of a cancellation.
   * @param {string} reason
   */
  cancel(reason) {
    this.#cancelled = true;
    this.#controller.abort(new Cancelled(reason));
  }

  /**
   * Aborts the handler and sends no further reports, because this worker no longer owns the
   * attempt.
   * @param {string} reason
   */
  stop(reason) {
    this.#stopped = true;
    this.#controller.abort(new Cancelled(reason));
    this.#reject(this.signal.reason);
  }

  /** Number of `resend` messages for this attempt on the current stream. */
  get resends() {
    return this.#reports.resends;
  }

  /**
   * Resends reports that the server dropped.
   * @param {number} number Number of the last report that was not dropped.
   * @param {number} resends Number of `resend` messages on the current stream.
   */
  resend(number, resends) {
    this.#reports.resend(number, resends);
    this.#onChange(this);
  }

  /** @returns {import('./worker-report-queue.js').Report | null} The next report to send. */
  next() {
    return this.#stopped ? null : this.#reports.next(this.limits);
  }

  /**
   * Removes durable reports.
   * @param {number} number Number of the last durable report.
   * @param {number} [maxUnacknowledgedBytes] New limit; 0 keeps the current one.
   */
  acknowledge(number, maxUnacknowledgedBytes = 0) {
    if (maxUnacknowledgedBytes > 0) this.limits = { ...this.limits, maxUnacknowledgedBytes };
    this.#reports.acknowledge(number);
    this.#queuePending();
  }

  /**
   * Continues on a new stream, on which the reports that are not durable are sent.
   * @param {number} number Number of the last durable report.
   * @param {Limits} limits
   */
  resume(number, limits) {
    this.limits = limits;
    this.#reports.resume(number);
    this.#queuePending();
    this.#onChange(this);
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

  /** Queues a keep-alive. Calls within an interval are merged into one keep-alive at its end. */
  async keepAlive() {
    if (this.#stopped) throw this.signal.reason;
    const delay = this.#keepAliveAt + this.#keepAliveMs - performance.now();
    if (delay > 0) {
      this.#keepAliveTimer ??= setTimeout(() => this.#enqueueKeepAlive(), delay).unref();
    } else {
      this.#enqueueKeepAlive();
    }
  }

  #enqueueKeepAlive() {
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
    // Reports that the handler did not await are sent first. Rejects after `release` or `stop`.
    this.#enqueue('final', () => this.#reports.addFinal(kind, body)).catch(() => {});
  }

  /**
   * @param {PendingReport['kind']} kind
   * @param {() => void} add
   * @returns {Promise<void>} Resolves once the report is added.
   */
  #enqueue(kind, add) {
    return new Promise((resolve, reject) => {
      if (this.#stopped) return reject(this.signal.reason);
      this.#pending.push({ kind, add, resolve, reject });
      this.#queuePending();
    });
  }

  /** Moves pending reports to the queue, in order, while the queue has capacity. */
  #queuePending() {
    let first = this.#pending[0];
    for (; first && !this.#reports.ended; first = this.#pending[0]) {
      if (first.kind === 'counted' && !this.#reports.hasRoom(this.limits)) break;
      this.#pending.shift();
      // For a sync action, only the final report is sent.
      if (!this.info.sync || first.kind === 'final') first.add();
      first.resolve();
    }
    if (this.#reports.ended) this.#reject(new Cancelled('the attempt has ended'));
    this.#onChange(this);
  }

  /** @param {unknown} reason */
  #reject(reason) {
    const pending = this.#pending;
    this.#pending = [];
    for (const { reject } of pending) reject(reason);
  }
}
