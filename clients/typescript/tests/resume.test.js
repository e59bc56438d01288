/** Tests that attempts survive broken streams, a killed server and a stopped worker. */

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { after, before, test } from 'node:test';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

import { Client, OutputBuffer } from '../src/index.js';
import { waitForAction, readLog } from './support/fixture.js';
import { Proxy } from './support/proxy.js';
import { KILLED_WITH_TESTS, Server } from './support/server.js';
import { Deferred, withTimeout } from './support/wait.js';
import { quietWorker } from './support/worker.js';

/** @type {Server} */
let server;
/** @type {Client} */
let client;

before(async () => {
  // The lease is longer than a restart of the server.
  server = await Server.start('execution.lease_duration=10000ms');
  client = new Client({ server: server.url, token: server.token('') });
});
after(async () => {
  client.close();
  await server.stop();
});

/**
 * Starts a worker whose action waits for a gate between two parts of its output; stops the worker
 * after the test.
 * @param {import('node:test').TestContext} t
 * @param {string} url
 * @param {string} action
 * @param {import('../src/grpc.js').TokenSource} [token]
 */
async function gatedWorker(t, url, action, token = server.token('worker:*', 'worker')) {
  const gate = new Deferred('the gate');
  const halfway = new Deferred('half of the output');
  /** @type {string[]} */
  const logged = [];
  const log = (/** @type {string} */ level, /** @type {string} */ text) =>
    void logged.push(`${level}: ${text}`);
  const worker = quietWorker(url, token, { log });
  worker.action(action, async (context) => {
    for (let number = 0; number < 20; number += 1) await context.output(`${number};`);
    halfway.resolve(context.attempt);
    await gate.promise;
    for (let number = 20; number < 40; number += 1) await context.output(`${number};`);
    await context.saveCheckpoint({ number: 40 });
    return { attempt: context.attempt };
  });
  worker.serve().catch(() => {});
  t.after(() => worker.stop(0));
  await waitForAction(client, action);
  return { gate, halfway, logged };
}

/** @param {import('node:test').TestContext} t */
async function startProxy(t) {
  const proxy = await Proxy.start(server.url);
  t.after(() => proxy.stop());
  return proxy;
}

const forty = Array.from({ length: 40 }, (_, number) => `${number};`).join('');

/**
 * @param {string} requestId
 * @param {number} attempts
 */
async function assertCompleteLog(requestId, attempts) {
  const log = await readLog(client, requestId);
  const output = new OutputBuffer();
  for (const event of log) output.apply(event);
  assert.equal(output.text, forty);
  assert.equal(log.filter((event) => event.type === 'started').length, attempts);
  assert.equal(log.filter((event) => event.type === 'output').length, 40);
}

test('an attempt survives a broken worker stream, and reports nothing twice', async (t) => {
  const proxy = await startProxy(t);
  const { gate, halfway } = await gatedWorker(t, `http://${proxy.address}`, 'cut');
  const run = client.run('cut', {}, { id: 'cut-1' });
  await halfway.wait();
  proxy.block();
  gate.resolve();
  // The handler reports while no stream is open.
  await new Promise((resolve) => setImmediate(resolve));
  proxy.unblock();
  assert.deepEqual(await withTimeout(run, 'the result'), { attempt: 1 });
  await assertCompleteLog('cut-1', 1);
});

test('a caller resumes after a broken stream, and sees every event once', async (t) => {
  const proxy = await startProxy(t);
  const { gate, halfway } = await gatedWorker(t, server.url, 'watched');
  const token = server.token('');
  const caller = new Client({ server: `http://${proxy.address}`, token });
  t.after(() => caller.close());
  const output = new OutputBuffer();
  const half = new Deferred('half of the output at the caller');
  let chunks = 0;
  const onOutput = () => void ((chunks += 1) === 20 && half.resolve());
  const run = caller.run('watched', {}, { output, onOutput });
  await halfway.wait();
  await half.wait();
  proxy.disconnect();
  gate.resolve();
  assert.deepEqual(await withTimeout(run, 'the result'), { attempt: 1 });
  assert.equal(output.text, forty);
  assert.equal(chunks, 40);
});

