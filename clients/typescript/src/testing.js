/** Runs a handler without a server, and records its reports. */

import { toJson, toPayload, Payload } from './payload.js';
import { Context } from './worker-context.js';
import { Cancelled, handlerError } from './worker-errors.js';

/**
 * @typedef {object} RunOptions
 * @property {unknown} [checkpoint] Checkpoint of an earlier attempt: bytes unchanged, anything else
 *   as JSON.
 * @property {number} [attempt] Number of the attempt, from 1; default 1.
 * @property {AbortSignal} [signal] Signal that cancels the run when it is aborted.
 * @property {string} [action]
 * @property {string} [uid]
 * @property {string} [requestId]
 * @property {string} [tenantId]
 * @property {string} [userId]
 * @property {Date} [deadline]
 * @property {string} [traceParent]
 * @property {number} [maxOutputChunkBytes] Maximum size of an output chunk in bytes; default 1 MiB.
 */

/** Reports of a handler, in order, and its result or error. */
export class Recording {
  /** @type {any} The result; `undefined` if the handler threw. */
  result = undefined;
  /** @type {string} The result as JSON text; empty if the handler threw. */
  resultText = '';
  /** @type {import('./worker-errors.js').HandlerError | null} The error as a worker reports it. */
  error = null;
  /** @type {{percentage: number | null, message: string, metadata: any}[]} */
  progress = [];
  /** @type {Payload[]} The output chunks. */
  output = [];
  /** @type {any[]} The checkpoints: parsed JSON, or bytes. */
  checkpoints = [];
  /** Number of heartbeats. */
  heartbeats = 0;

  /** @returns {any} The last checkpoint; `null` if none was saved. */
  get checkpoint() {
    return this.checkpoints.at(-1) ?? null;
  }

  /** @returns {string} The concatenated text of the output. */
  get outputText() {
    return this.output.map((chunk) => chunk.text).join('');
  }
}

/**
 * Runs a handler once.
 * @param {import('./worker-actions.js').Handler} handler
 * @param {unknown} [payload] A JSON value, a `RawJson`, or bytes; default `{}`.
 * @param {RunOptions} [options]
 * @returns {Promise<Recording>} Also resolves if the handler throws: see `error`.
 */
export async function runHandler(handler, payload = {}, options = {}) {
  const recording = new Recording();
  const { checkpoint, signal } = options;
  const cancellation = new AbortController();
  const cancel = () => cancellation.abort(new Cancelled('cancelled by the test'));
  if (signal?.aborted) cancel();
  signal?.addEventListener('abort', cancel, { once: true });
  const context = new Context(
    {
      uid: options.uid ?? '00000000000000000000000000',
      requestId: options.requestId ?? 'test',
      tenantId: options.tenantId ?? 'test',
      userId: options.userId ?? 'test',
      action: options.action ?? 'test',
      attempt: options.attempt ?? 1,
      checkpoint: checkpoint === undefined ? null : bytesOf(checkpoint),
      deadline: options.deadline ?? null,
      traceParent: options.traceParent ?? '',
      payload: toPayload(payload, 'payload'),
    },
    recorder(recording, cancellation.signal, options.maxOutputChunkBytes ?? 1024 * 1024),
  );
  try {
    recording.resultText = toJson(await handler(context, context.payload), 'result');
    recording.result = JSON.parse(recording.resultText);
  } catch (thrown) {
    recording.error = handlerError(thrown, cancellation.signal.aborted);
  } finally {
    signal?.removeEventListener('abort', cancel);
  }
  return recording;
}

/**
 * @param {Recording} recording
 * @param {AbortSignal} signal
 * @param {number} maxOutputChunkBytes
 * @returns {import('./worker-context.js').Reporter}
 */
function recorder(recording, signal, maxOutputChunkBytes) {
  return {
    signal,
    limits: { maxOutputChunkBytes },
    async report(kind, body) {
      if (kind === 'output') {
        recording.output.push(new Payload(body.contentType, body.data));
      } else {
        const { percentage = null, message, metadata } = body;
        const value = metadata && JSON.parse(metadata.data.toString());
        recording.progress.push({ percentage, message, metadata: value });
      }
    },
    async checkpoint(bytes) {
      recording.checkpoints.push(valueOf(bytes));
    },
    async keepAlive() {
      recording.heartbeats += 1;
    },
  };
}

/** @param {unknown} value */
function bytesOf(value) {
  return value instanceof Uint8Array ? value : Buffer.from(toJson(value, 'checkpoint'));
}

/** @param {Uint8Array} bytes */
function valueOf(bytes) {
  try {
    return new Payload('', bytes).value;
  } catch {
    return bytes;
  }
}
