/** Tests of handlers in a worker, and of their callers over gRPC. */

import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { Client, HandlerError, InvalidPayload, OutputBuffer, RawJson } from '../src/index.js';
import { startFixture, readLog } from './support/fixture.js';
import { Deferred, withTimeout } from './support/wait.js';

/** @type {Awaited<ReturnType<typeof startFixture>>} */
let fixture;
/** @type {Record<string, Deferred>} */
const seen = {};
const retried = { maxAttempts: 3, initialBackoffMs: 1, maxBackoffMs: 1 };

/** @param {import('../src/index.js').Worker} worker */
function declare(worker) {
  worker.action('add', { sync: true }, (_, { a, b }) => ({ sum: a + b }));
  worker.action('digits', (context) => new RawJson(context.payloadText));
  worker.action('report', async (context, { name }) => {
    await context.progress(10);
    await context.output(`Dear ${name},\n`);
    await context.output({ rows: 2 });
    await context.output(new Uint8Array([0, 255]));
    await context.progress({ percentage: 90, message: 'nearly', metadata: { pages: 1 } });
    return { name, attempt: context.attempt, tenant: context.tenantId, user: context.userId };
  });
  worker.action('second_try', retried, async (context) => {
    const saved = context.checkpoint;
    await context.output(`attempt ${context.attempt}`);
    await context.saveCheckpoint({ done: context.attempt });
    await context.output(', after the checkpoint');
    if (context.attempt < 3) throw new HandlerError('not yet', { details: { at: 1 } });
    return { saved };
  });
  worker.action('endless', async (context) => {
    await context.output('first');
    seen.running.resolve(context.requestId);
    await context.sleep(2 ** 31).catch((error) => seen.cancelled.resolve(error));
    await context.output(', last');
    context.signal.throwIfAborted();
  });
  worker.action('picky', retried, () => {
    throw new InvalidPayload('rows', 'must not be empty');
  });
  worker.action('broken', { maxAttempts: 1 }, () => {
    throw new TypeError('a bug');
  });
  worker.action('too_much', retried, (context, { output }) =>
    output ? context.output('x'.repeat(output)) : 'x'.repeat(5 * 1024 * 1024),
  );
  worker.action('flood', async (context, { count, bytes }) => {
    for (let index = 0; index < count; index += 1) {
      await context.output(String.fromCharCode(97 + (index % 26)).repeat(bytes));
      if (index % 100 === 0) await context.saveCheckpoint({ index });
    }
    return count;
  });
}

before(async () => {
  fixture = await startFixture(declare);
});
after(() => fixture.stop());

test('a sync action returns its result', async () => {
  assert.deepEqual(await fixture.client.run('add', { a: 2, b: 3 }), { sum: 5 });
});

test('the caller receives progress, output and result', async () => {
  /** @type {any[]} */
  const calls = [];
  const result = await fixture.client.run(
    'report',
    { name: 'Ada' },
    {
      onProgress: (progress) => calls.push(progress),
      onOutput: (chunk) => calls.push(chunk),
    },
  );
  assert.deepEqual(result, { name: 'Ada', attempt: 1, tenant: 'dev', user: 'js' });
  assert.deepEqual(calls, [
    { percentage: 10, message: '', metadata: null },
    'Dear Ada,\n',
    { rows: 2 },
    Buffer.from([0, 255]),
    { percentage: 90, message: 'nearly', metadata: { pages: 1 } },
  ]);
});

test('numbers keep all digits', async () => {
  const text = '{"largest":9223372036854775807,"pi":3.14159265358979323846}';
  assert.equal(await fixture.client.run('digits', new RawJson(text), { raw: true }), text);
  const { requests } = await fixture.client.list({ action: 'digits' });
  const found = await fixture.client.get(requests[0].uid);
  assert.equal(found.payload?.text, text);
  assert.equal(found.result?.text, text);
});

test('a failed attempt is retried from its checkpoint, and its output is void', async () => {
  /** @type {number[]} */
  const rewinds = [];
  const output = new OutputBuffer();
  const onRetrying = (/** @type {number} */ seq) => rewinds.push(seq);
  const result = await fixture.client.run('second_try', {}, { id: 'retry-1', output, onRetrying });
  assert.deepEqual(result, { saved: { done: 2 } });
  assert.equal(output.text, 'attempt 3, after the checkpoint');
  const log = await readLog(fixture.client, 'retry-1');
  const failures = log.filter((event) => event.type === 'retrying');
  assert.deepEqual(
    failures.map((event) => event.rewindToSeq),
    rewinds,
  );
  assert.deepEqual(
    failures.map((event) => event.error.details),
    [{ at: 1 }, { at: 1 }],
  );
});

test('a cancellation reaches the handler, and its output is kept', async () => {
  seen.running = new Deferred('the handler to run');
  seen.cancelled = new Deferred('the handler to be cancelled');
  const controller = new AbortController();
  const output = new OutputBuffer();
  const run = fixture.client.run('endless', {}, { id: 'c-1', signal: controller.signal, output });
  const ended = assert.rejects(run, { name: 'RequestCancelled', message: 'no longer needed' });
  assert.equal(await seen.running.wait(), 'c-1');
  controller.abort(new Error('no longer needed'));
  assert.equal((await seen.cancelled.wait()).name, 'Cancelled');
  await ended;
  assert.equal(output.text, 'first, last');
  assert.equal((await fixture.client.get('c-1')).state, 'CANCELLED');
});

