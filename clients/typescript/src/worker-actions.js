/** Declarations of actions. The server checks the remaining rules. */

import { checkSize } from './errors.js';

/**
 * Runs one attempt of an action.
 * @callback Handler
 * @param {import('./worker-context.js').Context} context
 * @param {any} payload Parsed JSON; `context.payloadText` and `context.payloadBytes` are exact.
 * @returns {unknown} The result, or a promise of it: a JSON-encodable value.
 */

/**
 * Declaration of an action. Times are milliseconds.
 * @typedef {object} ActionOptions
 * @property {string} [description] Description for people.
 * @property {boolean} [sync] Whether the call returns the result, without log, retry and resume.
 *   Default `false`.
 * @property {number} [estimatedDurationMs] Usual duration of a run; default 60,000, or 10 if
 *   `sync`. Below the server's threshold (5,000 by default) an action is sync.
 * @property {number} [maxAttempts] Default 3.
 * @property {number} [startToCloseMs] Longest run of one attempt; default no limit.
 * @property {number} [heartbeatTimeoutMs] Longest time without a report from a running handler;
 *   default no limit.
 * @property {number} [scheduleToStartMs] Longest wait for the first attempt; default no limit.
 * @property {number} [scheduleToCloseMs] Longest time for all attempts together; default no limit.
 * @property {number} [initialBackoffMs] Bound of the first wait between attempts, doubled each
 *   time; default set by the server.
 * @property {number} [maxBackoffMs] Largest bound of such a wait.
 * @property {string[]} [finalErrors] Error codes that are not retried.
 * @property {string} [permission] Permission that a caller needs; default none.
 * @property {number} [maxConcurrency] Most runs at the same time on one processor; default no
 *   limit.
 * @property {object | string} [payloadSchema] JSON Schema (2020-12) that payloads must match.
 */

const NUMBERS = /** @type {const} */ ([
  'estimatedDurationMs',
  'maxAttempts',
  'startToCloseMs',
  'heartbeatTimeoutMs',
  'scheduleToStartMs',
  'scheduleToCloseMs',
  'initialBackoffMs',
  'maxBackoffMs',
  'maxConcurrency',
]);

/** Longest description, in bytes. */
const MAX_DESCRIPTION_BYTES = 4096;
/** Largest JSON Schema, in bytes. */
const MAX_SCHEMA_BYTES = 256 * 1024;

/** Default threshold of the server from which an action is async, in milliseconds. */
const SYNC_THRESHOLD_MS = 5000;

/**
 * @param {string} name
 * @param {ActionOptions} options
 * @returns {object} The `Action` message.
 * @throws {TypeError} If the name or a number is invalid.
 * @throws {import('./errors.js').LimitError} If the description or the schema is too large.
 */
export function declaration(name, options) {
  if (!/^[a-z][a-z0-9_.-]{0,63}$/.test(name)) {
    throw new TypeError(`action must match [a-z][a-z0-9_.-]{0,63}, is ${JSON.stringify(name)}`);
  }
  const declared = /** @type {Record<string, unknown>} */ ({ name });
  for (const field of NUMBERS) {
    const value = options[field];
    if (value === undefined) continue;
    if (!Number.isSafeInteger(value) || value < 0) {
      throw new TypeError(`${name}: ${field} must be a non-negative integer, is ${value}`);
    }
    declared[field] = value;
  }
  const { sync = false, estimatedDurationMs, payloadSchema = '', finalErrors = [] } = options;
  if (sync && estimatedDurationMs !== undefined && estimatedDurationMs >= SYNC_THRESHOLD_MS) {
    throw new TypeError(`${name}: a sync action must take less than ${SYNC_THRESHOLD_MS} ms`);
  }
  const schema = typeof payloadSchema === 'string' ? payloadSchema : JSON.stringify(payloadSchema);
  const description = (options.description ?? '').toWellFormed();
  const { permission = '' } = options;
  checkSize(`${name}: description`, Buffer.byteLength(description), MAX_DESCRIPTION_BYTES);
  checkSize(`${name}: payloadSchema`, Buffer.byteLength(schema), MAX_SCHEMA_BYTES);
  const codes = finalErrors.map((code) => `ERROR_CODE_${code}`);
  return { ...declared, sync, description, permission, finalErrors: codes, payloadSchema: schema };
}
