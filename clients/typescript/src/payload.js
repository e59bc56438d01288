/**
 * Payloads: bytes with a content type, which the server passes through unchanged. JSON numbers
 * above 2^53 lose precision in JavaScript, so every payload can also be read as text, and JSON text
 * can be sent unchanged. No dependencies; runs in browsers.
 */

export const JSON_TYPE = 'application/json';
export const TEXT_TYPE = 'text/plain';
export const BINARY_TYPE = 'application/octet-stream';

const encoder = new TextEncoder();
const decoder = new TextDecoder('utf-8', { ignoreBOM: true });

/** JSON text that is sent unchanged: `new RawJson('{"n":9223372036854775807}')`. */
export class RawJson {
  /**
   * @param {string} text Well-formed JSON.
   * @throws {SyntaxError} If `text` is not well-formed.
   */
  constructor(text) {
    JSON.parse(text);
    this.text = text;
  }
}

/** Payload: bytes with a content type. */
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

  /** The bytes decoded as UTF-8. */
  get text() {
    return decoder.decode(this.bytes);
  }

  /**
   * The decoded value: parsed JSON, text as a string, anything else as bytes.
   * @returns {any}
   * @throws {SyntaxError} If the content type is JSON and the bytes are not.
   */
  get value() {
    if (this.contentType === JSON_TYPE) return JSON.parse(this.text);
    return this.contentType.startsWith('text/') ? this.text : this.bytes;
  }
}

/**
 * @param {string} text
 * @returns {Uint8Array} The text encoded as UTF-8.
 */
export function utf8(text) {
  return encoder.encode(text);
}

/**
 * Encodes a value as JSON text. `undefined` becomes `null`.
 * @param {unknown} value A value that `JSON.stringify` accepts, or a {@link RawJson}.
 * @param {string} [name] Name of the value in error messages.
 * @returns {string}
 * @throws {TypeError} If the value cannot be encoded as JSON.
 */
export function toJson(value, name = 'value') {
  if (value === undefined) return 'null';
  if (value instanceof RawJson) return value.text;
  if (value instanceof Uint8Array) throw new TypeError(`${name} must be JSON, not bytes`);
  let text;
  try {
    text = JSON.stringify(value);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new TypeError(`${name} cannot be encoded as JSON: ${reason}`, { cause: error });
  }
  if (text === undefined) throw new TypeError(`${name} cannot be encoded as JSON`);
  return text;
}

/**
 * @param {unknown} value A `Payload` (unchanged), bytes (`application/octet-stream`), or a value to
 *   encode as JSON.
 * @param {string} [name] Name of the value in error messages.
 * @returns {Payload}
 */
export function toPayload(value, name) {
  if (value instanceof Payload) return value;
  if (value instanceof Uint8Array) return new Payload(BINARY_TYPE, value);
  return new Payload(JSON_TYPE, utf8(toJson(value, name)));
}

/**
 * @param {unknown} value Same as for {@link toPayload}, but a string is `text/plain`.
 * @returns {Payload}
 */
export function toChunk(value) {
  if (typeof value === 'string') return new Payload(TEXT_TYPE, utf8(value));
  return toPayload(value, 'output');
}
