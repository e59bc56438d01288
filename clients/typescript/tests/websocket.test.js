/** Tests of the WebSocket client with a real server and disconnects. */

import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import WebSocket from 'ws';

import { HandlerError } from '../src/index.js';
import { OutputBuffer, RawJson, StreamerSocket } from '../src/websocket.js';
import { startFixture } from './support/fixture.js';
import { Proxy } from './support/proxy.js';
import { Deferred, withTimeout } from './support/wait.js';

/** @type {Awaited<ReturnType<typeof startFixture>>} */
let fixture;
/** @type {Record<string, Deferred>} */
const seen = {};

/** @param {import('../src/index.js').Worker} worker */
function declare(worker) {
  worker.action('add', { sync: true }, (_, { a, b }) => ({ sum: a + b }));
  worker.action('chunks', async (context) => {
    await context.progress({ percentage: 50, message: 'half', metadata: { of: 'it' } });
    await context.output('Grüße, "Ada"\n');
    await context.output(new RawJson(' { "n" : 9223372036854775807 }\n'));
    await context.output(new Uint8Array([0, 128, 255]));
    return new RawJson(context.payloadText);
  });
  worker.action('second_try', { initialBackoffMs: 1 }, async (context) => {
    await context.output(`attempt ${context.attempt}`);
    if (context.attempt === 1) throw new HandlerError('not yet');
    await context.output({ done: true });
  });
  worker.action('gated', async (context) => {
    for (let number = 0; number < 20; number += 1) await context.output(`${number};`);
    seen.halfway.resolve(context.requestId);
    await seen.gate.promise;
    for (let number = 20; number < 40; number += 1) await context.output(`${number};`);
    return context.attempt;
  });
  worker.action('endless', async (context) => {
    await context.output('kept');
    seen.running.resolve();
    await context.sleep(2 ** 31);
  });
  worker.action('counted', () => {
    seen.runs.resolve();
    return 1;
  });
}

before(async () => {
  fixture = await startFixture(declare);
});
after(() => fixture.stop());

/**
 * @param {import('node:test').TestContext} t
 * @param {string} [url]
 * @param {Partial<import('../src/websocket.js').SocketOptions>} [options]
 */
function open(t, url = fixture.server.websocketUrl, options = {}) {
  const token = fixture.server.token('');
  const socket = new StreamerSocket({ url, token, WebSocket, ...options });
  t.after(() => socket.close());
  return socket;
}

/** @param {import('node:test').TestContext} t */
async function openThroughProxy(t) {
  const proxy = await Proxy.start(fixture.server.url);
  t.after(() => proxy.stop());
  return { proxy, socket: open(t, `ws://${proxy.address}/ws`) };
}

test('a sync action returns its result, and rejections have a reason', async (t) => {
  const socket = open(t);
  assert.deepEqual(await socket.request('add', { a: 2, b: 3 }), { sum: 5 });
  await assert.rejects(socket.request('no_such'), {
    name: 'RequestFailed',
    code: 'INVALID_ACTION',
  });
  await assert.rejects(socket.get('no-such'), { code: 'NOT_FOUND' });
  await assert.rejects(
    socket.request('add', {}, { priority: 10 }),
    (/** @type {any} */ error) => error.violations[0].field === 'priority',
  );
  const large = socket.request('add', { text: 'x'.repeat(8 << 20) });
  await assert.rejects(large, { name: 'LimitError', field: 'message' });
  assert.equal(socket.identity?.userId, 'js');
});

test('progress, chunks of every type and the result are received unchanged', async (t) => {
  const socket = open(t);
  const output = new OutputBuffer();
  /** @type {any[]} */
  const progress = [];
  const payload = new RawJson('{"n":9223372036854775807}');
  const onProgress = (/** @type {any} */ one) => progress.push(one);
  const result = await socket.request('chunks', payload, { raw: true, output, onProgress });
  assert.equal(result, payload.text);
  assert.deepEqual(progress, [{ percentage: 50, message: 'half', metadata: { of: 'it' } }]);
  assert.deepEqual(output.values.slice(0, 1), ['Grüße, "Ada"\n']);
  assert.equal(output.payloads[1].text, ' { "n" : 9223372036854775807 }\n');
  assert.deepEqual(output.values[2], new Uint8Array([0, 128, 255]));
});

test('many requests share one connection', async (t) => {
  const socket = open(t);
  const numbers = Array.from({ length: 300 }, (_, number) => number);
  const sums = await Promise.all(numbers.map((a) => socket.request('add', { a, b: 1 })));
  assert.deepEqual(
    sums.map(({ sum }) => sum),
    numbers.map((a) => a + 1),
  );
});

test('after a retry the output of the failed attempt is void', async (t) => {
  const socket = open(t);
  const output = new OutputBuffer();
  /** @type {number[]} */
  const rewinds = [];
  const onRetrying = (/** @type {number} */ seq) => void rewinds.push(seq);
  await socket.request('second_try', {}, { output, onRetrying });
  assert.equal(output.text, 'attempt 2{"done":true}');
  assert.equal(rewinds.length, 1);
});

test('a request resumes after a disconnect, with every event once', async (t) => {
  const { proxy, socket } = await openThroughProxy(t);
  seen.halfway = new Deferred('half of the output');
  seen.gate = new Deferred('the gate');
  const half = new Deferred('half of the output at the caller');
  const output = new OutputBuffer();
  let chunks = 0;
  const onOutput = () => void ((chunks += 1) === 20 && half.resolve());
  const request = socket.request('gated', {}, { id: 'cut-1', output, onOutput });
  await half.wait();
  proxy.block();
  seen.gate.resolve();
  await withTimeout(fixture.client.wait('cut-1'), 'the request to end');
  proxy.unblock();
  assert.equal(await withTimeout(request, 'the result'), 1);
  assert.equal(output.text, Array.from({ length: 40 }, (_, number) => `${number};`).join(''));
  assert.equal(chunks, 40);
  assert.ok(proxy.connections > 1);
});

