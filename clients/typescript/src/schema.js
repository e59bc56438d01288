/**
 * The protocol buffers, loaded at run time: from `proto/` in the published package, else from the
 * source tree that this file stands in. int64 values come as strings, bytes as Buffers.
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
if (!folder) throw new Error(`no ${FILES[0]} in ${folders.join(' nor in ')}`);

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

/** The client classes of the services. */
export const RouterService = root.router.v1.RouterService;
export const ProgressService = root.progress.v1.ProgressService;
export const WorkerService = root.processor.v1.WorkerService;

/**
 * Reads one message.
 * @param {string} type Its full name.
 * @param {Uint8Array} bytes
 * @returns {any}
 */
export function decode(type, bytes) {
  return /** @type {any} */ (definition[type]).deserialize(Buffer.from(bytes));
}
