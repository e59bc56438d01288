/**
 * What a handler works with while it runs. It checks what is reported and hands it to a sink: an
 * attempt of a worker, or the recorder of `streamer-client/testing`.
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
/** A handler that reports without end lets others run after so many milliseconds. */
const TURN_MS = 10;

/**
 * What is known of an attempt.
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
 * Where reports go.
 * @typedef {object} Sink
 * @property {AbortSignal} signal
 * @property {{maxOutputChunkBytes: number}} limits In bytes.
 * @property {(kind: 'progress' | 'output', body: any, bytes: number) => Promise<void>} report
 *   Resolves once there was room; rejects when the attempt is not the handler's any more.
 * @property {(bytes: Uint8Array) => Promise<void>} checkpoint
 * @property {() => Promise<void>} keepAlive
 */

/** When this process last let others run. */
let turnBegan = performance.now();

/** Lets heartbeats and acknowledgments through when a handler keeps the process busy. */
async function takeTurns() {
  if (performance.now() - turnBegan < TURN_MS) return;
  await new Promise((resolve) => setImmediate(resolve));
  turnBegan = performance.now();
}

/** Handed to every run of a handler. */
export class Context {
  #sink;
  #payload;

  /**
   * @param {AttemptInfo} info
   * @param {Sink} sink
   */
  constructor(info, sink) {
    this.#sink = sink;
    this.#payload = info.payload;
    /** The server's id of the request: the idempotency key for effects elsewhere. */
    this.uid = info.uid;
    /** The caller's id of the request. */
    this.requestId = info.requestId;
    /** The tenant that asks. */
    this.tenantId = info.tenantId;
    /** The user who asks. */
    this.userId = info.userId;
    /** What is asked for. */
    this.action = info.action;
    /** Which attempt this is, from 1. */
    this.attempt = info.attempt;
    /** The exact bytes of the checkpoint that an earlier attempt left; `null` when none did. */
    this.checkpointBytes = info.checkpoint;
    /** The attempt fails with `TIMEOUT` when it has not ended by then; `null`: it may run on. */
    this.deadline = info.deadline;
    /**
     * W3C `traceparent` to send with calls that the handler makes; empty when the request is not part
     * of a trace. With `@opentelemetry/api` and a context manager, this place is the active context,
     * too.
     */
    this.traceParent = info.traceParent;
    /** W3C `tracestate` that goes with it. */
    this.traceState = info.traceState ?? '';
    /**
     * Aborted when the handler should end: cancellation was asked for, or the attempt is not this
     * worker's any more. Its reason is a `Cancelled`.
     */
    this.signal = sink.signal;
  }

  /** The exact bytes of the payload. */
  get payloadBytes() {
    return this.#payload.bytes;
  }

  /** The payload as the text it is, in which no number has lost digits. */
  get payloadText() {
    return this.#payload.text;
  }

  /**
   * The payload, as handlers get it: JSON parsed, text as a string, anything else as bytes.
   * @returns {any}
   * @throws {InvalidPayload} When it says that it is JSON and is not.
   */
  get payload() {
    try {
      return this.#payload.value;
    } catch (error) {
      throw new InvalidPayload('payload', `is not JSON: ${/** @type {Error} */ (error).message}`);
    }
  }

  /**
   * What {@link saveCheckpoint} of an earlier attempt was given; `null` when nothing was, and
   * bytes when it is not JSON.
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
   * Says how far the work is. Waits only while too much is underway.
   * @param {number | {percentage?: number, message?: string, metadata?: unknown}} report 0 to 100;
   *   or that and what is being done (at most 4,096 bytes), and anything more as JSON (at most
   *   64 KiB).
   * @returns {Promise<void>}
   * @throws {RangeError} When the percentage is out of bounds.
   * @throws {import('./errors.js').LimitError} When something is too large.
   * @throws {import('./worker-errors.js').Cancelled} When the attempt is not the handler's any
   *   more. So do the methods below.
   */
  progress(report) {
    return this.#say(() => {
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
        // A lone surrogate has no UTF-8.
        message: message.toWellFormed(),
        metadata: data && { contentType: JSON_TYPE, data },
      };
      return this.#sink.report('progress', body, messageBytes + metadataBytes);
    });
  }

  /**
   * Adds the next chunk of output. Waits only while too much is underway.
   * @param {unknown} chunk A string (`text/plain`), bytes (`application/octet-stream`), a
   *   `Payload` (as it is), or anything else as JSON. At most the server's
   *   `limits.max_output_chunk_bytes` (1 MiB by default).
   * @returns {Promise<void>}
   * @throws {import('./errors.js').LimitError} When it is too large.
   */
  output(chunk) {
    return this.#say(() => {
      const { contentType, bytes } = toChunk(chunk);
      checkSize('output', bytes.length, this.#sink.limits.maxOutputChunkBytes);
      checkSize('output.content_type', Buffer.byteLength(contentType), MAX_CONTENT_TYPE_BYTES);
      const body = { contentType: contentType.toWellFormed(), data: bytes };
      return this.#sink.report('output', body, bytes.length);
    });
  }

  /**
   * Keeps what the next attempt should begin from, in place of the checkpoint before. All output
   * of an attempt that fails is void: the next one has to produce it again.
   * @param {unknown} value Bytes as they are, anything else as JSON; at most 256 KiB.
   * @returns {Promise<void>}
   * @throws {import('./errors.js').LimitError} When it is too large.
   */
  saveCheckpoint(value) {
    return this.#say(() => {
      const bytes = value instanceof Uint8Array ? value : Buffer.from(toJson(value, 'checkpoint'));
      checkSize('checkpoint', bytes.length, MAX_CHECKPOINT_BYTES);
      return this.#sink.checkpoint(bytes);
    });
  }

  /**
   * Says that the handler lives, when it has nothing else to say: for actions with
   * `heartbeatTimeoutMs`. Everything else that it reports says so too.
   * @returns {Promise<void>}
   */
  heartbeat() {
    return this.#say(() => this.#sink.keepAlive());
  }

  /**
   * Waits.
   * @param {number} ms Milliseconds.
   * @returns {Promise<void>} Rejects with a `Cancelled` as soon as the handler should end.
   */
  sleep(ms) {
    return quiet(sleep(ms, this.signal));
  }

  /**
   * Reports, and then lets others run.
   * @param {() => Promise<void>} report Throws when what is reported breaks a rule.
   * @returns {Promise<void>}
   */
  #say(report) {
    try {
      return quiet(report().then(takeTurns));
    } catch (error) {
      return Promise.reject(error);
    }
  }
}

/**
 * A report that its handler does not wait for must not end the process when the attempt is lost.
 * @param {Promise<void>} promise Rejects only when the handler should end.
 * @returns {Promise<void>}
 */
function quiet(promise) {
  promise.catch(() => {});
  return promise;
}
