/**
 * Streamer for Node: `Worker` runs actions, `Client` submits requests. Use
 * `streamer-client/websocket` in browsers and where gRPC is not available, and
 * `streamer-client/testing` to test a handler without a server.
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
