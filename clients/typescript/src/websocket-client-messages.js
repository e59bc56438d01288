/** Encodes the client's messages of `streamer.v1.json`. No dependencies; runs in browsers. */

import { toJson } from './payload.js';

/**
 * @typedef {object} Accepted
 * @property {string} requestId
 * @property {string} uid The server's ID of the request.
 * @property {boolean} duplicate Whether the `id` was submitted before, so that no new request was
 *   created.
 * @property {import('./events.js').QueuePosition | null} queuePosition Position in the queue;
 *   `null` unless the request is queued and due.
 */

/**
 * @typedef {object} RequestOptions
 * @property {string} [id] Idempotency and correlation key: 1 to 128 characters from
 *   `[A-Za-z0-9._:@/+=-]`. Random by default.
 * @property {number} [priority] Priority, 0 (default) to 9; a higher priority runs first.
 * @property {string} [traceparent] W3C trace context of the caller.
 * @property {string} [tracestate] W3C `tracestate` that belongs to `traceparent`.
 * @property {number} [delayMs] Delay before the earliest start: 0 to 30 days, in milliseconds.
 * @property {object | import('./payload.js').RawJson} [metadata] Metadata to store with the
 *   request; at most 16 KiB of JSON.
 * @property {AbortSignal} [signal] Aborting it requests cancellation; the promise still settles
 *   when the request ends.
 * @property {(accepted: Accepted) => void} [onAccepted] Called when the request is durable. Not
 *   called for a sync action.
 */

/**
 * @param {string} type
 * @param {object} members
 * @returns {string}
 */
export function message(type, members) {
  return JSON.stringify({ type, ...members });
}

/**
 * @param {string} id
 * @param {string} action
 * @param {unknown} payload
 * @param {RequestOptions & {mode?: string}} options
 * @returns {string} The message, in which `RawJson` values are unchanged.
 */
export function requestFrame(id, action, payload, options) {
  const { metadata, priority, delayMs, mode, traceparent, tracestate } = options;
  const trace = { traceparent, tracestate };
  const head = message('request', { id, action, priority, delay_ms: delayMs, mode, ...trace });
  const rest = [`"payload":${toJson(payload, 'payload')}`];
  if (metadata !== undefined) rest.push(`"metadata":${toJson(metadata, 'metadata')}`);
  return `${head.slice(0, -1)},${rest.join(',')}}`;
}

/** @returns {string} A random UUID; `crypto.randomUUID` is missing on insecure origins. */
export function randomId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const digits = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}
