/** Errors that handlers throw. */

import { LimitError, StreamerError } from './errors.js';
import { JSON_TYPE, toJson } from './payload.js';

/** Valid values of `code`. */
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

/** Maximum length of an error message, in bytes; longer messages are truncated. */
const MAX_MESSAGE_BYTES = 4096;
/** Maximum size of the details of an error, in bytes; larger details are omitted. */
const MAX_DETAILS_BYTES = 64 * 1024;

/** The attempt failed. The error is retryable by default. */
export class HandlerError extends StreamerError {
  /**
   * @param {string} message Human-readable message; stored in the request and shown to the caller.
   * @param {object} [options]
   * @param {boolean} [options.retryable] Whether another attempt may succeed; default `true`.
   * @param {string} [options.code] One of the error codes; default `PROCESSING_FAILED`.
   * @param {object | null} [options.details] A JSON object with details; omitted if it exceeds
   *   64 KiB or cannot be encoded as JSON.
   * @param {unknown} [options.cause] The error that caused this one; not sent to the server.
   */
  constructor(message, { retryable = true, code = 'PROCESSING_FAILED', details, cause } = {}) {
    if (!CODES.has(code)) {
      throw new TypeError(`code must be one of ${[...CODES].join(', ')}, is ${code}`);
    }
    super(message, { retryable, code, details, cause });
  }
}

/** The request failed: no other attempt can succeed. */
export class FatalError extends HandlerError {
  /**
   * @param {string} message
   * @param {{code?: string, details?: object | null, cause?: unknown}} [options]
   */
  constructor(message, options = {}) {
    super(message, { ...options, retryable: false });
  }
}

/** The payload is invalid: `VALIDATION_ERROR`, not retried. */
export class InvalidPayload extends HandlerError {
  /**
   * @param {string} field Path of the field: `rows[3].name`.
   * @param {string} rule The rule, and the violation: `must be positive, is -1`.
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
 * The handler must end, or has ended: the request was cancelled, or this worker no longer owns the
 * attempt. This error is the reason of `context.signal`.
 */
export class Cancelled extends HandlerError {
  /** @param {string} [reason] */
  constructor(reason = '') {
    super(reason || 'cancelled', { retryable: false, code: 'CANCELLED' });
  }
}

/**
 * Returns the error of an attempt whose handler threw `thrown`.
 * @param {unknown} thrown
 * @param {boolean} cancelled Whether the request was cancelled.
 * @returns {HandlerError}
 */
export function handlerError(thrown, cancelled) {
  if (thrown instanceof Cancelled && !cancelled) {
    return new HandlerError(`the handler threw Cancelled: ${thrown.message}`);
  }
  if (thrown instanceof HandlerError) return thrown;
  if (cancelled) return new Cancelled(describe(thrown));
  if (thrown instanceof LimitError) return new FatalError(thrown.message);
  return new HandlerError(describe(thrown), { cause: thrown });
}

/** @param {unknown} thrown */
function describe(thrown) {
  if (!(thrown instanceof Error)) return String(thrown);
  return thrown.name === 'Error' ? thrown.message : `${thrown.name}: ${thrown.message}`;
}

/**
 * Returns the `Error` message of the protocol.
 * @param {HandlerError} error
 */
export function errorReport(error) {
  const details = detailsOf(error);
  return {
    code: `ERROR_CODE_${error.code}`,
    message: truncate(String(error.message || error.name)),
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
 * @returns {string} Well-formed text: a lone surrogate cannot be encoded as UTF-8.
 */
function truncate(text) {
  const bytes = Buffer.from(text);
  if (bytes.length <= MAX_MESSAGE_BYTES) return text.toWellFormed();
  // Removes an incomplete character at the end.
  return bytes
    .subarray(0, MAX_MESSAGE_BYTES)
    .toString()
    .replace(/\uFFFD$/, '');
}
