/**
 * Values that cross the system untouched: bytes with a content type. JSON numbers beyond 2^53
 * lose digits in JavaScript, so every payload can be read as the text it is, and JSON text can
 * be sent as it is. No dependencies; runs in browsers.
 */

export const JSON_TYPE = 'application/json';
export const TEXT_TYPE = 'text/plain';
export const BINARY_TYPE = 'application/octet-stream';

const encoder = new TextEncoder();
const decoder = new TextDecoder('utf-8', { ignoreBOM: true });

/** JSON text that is sent as it stands: `new RawJson('{"n":9223372036854775807}')`. */
export class RawJson {
  /**
   * @param {string} text Well-formed JSON.
   * @throws {SyntaxError} When it is not.
   */
  constructor(text) {
    JSON.parse(text);
    this.text = text;
  }
}

/** One payload, as it was received. */
export class Payload {
  /**
   * @param {string} contentType IANA media type; empty means `application/json`.
   * @param {Uint8Array} bytes
   */
  constructor(contentType, bytes) {
    this.contentType = contentType || JSON_TYPE;
    /** The exact bytes. */
    this.bytes = bytes;
  }

  /** The bytes read as UTF-8. */
  get text() {
    return decoder.decode(this.bytes);
  }

  /**
   * JSON parsed, text as a string, anything else as bytes.
   * @returns {any}
   * @throws {SyntaxError} When it says that it is JSON and is not.
   */
  get value() {
    if (this.contentType === JSON_TYPE) return JSON.parse(this.text);
    return this.contentType.startsWith('text/') ? this.text : this.bytes;
  }
}

/**
 * @param {string} text
 * @returns {Uint8Array} Its UTF-8.
 */
export function utf8(text) {
  return encoder.encode(text);
}

/**
 * Writes a value as JSON text. `undefined` becomes `null`.
 * @param {unknown} value Anything that `JSON.stringify` takes, or a {@link RawJson}.
 * @param {string} [name] What it is, for the error.
 * @returns {string}
 * @throws {TypeError} When it cannot be written as JSON.
 */
export function toJson(value, name = 'value') {
  if (value === undefined) return 'null';
  if (value instanceof RawJson) return value.text;
  if (value instanceof Uint8Array) throw new TypeError(`${name} must be JSON, not bytes`);
  let text;
  try {
    text = JSON.stringify(value);
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new TypeError(`${name} cannot be written as JSON: ${why}`, { cause: error });
  }
  if (text === undefined) throw new TypeError(`${name} cannot be written as JSON`);
  return text;
}

/**
 * @param {unknown} value A payload as it is, bytes as `application/octet-stream`, else JSON.
 * @param {string} [name] What it is, for the error.
 * @returns {Payload}
 */
export function toPayload(value, name) {
  if (value instanceof Payload) return value;
  if (value instanceof Uint8Array) return new Payload(BINARY_TYPE, value);
  return new Payload(JSON_TYPE, utf8(toJson(value, name)));
}

/**
 * @param {unknown} value As {@link toPayload}, but a string is `text/plain`.
 * @returns {Payload}
 */
export function toChunk(value) {
  if (typeof value === 'string') return new Payload(TEXT_TYPE, utf8(value));
  return toPayload(value, 'output');
}
