/** A server with a worker and a client, which most tests use. */

import { Client } from '../../src/index.js';
import { Server } from './server.js';
import { withTimeout } from './wait.js';
import { quietWorker } from './worker.js';

/**
 * Resolves once a worker offers the given action.
 * @param {Client} client
 * @param {string} name
 */
export async function waitForAction(client, name) {
  const poll = async () => {
    for (;;) {
      const actions = await client.actions();
      if (actions.some((action) => action.name === name && action.workers > 0)) return;
    }
  };
  await withTimeout(poll(), `action ${name}`);
}

/**
 * @param {(worker: import('../../src/index.js').Worker) => void} declare Declares the actions.
 * @param {string[]} settings Settings of the server.
 */
export async function startFixture(declare, ...settings) {
  const server = await Server.start(...settings);
  const worker = quietWorker(server.url, server.token('worker:*', 'worker'), { slots: 100 });
  declare(worker);
  worker.action('ready', () => null);
  const serving = worker.serve();
  const client = new Client({ server: server.url, token: server.token('') });
  await waitForAction(client, 'ready');
  const stop = async () => {
    await worker.stop(0);
    await serving;
    client.close();
    await server.stop();
  };
  return { server, worker, client, stop };
}

/**
 * @param {import('../../src/client.js').Client} client
 * @param {string} requestId
 * @returns {Promise<import('../../src/events.js').Event[]>} The complete, verified log.
 */
export async function readLog(client, requestId) {
  const events = [];
  for await (const event of client.watch(requestId)) events.push(event);
  return events;
}