test('an unacknowledged submission is sent again, and runs once', async (t) => {
  const { proxy, socket } = await openThroughProxy(t);
  await socket.list();
  seen.runs = new Deferred('the handler to run');
  proxy.mute();
  const accepted = new Deferred('the acknowledgment');
  const request = socket.request('counted', {}, { id: 'twice', onAccepted: accepted.resolve });
  await seen.runs.wait();
  proxy.disconnect();
  assert.equal(await withTimeout(request, 'the result'), 1);
  assert.equal((await accepted.wait()).duplicate, true);
  assert.equal((await fixture.client.get('twice')).attempt, 1);
});

test('aborting the signal requests cancellation', async (t) => {
  const socket = open(t);
  seen.running = new Deferred('the handler to run');
  const controller = new AbortController();
  const output = new OutputBuffer();
  const request = socket.request('endless', {}, { signal: controller.signal, output });
  const ended = assert.rejects(request, { name: 'RequestCancelled', message: 'enough' });
  await seen.running.wait();
  controller.abort(new Error('enough'));
  await ended;
  assert.equal(output.text, 'kept');
  const early = socket.request('endless', {}, { signal: AbortSignal.abort(), id: 'early' });
  await assert.rejects(early, { name: 'RequestCancelled' });
});

test('a request can be watched from any position', async (t) => {
  const [first, second] = [open(t), open(t)];
  seen.halfway = new Deferred('half of the output');
  seen.gate = new Deferred('the gate');
  const request = first.request('gated', {}, { id: 'shared' });
  await seen.halfway.wait();
  const output = new OutputBuffer();
  /** @type {number[]} */
  const seqs = [];
  const watchers = [
    second.watch('shared', { output }),
    second.watch('shared', { afterSeq: 12, onEvent: ({ seq }) => void seqs.push(seq) }),
    first.watch('shared', { mode: 'latest' }),
    first.request('gated', {}, { id: 'shared' }),
  ];
  const controller = new AbortController();
  const aborted = second.watch('shared', { signal: controller.signal, afterSeq: null });
  const rejection = assert.rejects(aborted, { name: 'AbortError' });
  assert.equal((await second.get('shared')).state, 'RUNNING');
  controller.abort();
  await rejection;
  seen.gate.resolve();
  assert.deepEqual(await withTimeout(Promise.all([request, ...watchers]), 'all'), [1, 1, 1, 1, 1]);
  assert.equal(output.payloads.length, 40);
  assert.deepEqual(
    seqs,
    seqs.map((_, index) => 13 + index),
  );
  const { requests } = await second.list({ states: ['SUCCEEDED'], limit: 1 });
  assert.equal(requests[0].requestId, 'shared');
  assert.equal(await second.cancel('shared'), 'succeeded');
});

test('an invalid token closes the connection, unless the client gets a fresh one', async (t) => {
  const closed = new Deferred('the rejection');
  const onStateChange = (/** @type {any} */ change) => {
    if (change.state === 'closed') closed.resolve(change.error);
  };
  const rejected = open(t, undefined, { token: 'nonsense', onStateChange });
  await assert.rejects(rejected.request('add'), { name: 'ConnectionClosed', code: 'UNAUTHORIZED' });
  assert.equal((await closed.wait()).closeCode, 4401);
  await assert.rejects(rejected.list(), { closeCode: 4401 });
  const tokens = ['nonsense', fixture.server.token('')];
  const renewed = open(t, undefined, { token: async () => String(tokens.shift()) });
  assert.deepEqual(await renewed.request('add', { a: 1, b: 1 }), { sum: 2 });
});

test('a watch of an ended request returns its result from any position', async (t) => {
  const socket = open(t);
  const payload = { n: 1 };
  assert.deepEqual(await socket.request('chunks', payload, { id: 'ended' }), payload);
  const { lastSeq } = await fixture.client.get('ended');
  const fresh = open(t);
  /** @type {number[]} */
  const seqs = [];
  const onEvent = (/** @type {any} */ { seq }) => void seqs.push(seq);
  const last = fresh.watch('ended', { afterSeq: lastSeq, onEvent });
  assert.deepEqual(await withTimeout(last, 'the result'), payload);
  assert.deepEqual(seqs, []);
  const output = new OutputBuffer();
  const positions = [lastSeq, null, lastSeq - 1, lastSeq + 5, 0, null];
  const all = positions.map((afterSeq) =>
    fresh.watch('ended', { afterSeq, ...(afterSeq === 0 ? { output } : {}) }),
  );
  const results = await withTimeout(Promise.all(all), 'all results');
  assert.deepEqual(results, positions.map(() => payload));
  assert.equal(output.payloads.length, 3);
});

test('a malformed token is rejected permanently, and is not in the error', async (t) => {
  for (const token of ['secret\nsecond', 'sécret', '', () => 'secret;']) {
    const list = open(t, undefined, { token }).list();
    await assert.rejects(list, (/** @type {any} */ error) => {
      assert.deepEqual([error.name, error.code], ['ConnectionClosed', 'UNAUTHORIZED']);
      assert.doesNotMatch(error.stack, /s.cret/);
      return true;
    });
  }
});
