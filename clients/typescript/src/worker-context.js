/**
 * The context of a handler. It validates reports and passes them to a reporter: an attempt of a
 * worker, or the recorder of `streamer-client/testing`.
 */

import { sleep } from './backoff.js';
import { checkSize } from './errors.js';
import { JSON_TYPE, Payload, toChunk, toJson } from './payload.js';
import { InvalidPayload } from './worker-errors.js';

/** Maximum length of the message of a progress report, in bytes. */
const MAX_PROGRESS_MESSAGE_BYTES = 4096;
/** Maximum size of the metadata of a progress report, in bytes. */
const MAX_PROGRESS_METADATA_BYTES = 64 * 1024;
/** Maximum size of a checkpoint, in bytes. */
const MAX_CHECKPOINT_BYTES = 256 * 1024;
/** Maximum length of a content type, in bytes. */
const MAX_CONTENT_TYPE_BYTES = 255;
/** Maximum time that reports take before they yield to the event loop, in milliseconds. */
const YIELD_INTERVAL_MS = 10;

/**
 * Describes an attempt.
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
 * @property {{maxOutputChunkBytes: number}} limits Limits, in bytes.
 * @property {(kind: 'progress' | 'output', body: any, bytes: number) => Promise<void>} report
 *   Resolves once the report is queued; rejects if this worker no longer owns the attempt.
 * @property {(bytes: Uint8Array) => Promise<void>} checkpoint
 * @property {() => Promise<void>} keepAlive
 */

/** Time at which the process last yielded to the event loop. */
let lastYield = performance.now();

/** Yields to the event loop, so that heartbeats are sent while a busy handler reports. */
async function yieldToEventLoop() {
  if (performance.now() - lastYield < YIELD_INTERVAL_MS) return;
  await new Promise((resolve) => setImmediate(resolve));
  lastYield = performance.now();
}

/** Context of a handler: describes its attempt, and sends its reports. */
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
    /** The server's ID of the request; the idempotency key for side effects in other systems. */
    this.uid = info.uid;
    /** The caller's ID of the request. */
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
    /** Time at which the attempt fails with `TIMEOUT`; `null` if it has no time limit. */
    this.deadline = info.deadline;
    /**
     * W3C `traceparent` to send with calls that the handler makes; empty if the request is not part
     * of a trace. With `@opentelemetry/api` and a context manager, it is also the active context.
     */
    this.traceParent = info.traceParent;
    /** W3C `tracestate` that belongs to `traceParent`. */
    this.traceState = info.traceState ?? '';
    /**
     * Signal that is aborted when the handler should end, because the request was cancelled or this
     * worker no longer owns the attempt. The reason is a `Cancelled`.
     */
    this.signal = reporter.signal;
  }

  /** Exact bytes of the payload. */
  get payloadBytes() {
    return this.#payload.bytes;
  }

  /** The payload as text, in which numbers keep their full precision. */
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
   *   percentage from 0 to 100; or an object with a percentage, a human-readable message (at most
   *   4,096 bytes) and JSON-encodable metadata (at most 64 KiB).
   * @returns {Promise<void>}
   * @throws {RangeError} If the percentage is out of range.
   * @throws {import('./errors.js').LimitError} If a value is too large.
   * @throws {import('./worker-errors.js').Cancelled} If this worker no longer owns the attempt. All
   *   methods that report throw this error.
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
   * @throws {import('./errors.js').LimitError} If the chunk is too large.
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
   * Saves the state from which the next attempt starts, replacing the previous checkpoint. The
   * output of a failed attempt is void: the next attempt must send it again.
   * @param {unknown} value Bytes are saved unchanged, any other value as JSON; at most 256 KiB.
   * @returns {Promise<void>}
   * @throws {import('./errors.js').LimitError} If the checkpoint is too large.
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
   * also counts as a heartbeat.
   * @returns {Promise<void>}
   */
  heartbeat() {
    return this.#report(() => this.#reporter.keepAlive());
  }

  /**
   * Resolves after a delay.
   * @param {number} ms Delay, in milliseconds.
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
