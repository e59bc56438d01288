/**
 * The errors that both clients throw. Each has a `code`: one of the server's error codes
 * (`VALIDATION_ERROR`, `NOT_FOUND`, `UNAVAILABLE`, …) or one of this package's own
 * (`INTEGRITY`, `CLOSED`). No dependencies; runs in browsers.
 */

/**
 * @typedef {object} ErrorInit
 * @property {string} [code] Default `INTERNAL_ERROR`.
 * @property {boolean} [retryable] Whether the same may succeed when asked again; default `false`.
 * @property {unknown} [details] More, as the server or the handler gave it.
 * @property {number} [retryAfterMs] Milliseconds after which the server asks to be tried again.
 * @property {unknown} [cause] What brought it about.
 */

/** What all errors of this package are. */
export class StreamerError extends Error {
  /**
   * @param {string} message For people.
   * @param {ErrorInit} [init]
   */
  constructor(message, init = {}) {
    super(message, init.cause === undefined ? undefined : { cause: init.cause });
    this.name = new.target.name;
    /** What went wrong, in one word. */
    this.code = init.code ?? 'INTERNAL_ERROR';
    /** Whether the same may succeed when asked again unchanged. */
    this.retryable = init.retryable ?? false;
    /** @type {any} More, as a JSON value; `null` when there is none. */
    this.details = init.details ?? null;
    /** @type {number | null} Milliseconds after which to try again; `null` when not said. */
    this.retryAfterMs = init.retryAfterMs ?? this.details?.retry_after_ms ?? null;
  }

  /**
   * Every broken rule of a `VALIDATION_ERROR`; empty for others.
   * @returns {{field: string, description: string}[]}
   */
  get violations() {
    return this.details?.violations ?? [];
  }
}

/** The request ended in failure. `code`, `retryable` and `details` are its handler's. */
export class RequestFailed extends StreamerError {
  /**
   * @param {string} message
   * @param {ErrorInit & {requestId?: string, uid?: string}} [init]
   */
  constructor(message, init = {}) {
    super(message, init);
    /** The caller's id of the request. */
    this.requestId = init.requestId ?? '';
    /** The server's id of the request; empty when it is not known. */
    this.uid = init.uid ?? '';
  }
}

/** The request was cancelled; `message` is the reason that the canceller gave. */
export class RequestCancelled extends RequestFailed {
  /**
   * @param {string} reason
   * @param {ErrorInit & {requestId?: string, uid?: string}} [init]
   */
  constructor(reason, init = {}) {
    super(reason || 'cancelled', { ...init, code: 'CANCELLED' });
  }
}

/** A log does not prove itself: an event is missing, or the output is not what was produced. */
export class IntegrityError extends StreamerError {
  /** @param {string} message */
  constructor(message) {
    super(message, { code: 'INTEGRITY' });
  }
}

/** A value is larger than the server takes; it was not sent. */
export class LimitError extends StreamerError {
  /**
   * @param {string} field Which value.
   * @param {number} size Its size, in bytes.
   * @param {number} limit The largest that is allowed, in bytes.
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

/** The connection is closed for good, by this side or by the server. */
export class ConnectionClosed extends StreamerError {
  /**
   * @param {string} message
   * @param {number} [closeCode] The WebSocket's close code, 0 when there is none.
   */
  constructor(message, closeCode = 0) {
    const codes = /** @type {Record<number, string>} */ ({
      4400: 'VALIDATION_ERROR',
      4401: 'UNAUTHORIZED',
      4403: 'FORBIDDEN',
    });
    super(message, { code: codes[closeCode] ?? 'CLOSED' });
    /** The WebSocket's close code: 4400, 4401, 4403, or 0 after `close()`. */
    this.closeCode = closeCode;
  }
}

/**
 * Refuses what is too large.
 * @param {string} field
 * @param {number} size In bytes.
 * @param {number} limit In bytes.
 */
export function checkSize(field, size, limit) {
  if (size > limit) throw new LimitError(field, size, limit);
}