test('an error of a handler sets whether it is retryable', async () => {
  await assert.rejects(fixture.client.run('picky'), (/** @type {any} */ error) => {
    assert.equal(error.name, 'RequestFailed');
    assert.equal(error.code, 'VALIDATION_ERROR');
    assert.deepEqual(error.violations, [{ field: 'rows', description: 'must not be empty' }]);
    return true;
  });
  await assert.rejects(fixture.client.run('broken'), {
    code: 'PROCESSING_FAILED',
    message: 'TypeError: a bug',
    retryable: true,
  });
});

test('a value above a limit fails the request, with field and limit in the message', async () => {
  const run = (/** @type {number} */ output) => fixture.client.run('too_much', { output });
  await assert.rejects(run(2 * 1024 * 1024), {
    message: 'output must be at most 1048576 bytes, is 2097152',
    retryable: false,
  });
  await assert.rejects(run(0), { message: /^result must be at most 4195328 bytes/ });
});

test('a handler that reports faster than the server stores loses nothing', async () => {
  const output = new OutputBuffer();
  assert.equal(await fixture.client.run('flood', { count: 3000, bytes: 200 }, { output }), 3000);
  assert.equal(output.payloads.length, 3000);
  const large = new OutputBuffer();
  const flood = { count: 30, bytes: 1 << 20 };
  assert.equal(await fixture.client.run('flood', flood, { output: large }), 30);
  assert.equal(large.payloads.length, 30);
});

test('the same id returns the same request, and a different payload conflicts', async () => {
  const options = { id: 'once', waitMs: 10_000, metadata: { from: 'js' } };
  const submit = (/** @type {string} */ name) => fixture.client.submit('report', { name }, options);
  const [first, second] = await Promise.all([submit('Ada'), submit('Ada')]);
  assert.equal(first.uid, second.uid);
  assert.notEqual(first.duplicate, second.duplicate);
  assert.deepEqual(await fixture.client.wait('once'), first.result?.value);
  assert.deepEqual((await fixture.client.get('once')).metadata?.value, { from: 'js' });
  await assert.rejects(submit('Eve'), { name: 'CallError', code: 'CONFLICT' });
});

test('failed requests can be redriven', async () => {
  await assert.rejects(fixture.client.run('broken', {}, { id: 'b-1' }), { requestId: 'b-1' });
  const redriven = await fixture.client.redrive('b-1', { id: 'b-2' });
  assert.equal(redriven.redriveOf, (await fixture.client.get('b-1')).uid);
  await assert.rejects(fixture.client.wait('b-2'), { code: 'PROCESSING_FAILED' });
});

test('rejected calls have an error code', async () => {
  await assert.rejects(fixture.client.submit('no_such'), {
    code: 'INVALID_ACTION',
    retryable: false,
  });
  await assert.rejects(fixture.client.get('no-such'), { code: 'NOT_FOUND' });
  await assert.rejects(
    fixture.client.submit('report', {}, { priority: 10 }),
    (/** @type {any} */ error) =>
      error.code === 'VALIDATION_ERROR' && error.violations[0].field === 'priority',
  );
  const { url } = fixture.server;
  const unauthorized = new Client({ server: url, token: 'nonsense' });
  await assert.rejects(unauthorized.list(), { code: 'UNAUTHORIZED' });
  unauthorized.close();
});

test('a watch after the terminal event yields nothing', async () => {
  await fixture.client.run('report', { name: 'Ada' }, { id: 'read' });
  const { lastSeq } = await fixture.client.get('read');
  for (const afterSeq of [lastSeq, lastSeq + 1]) {
    const watch = fixture.client.watch('read', { afterSeq });
    assert.deepEqual(await withTimeout(watch.next(), 'the end'), { done: true, value: undefined });
  }
  const last = await fixture.client.watch('read', { afterSeq: lastSeq - 1 }).next();
  assert.equal(last.value?.type, 'succeeded');
  assert.equal((await fixture.client.watch('read', { afterSeq: null }).next()).value?.seq, lastSeq);
});

test('a run delivers all output, also if the request has already ended', async () => {
  for (let times = 0; times < 2; times += 1) {
    const output = new OutputBuffer();
    const options = { id: 'repeated', waitMs: 10_000, output };
    const result = await fixture.client.run('report', { name: 'Ada' }, options);
    assert.equal(result.name, 'Ada');
    assert.equal(output.payloads.length, 3);
  }
});

test('failed requests can be redriven in pages', async () => {
  const ids = ['m-1', 'm-2', 'm-3'];
  for (const id of ids) await assert.rejects(fixture.client.run('broken', {}, { id }));
  const failed = await Promise.all(ids.map((id) => fixture.client.get(id)));
  const since = failed[0].createTime ?? 0;
  const states = /** @type {['FAILED']} */ (['FAILED']);
  const options = { states, action: 'broken', since, pageSize: 2 };
  /** @param {object} more */
  const all = async (more) => {
    const pages = [];
    for await (const page of fixture.client.redriveAll({ ...options, ...more })) pages.push(page);
    assert.ok(pages.every((page) => page.length <= 2));
    return pages.flat();
  };
  const uids = failed.map(({ uid }) => uid).reverse();
  const dry = await all({ dryRun: true });
  assert.deepEqual(dry, uids.map((uid) => ({ uid, request: null })));
  assert.deepEqual(await all({ until: since }), []);
  const redriven = await all({});
  assert.deepEqual(redriven.map(({ request }) => request?.redriveOf), uids);
  for (const { request } of redriven) {
    await assert.rejects(fixture.client.wait(request?.uid ?? ''), { code: 'PROCESSING_FAILED' });
  }
});
