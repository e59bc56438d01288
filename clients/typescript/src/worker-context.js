/**
 * The context of a handler. It validates reports and passes them to a reporter: an attempt of a
 * worker, or the recorder of `streamer-client/testing`.
 */

import { sleep } from './backoff.js';
import { checkSize } from './errors.js';
import { JSON_TYPE, Payload, toChunk, toJson } from './payload.js';
import { InvalidPayload } from './worker-errors.js';

/** Longest message of a progress report, in bytes. */
const MAX_PROGRESS_MESSAGE_BYTES = 4096;
/** Largest metadata of a progress report, in bytes. */
const MAX_PROGRESS_METADATA_BYTES = 64 * 1024;
/** Largest checkpoint, in bytes. */
const MAX_CHECKPOINT_BYTES = 256 * 1024;
/** Largest content type, in bytes. */
const MAX_CONTENT_TYPE_BYTES = 255;
/** Longest time for which reports do not yield to the event loop, in milliseconds. */
const YIELD_INTERVAL_MS = 10;

/**
 * Data of an attempt.
 * @typedef {object} AttemptInfo
 * @property {string} uid
 * @property {string} requestId
 * @property {string} tenantId
 * @property {string} userId
 * @property {string} action
 * @property {number} attempt
 * @property {Uint8Array | null} checkpoint
 * @property {Date | null} deadline
 * @property {string} traceParent
 * @property {string} [traceState]
 * @property {Payload} payload
 */

/**
 * Receives the reports of a handler.
 * @typedef {object} Reporter
 * @property {AbortSignal} signal
 * @property {{maxOutputChunkBytes: number}} limits In bytes.
 * @property {(kind: 'progress' | 'output', body: any, bytes: number) => Promise<void>} report
 *   Resolves once there is room; rejects if this worker no longer owns the attempt.
 * @property {(bytes: Uint8Array) => Promise<void>} checkpoint
 * @property {() => Promise<void>} keepAlive
 */

/** When the process last yielded to the event loop. */
let lastYield = performance.now();

/** Yields to the event loop, so that heartbeats are sent while a busy handler reports. */
async function yieldToEventLoop() {
  if (performance.now() - lastYield < YIELD_INTERVAL_MS) return;
  await new Promise((resolve) => setImmediate(resolve));
  lastYield = performance.now();
}

/** Argument of every run of a handler. */
export class Context {
  #reporter;
  #payload;

  /**
   * @param {AttemptInfo} info
   * @param {Reporter} reporter
   */
  constructor(info, reporter) {
    this.#reporter = reporter;
    this.#payload = info.payload;
    /** The server's id of the request: the idempotency key for side effects in other systems. */
    this.uid = info.uid;
    /** The caller's id of the request. */
    this.requestId = info.requestId;
    /** The tenant of the caller. */
    this.tenantId = info.tenantId;
    /** The user who submitted the request. */
    this.userId = info.userId;
    /** Name of the action. */
    this.action = info.action;
    /** Number of the attempt, from 1. */
    this.attempt = info.attempt;
    /** Exact bytes of the checkpoint of an earlier attempt; `null` if there is none. */
    this.checkpointBytes = info.checkpoint;
    /** When the attempt fails with `TIMEOUT`; `null` if it has no time limit. */
    this.deadline = info.deadline;
    /**
     * W3C `traceparent` to send with calls that the handler makes; empty if the request is not part
     * of a trace. With `@opentelemetry/api` and a context manager, it is also the active context.
     */
    this.traceParent = info.traceParent;
    /** W3C `tracestate` that belongs to `traceParent`. */
    this.traceState = info.traceState ?? '';
    /**
     * Aborted when the handler should end: the request was cancelled, or this worker no longer owns
     * the attempt. The reason is a `Cancelled`.
     */
    this.signal = reporter.signal;
  }

  /** Exact bytes of the payload. */
  get payloadBytes() {
    return this.#payload.bytes;
  }

  /** The payload as text, in which no number has lost digits. */
  get payloadText() {
    return this.#payload.text;
  }

  /**
   * The payload: parsed JSON, text as a string, anything else as bytes.
   * @returns {any}
   * @throws {InvalidPayload} If the content type is JSON and the payload is not.
   */
  get payload() {
    try {
      return this.#payload.value;
    } catch (error) {
      throw new InvalidPayload('payload', `is not JSON: ${/** @type {Error} */ (error).message}`);
    }
  }

