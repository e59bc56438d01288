/**
 * Streamer from Node: `Worker` runs actions, `Client` asks for them. In browsers, and wherever
 * gRPC does not reach, use `streamer-client/websocket`; to test a handler without a server,
 * `streamer-client/testing`.
 */

export { Worker } from './worker.js';
export { Context } from './worker-context.js';
export { Cancelled, FatalError, HandlerError, InvalidPayload } from './worker-errors.js';
export { Client } from './client.js';
export { CallError, tokenFile } from './grpc.js';
export { OutputBuffer } from './events.js';
export { Payload, RawJson } from './payload.js';
export {
  ConnectionClosed,
  IntegrityError,
  LimitError,
  RequestCancelled,
  RequestFailed,
  StreamerError,
} from './errors.js';
