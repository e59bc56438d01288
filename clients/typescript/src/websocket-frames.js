/** What the client sends under `streamer.v1.json`. No dependencies; runs in browsers. */

import { toJson } from './payload.js';

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
 * @param {import('./websocket.js').RequestOptions & {mode?: string}} options
 * @returns {string} Payload and metadata as the JSON text they are.
 */
export function requestFrame(id, action, payload, { metadata, priority, delayMs, mode }) {
  const head = message('request', { id, action, priority, delay_ms: delayMs, mode });
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
