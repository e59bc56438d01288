/** What a handler throws to say how its attempt ended. */

import { LimitError, StreamerError } from './errors.js';
import { JSON_TYPE, toJson } from './payload.js';

/** What a handler may give as `code`. */
const CODES = new Set([
  'VALIDATION_ERROR',
  'INVALID_ACTION',
  'UNAUTHORIZED',
  'FORBIDDEN',
  'NOT_FOUND',
  'CONFLICT',
  'RATE_LIMITED',
  'TIMEOUT',
  'CANCELLED',
  'PROCESSING_FAILED',
  'UNAVAILABLE',
  'INTERNAL_ERROR',
]);

/** Longest message of an error, in bytes; the rest is cut off. */
const MAX_MESSAGE_BYTES = 4096;
/** Largest details of an error, in bytes; larger ones are left out. */
const MAX_DETAILS_BYTES = 64 * 1024;

/** The attempt failed. Without more, another attempt may do better. */
export class HandlerError extends StreamerError {
  /**
   * @param {string} message For people; it is kept with the request and shown to its caller.
   * @param {object} [options]
   * @param {boolean} [options.retryable] Whether another attempt may do better; default `true`.
   * @param {string} [options.code] One of the error codes; default `PROCESSING_FAILED`.
   * @param {object | null} [options.details] A JSON object with more; left out when it is over
   *   64 KiB or cannot be written as JSON.
   * @param {unknown} [options.cause] What brought it about; it stays in this process.
   */
  constructor(message, { retryable = true, code = 'PROCESSING_FAILED', details, cause } = {}) {
    if (!CODES.has(code)) throw new TypeError(`${code} is none of ${[...CODES].join(', ')}`);
    super(message, { retryable, code, details, cause });
  }
}

/** The request failed: no other attempt could do better. */
export class FatalError extends HandlerError {
  /**
   * @param {string} message
   * @param {{code?: string, details?: object | null, cause?: unknown}} [options]
   */
  constructor(message, options = {}) {
    super(message, { ...options, retryable: false });
  }
}

/** The payload breaks a rule: `VALIDATION_ERROR`, not retried. */
export class InvalidPayload extends HandlerError {
  /**
   * @param {string} field Path of the field: `rows[3].name`.
   * @param {string} rule The rule, and how it is broken: `must be positive, is -1`.
   */
  constructor(field, rule) {
    super(`${field}: ${rule}`, {
      retryable: false,
      code: 'VALIDATION_ERROR',
      details: { violations: [{ field, description: rule }] },
    });
  }
}

/**
 * The handler should end, or has: cancellation was asked for, or the attempt is not this
 * worker's any more. It is the reason of `context.signal`.
 */
export class Cancelled extends HandlerError {
  /** @param {string} [reason] */
  constructor(reason = '') {
    super(reason || 'cancelled', { retryable: false, code: 'CANCELLED' });
  }
}

/**
 * How an attempt ended in whose handler this was thrown.
 * @param {unknown} thrown
 * @param {boolean} cancelled Whether cancellation was asked for.
 * @returns {HandlerError}
 */
export function handlerError(thrown, cancelled) {
  if (thrown instanceof Cancelled && !cancelled) {
    return new HandlerError(`the handler gave up: ${thrown.message}`);
  }
  if (thrown instanceof HandlerError) return thrown;
  if (cancelled) return new Cancelled(message(thrown));
  if (thrown instanceof LimitError) return new FatalError(thrown.message);
  return new HandlerError(message(thrown), { cause: thrown });
}

/** @param {unknown} thrown */
function message(thrown) {
  if (!(thrown instanceof Error)) return String(thrown);
  return thrown.name === 'Error' ? thrown.message : `${thrown.name}: ${thrown.message}`;
}

/**
 * As the protocol has it.
 * @param {HandlerError} error
 */
export function errorReport(error) {
  const details = detailsOf(error);
  return {
    code: `ERROR_CODE_${error.code}`,
    message: cut(String(error.message || error.name)),
    retryable: error.retryable,
    details: details && { contentType: JSON_TYPE, data: details },
  };
}

/**
 * @param {HandlerError} error
 * @returns {Buffer | null}
 */
function detailsOf({ details }) {
  if (!details) return null;
  try {
    const bytes = Buffer.from(toJson(details));
    return bytes.length <= MAX_DETAILS_BYTES ? bytes : null;
  } catch {
    return null;
  }
}

/**
 * @param {string} text
 * @returns {string} Well-formed: a lone surrogate has no UTF-8.
 */
function cut(text) {
  const bytes = Buffer.from(text);
  if (bytes.length <= MAX_MESSAGE_BYTES) return text.toWellFormed();
  // A character that is cut in two at the end is dropped.
  return bytes
    .subarray(0, MAX_MESSAGE_BYTES)
    .toString()
    .replace(/\uFFFD$/, '');
}