test('many attempts and their callers survive repeated disconnects', async (t) => {
  const [workers, callers] = [await startProxy(t), await startProxy(t)];
  const worker = quietWorker(`http://${workers.address}`, server.token('worker:*', 'worker'));
  const bothDisconnected = new Deferred('a disconnect of both streams');
  worker.action('through', { maxAttempts: 20, initialBackoffMs: 1 }, async (context) => {
    for (let number = 0; number < 40; number += 1) {
      await context.output(`${number};`);
      // No attempt ends before both sides have reconnected.
      if (number === 20) await bothDisconnected.promise;
      if (number % 10 === 0) await context.saveCheckpoint({ number });
    }
    return context.attempt;
  });
  worker.serve().catch(() => {});
  t.after(() => worker.stop(0));
  await waitForAction(client, 'through');
  const caller = new Client({ server: `http://${callers.address}`, token: server.token('') });
  t.after(() => caller.close());
  let seen = 0;
  const onOutput = () => {
    seen += 1;
    if (seen % 50 === 0) workers.disconnect();
    if (seen % 70 === 0) callers.disconnect();
    if (seen === 70) bothDisconnected.resolve();
  };
  const runs = Array.from({ length: 10 }, async () => {
    const output = new OutputBuffer();
    // A task that is lost with the stream before the worker receives it counts as an attempt.
    assert.ok((await caller.run('through', {}, { output, onOutput })) >= 1);
    assert.equal(output.text, forty);
  });
  await withTimeout(Promise.all(runs), 'all results');
  assert.ok(workers.connections > 1 && callers.connections > 1);
});

test('an attempt survives a killed and restarted server', async (t) => {
  const { gate, halfway } = await gatedWorker(t, server.url, 'killed');
  const run = client.run('killed', {}, { id: 'killed-1' });
  await halfway.wait();
  await server.kill('SIGKILL');
  gate.resolve();
  await server.start();
  assert.deepEqual(await withTimeout(run, 'the result'), { attempt: 1 });
  await assertCompleteLog('killed-1', 1);
});

test('an attempt survives a graceful restart of the server', async (t) => {
  const { gate, halfway } = await gatedWorker(t, server.url, 'drained');
  const { requestId } = await client.submit('drained', {}, { id: 'drained-1' });
  await halfway.wait();
  await server.kill('SIGTERM');
  await server.start();
  gate.resolve();
  assert.deepEqual(await withTimeout(client.wait(requestId), 'the result'), { attempt: 1 });
  await assertCompleteLog('drained-1', 1);
});

test('a token is renewed on the same stream before it expires', async (t) => {
  let tokens = 0;
  const renewed = new Deferred('a second token');
  const token = () => {
    tokens += 1;
    if (tokens === 2) renewed.resolve();
    return server.token('worker:*', 'worker', tokens === 1 ? '3s' : '1h');
  };
  const { gate, logged } = await gatedWorker(t, server.url, 'renewed', token);
  await renewed.wait();
  gate.resolve();
  assert.deepEqual(await client.run('renewed'), { attempt: 1 });
  assert.deepEqual(
    logged.filter((line) => line.startsWith('warn')),
    [],
  );
});

test('a worker without permission is rejected', async () => {
  const worker = quietWorker(server.url, server.token('worker:other', 'worker'));
  worker.action('forbidden', () => null);
  await assert.rejects(worker.serve(), { name: 'CallError', code: 'FORBIDDEN' });
});

/**
 * @param {import('node:test').TestContext} t
 * @param {string[]} lines Collects the lines that the worker prints.
 */
function workerProcess(t, lines) {
  const program = fileURLToPath(new URL('support/worker-process.js', import.meta.url));
  const args = [program, server.url, server.token('worker:*', 'worker')];
  const [first, ...rest] = [...KILLED_WITH_TESTS, process.execPath, ...args];
  const child = spawn(first, rest, { stdio: ['ignore', 'pipe', 'ignore'] });
  t.after(() => child.kill('SIGKILL'));
  const seen = new Deferred('step 3');
  createInterface({ input: child.stdout }).on('line', (line) => {
    lines.push(line);
    if (line === 'at 3') seen.resolve();
  });
  return { child, seen };
}

test('an attempt of a worker that gets SIGTERM resumes from its checkpoint', async (t) => {
  /** @type {string[]} */
  const lines = [];
  const first = workerProcess(t, lines);
  await waitForAction(client, 'steps');
  const run = client.run('steps', { steps: 6, hold: 3 }, { id: 'steps-1' });
  await first.seen.wait();
  const exit = once(first.child, 'exit');
  first.child.kill('SIGTERM');
  assert.deepEqual(await withTimeout(exit, 'the worker to exit'), [0, null]);
  assert.equal(lines.at(-1), 'stopped');
  workerProcess(t, []);
  assert.deepEqual(await withTimeout(run, 'the result'), { begin: 3, attempt: 2 });
  const log = await readLog(client, 'steps-1');
  const [released] = log.filter((event) => event.type === 'retrying');
  assert.equal(released.error.message, 'the worker is shutting down');
});
