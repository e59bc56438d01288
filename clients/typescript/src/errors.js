/**
 * Errors of both clients. Each has a `code`: an error code of the server (`VALIDATION_ERROR`,
 * `NOT_FOUND`, `UNAVAILABLE`, …) or of this package (`INTEGRITY`, `CLOSED`). No dependencies; runs
 * in browsers.
 */

/**
 * @typedef {object} ErrorInit
 * @property {string} [code] Error code; default `INTERNAL_ERROR`.
 * @property {boolean} [retryable] Whether the same call may succeed later; default `false`.
 * @property {unknown} [details] Details from the server or the handler.
 * @property {number} [retryAfterMs] Milliseconds to wait before a retry, if the server specified it.
 * @property {unknown} [cause] The error that caused this one.
 */

/** Base class of all errors in this package. */
export class StreamerError extends Error {
  /**
   * @param {string} message Human-readable message.
   * @param {ErrorInit} [init]
   */
  constructor(message, init = {}) {
    super(message, init.cause === undefined ? undefined : { cause: init.cause });
    this.name = new.target.name;
    /** The error code. */
    this.code = init.code ?? 'INTERNAL_ERROR';
    /** Whether the same call may succeed later, unchanged. */
    this.retryable = init.retryable ?? false;
    /** @type {any} Details as a JSON value, or `null`. */
    this.details = init.details ?? null;
    /** @type {number | null} Milliseconds to wait before a retry; `null` if not specified. */
    this.retryAfterMs = init.retryAfterMs ?? this.details?.retry_after_ms ?? null;
  }

  /**
   * Violations of a `VALIDATION_ERROR`; empty for other errors.
   * @returns {{field: string, description: string}[]}
   */
  get violations() {
    return this.details?.violations ?? [];
  }
}

/** The request failed. `code`, `retryable` and `details` are set by its handler. */
export class RequestFailed extends StreamerError {
  /**
   * @param {string} message
   * @param {ErrorInit & {requestId?: string, uid?: string}} [init]
   */
  constructor(message, init = {}) {
    super(message, init);
    /** The caller's ID of the request. */
    this.requestId = init.requestId ?? '';
    /** The server's ID of the request; empty if it is unknown. */
    this.uid = init.uid ?? '';
  }
}

/** The request was cancelled; `message` is the reason given with the cancellation. */
export class RequestCancelled extends RequestFailed {
  /**
   * @param {string} reason
   * @param {ErrorInit & {requestId?: string, uid?: string}} [init]
   */
  constructor(reason, init = {}) {
    super(reason || 'cancelled', { ...init, code: 'CANCELLED' });
  }
}

/** The received log is incomplete: an event is missing, or the output does not match its digest. */
export class IntegrityError extends StreamerError {
  /** @param {string} message */
  constructor(message) {
    super(message, { code: 'INTEGRITY' });
  }
}

/** A value exceeds a size limit of the server, and was not sent. */
export class LimitError extends StreamerError {
  /**
   * @param {string} field Name of the value.
   * @param {number} size Size, in bytes.
   * @param {number} limit Maximum size, in bytes.
   */
  constructor(field, size, limit) {
    super(`${field} must be at most ${limit} bytes, is ${size}`, {
      code: 'VALIDATION_ERROR',
      details: { violations: [{ field, description: `must be at most ${limit} bytes` }] },
    });
    this.field = field;
    this.size = size;
    this.limit = limit;
  }
}

/** The connection is permanently closed, by the client or by the server. */
export class ConnectionClosed extends StreamerError {
  /**
   * @param {string} message
   * @param {number} [closeCode] Close code of the WebSocket; 0 if there is none.
   */
  constructor(message, closeCode = 0) {
    const codes = /** @type {Record<number, string>} */ ({
      4400: 'VALIDATION_ERROR',
      4401: 'UNAUTHORIZED',
      4403: 'FORBIDDEN',
    });
    super(message, { code: codes[closeCode] ?? 'CLOSED' });
    /** Close code of the WebSocket: 4400, 4401, 4403, or 0 after `close()`. */
    this.closeCode = closeCode;
  }
}

/**
 * Throws a {@link LimitError} if a value exceeds its maximum size.
 * @param {string} field
 * @param {number} size Size of the value, in bytes.
 * @param {number} limit Maximum size, in bytes.
 */
export function checkSize(field, size, limit) {
  if (size > limit) throw new LimitError(field, size, limit);
}
