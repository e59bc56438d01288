/** Workers that do not log. */

import { Worker } from '../../src/index.js';

/**
 * @param {string} url
 * @param {import('../../src/grpc.js').TokenSource} token
 * @param {Partial<import('../../src/worker.js').WorkerOptions>} [options]
 */
export function quietWorker(url, token, options = {}) {
  return new Worker({ server: url, token, log: () => {}, ...options });
}
