/** Declarations of actions. The server checks the rules that this module does not check. */

import { checkSize } from './errors.js';

/**
 * Runs one attempt of an action.
 * @callback Handler
 * @param {import('./worker-context.js').Context} context
 * @param {any} payload Parsed JSON; `context.payloadText` and `context.payloadBytes` are exact.
 * @returns {unknown} The result, or a promise of it: a JSON-encodable value.
 */

/**
 * Declaration of an action. Times are in milliseconds.
 * @typedef {object} ActionOptions
 * @property {string} [description] Human-readable description.
 * @property {boolean} [sync] Whether a call returns the result directly, without a log, retries or
 *   resumption; default `false`.
 * @property {number} [estimatedDurationMs] Typical duration of a run; default 60,000, or 10 if
 *   `sync`. If it is below the server's threshold (5,000 by default), the action is sync.
 * @property {number} [maxAttempts] Maximum number of attempts; default 3.
 * @property {number} [startToCloseMs] Maximum duration of one attempt; default no limit.
 * @property {number} [heartbeatTimeoutMs] Maximum time between reports of a running handler;
 *   default no limit.
 * @property {number} [scheduleToStartMs] Maximum time before the first attempt; default no limit.
 * @property {number} [scheduleToCloseMs] Maximum total time of all attempts; default no limit.
 * @property {number} [initialBackoffMs] Initial bound of the wait between attempts, which doubles
 *   after each attempt; default set by the server.
 * @property {number} [maxBackoffMs] Maximum bound of the wait between attempts.
 * @property {string[]} [finalErrors] Error codes that are not retried.
 * @property {string} [permission] Permission that a caller requires; default none.
 * @property {number} [maxConcurrency] Maximum number of concurrent runs on one processor; default
 *   no limit.
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

/** Maximum length of a description, in bytes. */
const MAX_DESCRIPTION_BYTES = 4096;
/** Maximum size of a JSON Schema, in bytes. */
const MAX_SCHEMA_BYTES = 256 * 1024;

/** Default of the server's sync threshold, from which an action is async, in milliseconds. */
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
    // In the protocol, 0 stands for the default.
    if (field === 'maxAttempts' && value === 0) {
      throw new TypeError(`${name}: maxAttempts must be at least 1`);
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
