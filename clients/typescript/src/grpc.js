/** Channels, tokens and error mapping for the gRPC client and the worker. */

import { readFile } from 'node:fs/promises';

import { Metadata, credentials, status } from '@grpc/grpc-js';

import { StreamerError } from './errors.js';
import { decode } from './schema.js';
import { traceHeaders } from './tracing.js';

/** @typedef {string | (() => string | Promise<string>)} TokenSource */

/**
 * @typedef {object} Endpoint
 * @property {string} server `http://host:port`, or `https://host:port` for TLS.
 * @property {import('@grpc/grpc-js').ChannelCredentials} [credentials] TLS credentials that replace
 *   the system's certificate authorities.
 */

/** Error codes for gRPC status codes without `google.rpc.ErrorInfo`. */
const CODES = /** @type {Record<number, string>} */ ({
  [status.CANCELLED]: 'CANCELLED',
  [status.INVALID_ARGUMENT]: 'VALIDATION_ERROR',
  [status.OUT_OF_RANGE]: 'VALIDATION_ERROR',
  [status.DEADLINE_EXCEEDED]: 'TIMEOUT',
  [status.NOT_FOUND]: 'NOT_FOUND',
  [status.ALREADY_EXISTS]: 'CONFLICT',
  [status.FAILED_PRECONDITION]: 'CONFLICT',
  [status.PERMISSION_DENIED]: 'FORBIDDEN',
  [status.UNAUTHENTICATED]: 'UNAUTHORIZED',
  [status.RESOURCE_EXHAUSTED]: 'RATE_LIMITED',
  [status.UNAVAILABLE]: 'UNAVAILABLE',
});

/** gRPC status codes after which a retry cannot succeed. */
const NON_RETRYABLE = new Set([
  status.INVALID_ARGUMENT,
  status.OUT_OF_RANGE,
  status.NOT_FOUND,
  status.ALREADY_EXISTS,
  status.FAILED_PRECONDITION,
  status.PERMISSION_DENIED,
  status.UNAUTHENTICATED,
  status.UNIMPLEMENTED,
  status.DATA_LOSS,
]);

/** A gRPC call failed. */
export class CallError extends StreamerError {
  /**
   * @param {string} message
   * @param {import('./errors.js').ErrorInit & {status?: number}} init
   */
  constructor(message, init) {
    super(message, init);
    /** The gRPC status code. */
    this.status = init.status ?? status.UNKNOWN;
  }

  /** Whether a retry of the call may succeed. */
  get transient() {
    return !NON_RETRYABLE.has(this.status);
  }
}

/**
 * @param {string} server
 * @returns {{address: string, secure: boolean}}
 * @throws {TypeError} If `server` is not an `http://` or `https://` URL.
 */
export function parseServer(server) {
  const url = URL.canParse(server) ? new URL(server) : null;
  if (url?.protocol !== 'http:' && url?.protocol !== 'https:') {
    throw new TypeError(`server must be http://host:port or https://host:port, is ${server}`);
  }
  const secure = url.protocol === 'https:';
  return { address: `${url.hostname}:${url.port || (secure ? '443' : '80')}`, secure };
}

/**
 * Opens a channel.
 * @template T
 * @param {new (address: string, credentials: any, options: object) => T} Service
 * @param {Endpoint} endpoint
 * @param {object} [options] Additional channel options.
 * @returns {T}
 */
export function connect(Service, endpoint, options = {}) {
  const { address, secure } = parseServer(endpoint.server);
  const defaults = secure ? credentials.createSsl() : credentials.createInsecure();
  return new Service(address, endpoint.credentials ?? defaults, {
    'grpc.max_receive_message_length': -1,
    'grpc.max_send_message_length': -1,
    'grpc.initial_reconnect_backoff_ms': 100,
    'grpc.max_reconnect_backoff_ms': 5000,
    'grpc.keepalive_time_ms': 30_000,
    'grpc.keepalive_timeout_ms': 10_000,
    ...options,
  });
}

/**
 * Returns a token source that reads a file each time a token is needed. Use it for a file that a
 * sidecar or a mounted secret keeps up to date.
 * @param {string | URL} path
 * @returns {() => Promise<string>}
 */
export function tokenFile(path) {
  return () => readFile(path, 'utf8');
}

/**
 * @param {TokenSource} source
 * @returns {Promise<string>} The current token.
 * @throws {CallError} `UNAUTHENTICATED` if the token is malformed. Unlike the error of grpc-js, the
 *   message does not contain the token.
 */
export async function freshToken(source) {
  const value = typeof source === 'function' ? await source() : source;
  const token = typeof value === 'string' ? value.trim() : '';
  if (!/^[\x21-\x7e]+$/.test(token)) {
    const rule = 'a string, or a function that returns one, of visible ASCII characters';
    throw new CallError(`token must be ${rule}`, {
      code: 'UNAUTHORIZED',
      status: status.UNAUTHENTICATED,
    });
  }
  return token;
}

/**
 * @param {TokenSource} source
 * @returns {Promise<Metadata>} The metadata of a call: the token and the trace context.
 */
export async function authorization(source) {
  const metadata = new Metadata();
  metadata.set('authorization', `Bearer ${await freshToken(source)}`);
  for (const [name, value] of Object.entries(traceHeaders())) metadata.set(name, value);
  return metadata;
}

/**
 * Returns the error of a failed call, with code and details from `google.rpc.ErrorInfo`.
 * @param {any} error An error of grpc-js.
 * @returns {CallError}
 */
export function callError(error) {
  if (error instanceof CallError) return error;
  const details = readDetails(error);
  const info = details['google.rpc.ErrorInfo'];
  const delay = details['google.rpc.RetryInfo']?.retryDelay;
  const violations = details['google.rpc.BadRequest']?.fieldViolations;
  const number = typeof error?.code === 'number' ? error.code : status.UNKNOWN;
  const errorDetails = info?.metadata?.details ? parse(info.metadata.details) : null;
  return new CallError(error?.details || error?.message || String(error), {
    code: info?.reason || CODES[number] || 'INTERNAL_ERROR',
    retryable: info?.metadata?.retryable
      ? info.metadata.retryable === 'true'
      : !NON_RETRYABLE.has(number),
    details: errorDetails ?? (violations?.length ? { violations } : null),
    retryAfterMs: delay ? Number(delay.seconds) * 1000 + delay.nanos / 1e6 : undefined,
    status: number,
    cause: error,
  });
}

/** @param {string} text */
function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/**
 * @param {any} error
 * @returns {Record<string, any>} The status details of known types, by type.
 */
function readDetails(error) {
  const found = /** @type {Record<string, any>} */ ({});
  const [bytes] = error?.metadata?.get?.('grpc-status-details-bin') ?? [];
  if (!(bytes instanceof Uint8Array)) return found;
  try {
    for (const any of decode('google.rpc.Status', bytes).details) {
      // The loader does not convert the field names of `Any` to camel case.
      const type = any.type_url.split('/').pop();
      if (/^google\.rpc\.(ErrorInfo|RetryInfo|BadRequest)$/.test(type)) {
        found[type] = decode(type, any.value);
      }
    }
  } catch {
    // Details are optional: the status code is sufficient.
  }
  return found;
}
