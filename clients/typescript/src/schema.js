/**
 * Loads the protocol buffers at run time: from `proto/` in the published package, otherwise from
 * the source tree. Values of type int64 are strings, values of type bytes are Buffers.
 */

import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { loadPackageDefinition } from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const FILES = [
  'streamer/router/v1/router.proto',
  'streamer/progress/v1/progress.proto',
  'streamer/processor/v1/worker.proto',
  'google/rpc/status.proto',
  'google/rpc/error_details.proto',
];

const folders = ['../proto/', '../../../proto/'].map((path) =>
  fileURLToPath(new URL(path, import.meta.url)),
);
const folder = folders.find((candidate) => existsSync(candidate + FILES[0]));
if (!folder) throw new Error(`${FILES[0]} not found in ${folders.join(' or ')}`);

const definition = loadSync(FILES, {
  includeDirs: [folder],
  longs: String,
  enums: String,
  bytes: Buffer,
  defaults: true,
  arrays: true,
  oneofs: true,
});
const root = /** @type {any} */ (loadPackageDefinition(definition)).streamer;

/** Client class of the router service. */
export const RouterService = root.router.v1.RouterService;
/** Client class of the progress service. */
export const ProgressService = root.progress.v1.ProgressService;
/** Client class of the worker service. */
export const WorkerService = root.processor.v1.WorkerService;

/**
 * Decodes one message.
 * @param {string} type Full name of the message type.
 * @param {Uint8Array} bytes
 * @returns {any}
 */
export function decode(type, bytes) {
  return /** @type {any} */ (definition[type]).deserialize(Buffer.from(bytes));
}