  /**
   * The checkpoint that an earlier attempt passed to {@link saveCheckpoint}; `null` if there is
   * none, and bytes if it is not JSON.
   * @returns {any}
   */
  get checkpoint() {
    if (this.checkpointBytes === null) return null;
    try {
      return new Payload(JSON_TYPE, this.checkpointBytes).value;
    } catch {
      return this.checkpointBytes;
    }
  }

  /**
   * Reports progress. Blocks only while too many reports are not durable.
   * @param {number | {percentage?: number, message?: string, metadata?: unknown}} report A
   *   percentage from 0 to 100; or an object with a percentage, a message for people (at most 4,096
   *   bytes) and JSON-encodable metadata (at most 64 KiB).
   * @returns {Promise<void>}
   * @throws {RangeError} If the percentage is out of range.
   * @throws {import('./errors.js').LimitError} If a value is too large.
   * @throws {import('./worker-errors.js').Cancelled} If this worker no longer owns the attempt. The
   *   methods below throw it, too.
   */
  progress(report) {
    return this.#report(() => {
      const {
        percentage,
        message = '',
        metadata,
      } = typeof report === 'number' ? { percentage: report } : report;
      if (percentage !== undefined && !(percentage >= 0 && percentage <= 100)) {
        throw new RangeError(`progress.percentage must be 0 to 100, is ${percentage}`);
      }
      const messageBytes = Buffer.byteLength(message);
      checkSize('progress.message', messageBytes, MAX_PROGRESS_MESSAGE_BYTES);
      const data =
        metadata === undefined ? null : Buffer.from(toJson(metadata, 'progress.metadata'));
      const metadataBytes = data?.length ?? 0;
      checkSize('progress.metadata', metadataBytes, MAX_PROGRESS_METADATA_BYTES);
      const body = {
        percentage,
        // A lone surrogate cannot be encoded as UTF-8.
        message: message.toWellFormed(),
        metadata: data && { contentType: JSON_TYPE, data },
      };
      return this.#reporter.report('progress', body, messageBytes + metadataBytes);
    });
  }

  /**
   * Sends the next chunk of output. Blocks only while too many reports are not durable.
   * @param {unknown} chunk A string (`text/plain`), bytes (`application/octet-stream`), a
   *   `Payload` (unchanged), or anything else as JSON. At most the server's
   *   `limits.max_output_chunk_bytes` (1 MiB by default).
   * @returns {Promise<void>}
   * @throws {import('./errors.js').LimitError} If it is too large.
   */
  output(chunk) {
    return this.#report(() => {
      const { contentType, bytes } = toChunk(chunk);
      checkSize('output', bytes.length, this.#reporter.limits.maxOutputChunkBytes);
      checkSize('output.content_type', Buffer.byteLength(contentType), MAX_CONTENT_TYPE_BYTES);
      const body = { contentType: contentType.toWellFormed(), data: bytes };
      return this.#reporter.report('output', body, bytes.length);
    });
  }

  /**
   * Saves the state that the next attempt starts from, replacing the previous checkpoint. The
   * output of a failed attempt is void: the next attempt must send it again.
   * @param {unknown} value Bytes unchanged, anything else as JSON; at most 256 KiB.
   * @returns {Promise<void>}
   * @throws {import('./errors.js').LimitError} If it is too large.
   */
  saveCheckpoint(value) {
    return this.#report(() => {
      const bytes = value instanceof Uint8Array ? value : Buffer.from(toJson(value, 'checkpoint'));
      checkSize('checkpoint', bytes.length, MAX_CHECKPOINT_BYTES);
      return this.#reporter.checkpoint(bytes);
    });
  }

  /**
   * Reports that the handler is alive, for actions with `heartbeatTimeoutMs`. Every other report
   * counts as a heartbeat, too.
   * @returns {Promise<void>}
   */
  heartbeat() {
    return this.#report(() => this.#reporter.keepAlive());
  }

  /**
   * Resolves after a delay.
   * @param {number} ms Milliseconds.
   * @returns {Promise<void>} Rejects with a `Cancelled` when the handler should end.
   */
  sleep(ms) {
    return ignoreUnhandled(sleep(ms, this.signal));
  }

  /**
   * Reports, then yields to the event loop.
   * @param {() => Promise<void>} report Throws if the report is invalid.
   * @returns {Promise<void>}
   */
  #report(report) {
    try {
      return ignoreUnhandled(report().then(yieldToEventLoop));
    } catch (error) {
      return Promise.reject(error);
    }
  }
}

/**
 * Prevents an unhandled rejection, which ends the process, for a report that is not awaited.
 * @param {Promise<void>} promise Rejects only when the handler should end.
 * @returns {Promise<void>}
 */
function ignoreUnhandled(promise) {
  promise.catch(() => {});
  return promise;
}
