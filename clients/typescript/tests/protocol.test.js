/** Tests of the rules of docs/worker-protocol.md, with a fake processor. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { status } from '@grpc/grpc-js';

import { Client, FatalError, Payload } from '../src/index.js';
import { WorkStream, resetsBackoff } from '../src/worker-stream.js';
import { FakeProcessor, UID } from './support/fake-processor.js';
import { Deferred, withTimeout } from './support/wait.js';
import { quietWorker } from './support/worker.js';

const id = { uid: UID, attempt: 1 };

/**
 * Starts a worker with one action; returns the worker and its first stream, after `hello`.
 * @param {import('node:test').TestContext} t
 * @param {import('../src/worker-actions.js').Handler} handler
 * @param {Partial<import('../src/worker.js').WorkerOptions>} [options]
 */
async function start(t, handler, options = {}) {
  const processor = await FakeProcessor.start(t);
  const worker = quietWorker(processor.url, options.token ?? 'token', options);
  worker.action('act', { maxAttempts: 5, finalErrors: ['TIMEOUT'] }, handler);
  const serving = worker.serve();
  serving.catch(() => {});
  t.after(() => {
    worker.stop(0, 0).catch(() => {});
  });
  const stream = await processor.stream();
  const hello = await stream.receive('hello');
  return { processor, worker, serving, stream, hello };
}

test('hello identifies the worker, the same on every stream', async (t) => {
  const { processor, stream, hello } = await start(t, () => null, { slots: 3, version: '1.2' });
  assert.match(hello.workerId, /^[A-Za-z0-9._:/@-]{20,128}$/);
  assert.deepEqual([hello.slots, hello.version, hello.attempts], [3, '1.2', []]);
  const [action] = hello.actions;
  assert.deepEqual([action.name, action.maxAttempts], ['act', 5]);
  assert.deepEqual(action.finalErrors, ['ERROR_CODE_TIMEOUT']);
  assert.equal(hello.sessionSecret.length, 0);
  assert.ok(hello.displayName && hello.displayName !== hello.workerId);
  const sessionSecret = Buffer.from('secret');
  stream.welcome({ sessionSecret });
  await stream.receive('heartbeat');
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  const next = await second.receive('hello');
  assert.deepEqual([next.workerId, next.sessionSecret], [hello.workerId, sessionSecret]);
});

test('unknown messages and attempts are ignored', async (t) => {
  const { stream } = await start(t, () => 5);
  stream.welcome();
  stream.send({});
  stream.send({ revoke: { uid: UID, attempt: 7 } });
  stream.send({ acknowledgment: { uid: UID, attempt: 7, number: 3 } });
  stream.task();
  const report = await stream.receive('report');
  assert.deepEqual([report.kind, report.number], ['result', '0']);
  assert.equal(report.result.data.toString(), '5');
});

test('unacknowledged reports are sent again in order, with their checkpoints', async (t) => {
  const { processor, stream } = await start(t, async (context) => {
    await context.progress(1);
    await context.output('a');
    await context.saveCheckpoint(2);
    await context.output('b');
    return 'done';
  });
  stream.welcome();
  stream.task();
  const all = ['progress 1', 'output 2', 'checkpoint 2', 'output 3', 'result 3'];
  assert.deepEqual(await stream.reports(5), all);
  stream.send({ acknowledgment: { ...id, number: 1 } });
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  assert.deepEqual((await second.receive('hello')).attempts, [id]);
  second.welcome({ resumed: [{ ...id, number: 2 }] });
  assert.deepEqual(await second.reports(3), all.slice(2));
  second.fail(status.UNAVAILABLE, 'gone again');
  const third = await processor.stream();
  await third.receive('hello');
  third.welcome({ resumed: [{ ...id, number: 3 }] });
  assert.deepEqual(await third.reports(1), ['result 3']);
  third.send({ acknowledgment: { ...id, number: 3, ended: true } });
  third.fail(status.UNAVAILABLE, 'and again');
  const fourth = await processor.stream();
  assert.deepEqual((await fourth.receive('hello')).attempts, []);
});

test('several attempts resume on a new stream, each from its own position', async (t) => {
  const gate = new Deferred('the gate');
  const { processor, stream } = await start(t, async (context) => {
    await context.output('a');
    await context.output('b');
    await gate.promise;
    return 'c';
  });
  stream.welcome();
  for (const attempt of [1, 2]) stream.task({ attempt });
  await stream.reports(4);
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  await second.receive('hello');
  gate.resolve();
  // Reports that are made before `welcome` are not sent before earlier reports.
  await new Promise((resolve) => setImmediate(resolve));
  second.welcome({ resumed: [1, 2].map((attempt) => ({ uid: UID, attempt, number: 0 })) });
  const received = /** @type {any[]} */ ([]);
  while (received.length < 6) received.push(await second.receive('report'));
  for (const attempt of [1, 2]) {
    const own = received.filter((report) => report.attempt === attempt);
    const summaries = own.map(({ kind, number }) => `${kind} ${number}`);
    assert.deepEqual(summaries, ['output 1', 'output 2', 'result 2']);
  }
});

test('the handler blocks at the limit of unacknowledged reports', async (t) => {
  /** @type {number[]} */
  const made = [];
  const { stream } = await start(t, async (context) => {
    for (let number = 1; number <= 6; number += 1) {
      await context.output('x'.repeat(10));
      made.push(number);
    }
  });
  stream.welcome({ maxUnacknowledged: 2, maxUnacknowledgedBytes: 1000 });
  stream.task();
  assert.deepEqual(await stream.reports(2), ['output 1', 'output 2']);
  stream.send({ task: { uid: UID, attempt: 2, action: 'no_such' } });
  assert.deepEqual(await stream.reports(1), ['error 0'], 'no other report was sent');
  assert.deepEqual(made, [1, 2]);
  stream.send({ acknowledgment: { ...id, number: 1 } });
  assert.deepEqual(await stream.reports(1), ['output 3']);
  stream.fail(status.UNAVAILABLE, 'gone');
});

test('one report may exceed the byte limit, and the next one waits', async (t) => {
  const { stream } = await start(t, async (context) => {
    await context.output('x'.repeat(99));
    await context.progress({ message: 'y'.repeat(100) });
    await context.progress(3);
    return null;
  });
  stream.welcome({ maxUnacknowledgedBytes: 100 });
  stream.task();
  assert.deepEqual(await stream.reports(2), ['output 1', 'progress 2']);
  stream.send({ acknowledgment: { ...id, number: 2 } });
  assert.deepEqual(await stream.reports(2), ['progress 3', 'result 3']);
});

test('a revoked, ended or not resumed attempt sends no more reports', async (t) => {
  const running = [new Deferred('run 1'), new Deferred('run 2'), new Deferred('run 3')];
  const ended = [new Deferred('end 1'), new Deferred('end 2'), new Deferred('end 3')];
  const { processor, stream } = await start(t, async (context) => {
    const index = context.attempt - 1;
    running[index].resolve();
    await context.sleep(2 ** 31).catch(() => {});
    await assert.rejects(context.output('too late'), { name: 'Cancelled' });
    ended[index].resolve(context.signal.reason.message);
    return 'too late';
  });
  stream.welcome();
  for (const attempt of [1, 2, 3]) stream.task({ attempt });
  for (const run of running) await run.wait();
  stream.send({ revoke: { uid: UID, attempt: 1, reason: 'lease expired' } });
  stream.send({ acknowledgment: { uid: UID, attempt: 2, number: 0, ended: true } });
  assert.equal(await ended[0].wait(), 'lease expired');
  await ended[1].wait();
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  assert.deepEqual((await second.receive('hello')).attempts, [{ uid: UID, attempt: 3 }]);
  second.welcome();
  await ended[2].wait();
  second.send({ task: { uid: UID, attempt: 9, action: 'no_such' } });
  const report = await second.receive('report');
  assert.deepEqual([report.attempt, report.error.code], [9, 'ERROR_CODE_INVALID_ACTION']);
});

test('heartbeats list running attempts; replies repeat cancellations', async (t) => {
  const { stream } = await start(t, (context) => context.sleep(2 ** 31));
  stream.welcome({ heartbeatMs: 20, leaseMs: 60_000 });
  stream.task();
  let heartbeat;
  do heartbeat = await stream.receive('heartbeat');
  while (heartbeat.attempts.length === 0);
  assert.deepEqual(heartbeat.attempts, [id]);
  stream.send({ heartbeatReply: { cancelled: [{ ...id, reason: 'not needed' }] } });
  const { error } = await stream.receive('report');
  assert.deepEqual([error.code, error.message], ['ERROR_CODE_CANCELLED', 'not needed']);
});

test('a stream without heartbeat replies is abandoned', async (t) => {
  const { processor, stream } = await start(t, () => null);
  stream.welcome({ heartbeatMs: 10, leaseMs: 30 });
  await stream.end();
  await processor.stream();
});

test('a sync task sends only its final report, and ends with its stream', async (t) => {
  const handlers = [new Deferred('the first'), new Deferred('the second')];
  const { processor, stream } = await start(t, async (context) => {
    await context.progress(1);
    await context.output('x');
    await context.saveCheckpoint(1);
    await context.heartbeat();
    if (context.attempt === 1) return 'answer';
    handlers[0].resolve();
    await context.sleep(2 ** 31).catch(handlers[1].resolve);
    return 'discarded';
  });
  stream.welcome();
  stream.task({ sync: true });
  assert.deepEqual(await stream.reports(1), ['result 0']);
  stream.task({ sync: true, attempt: 2 });
  await handlers[0].wait();
  stream.fail(status.UNAVAILABLE, 'gone');
  assert.equal((await handlers[1].wait()).name, 'Cancelled');
  const second = await processor.stream();
  assert.deepEqual((await second.receive('hello')).attempts, []);
});

test('a stopping worker releases running attempts and waits for acknowledgments', async (t) => {
  const running = new Deferred('the handler');
  const { worker, serving, stream } = await start(t, async (context) => {
    await context.output('half');
    running.resolve();
    await context.sleep(2 ** 31);
  });
  stream.welcome();
  stream.task();
  await running.wait();
  worker.stop(0);
  assert.deepEqual(await stream.receive('capacity'), { slots: 0 });
  const release = await stream.receive('report');
  assert.deepEqual([release.kind, release.number], ['release', '1']);
  stream.task({ attempt: 2 });
  assert.equal((await stream.receive('report')).kind, 'release', 'a late task is released');
  assert.equal(stream.ended, false);
  for (const attempt of [1, 2]) stream.send({ acknowledgment: { uid: UID, attempt, ended: true } });
  await stream.end();
  await serving;
});

test('a stopping worker waits for running handlers', async (t) => {
  const running = new Deferred('the handler');
  const gate = new Deferred('the gate');
  const { worker, serving, stream } = await start(t, async () => {
    running.resolve();
    await gate.promise;
    return 'done';
  });
  stream.welcome();
  stream.task();
  await running.wait();
  worker.stop(60_000);
  await stream.receive('capacity');
  gate.resolve();
  assert.deepEqual(await stream.reports(1), ['result 0']);
  stream.send({ acknowledgment: { ...id, ended: true } });
  await serving;
});

test('a fatal status before welcome ends the worker, others do not', async (t) => {
  const { processor, serving, stream } = await start(t, () => null);
  stream.fail(status.UNAVAILABLE, 'not now');
  const second = await processor.stream();
  second.welcome();
  await second.receive('heartbeat');
  second.fail(status.UNAUTHENTICATED, 'the token has expired');
  const third = await processor.stream();
  third.fail(status.INVALID_ARGUMENT, 'hello.slots: must be 1');
  await assert.rejects(serving, { code: 'VALIDATION_ERROR', message: 'hello.slots: must be 1' });
});

test('another program with the same id ends the worker', async (t) => {
  const { serving, stream } = await start(t, () => null);
  stream.welcome();
  await stream.receive('heartbeat');
  stream.fail(status.ALREADY_EXISTS, 'another stream took its place');
  await assert.rejects(serving, { code: 'CONFLICT' });
});

test('a stopping worker declares no slots when it reconnects', async (t) => {
  const running = new Deferred('the handler');
  const { processor, worker, serving, stream } = await start(t, async (context) => {
    running.resolve();
    await context.sleep(2 ** 31);
  });
  stream.welcome();
  stream.task();
  await running.wait();
  worker.stop(60_000);
  await stream.receive('capacity');
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  assert.equal((await second.receive('hello')).slots, 0);
  second.welcome();
  await serving;
});

test('a token is renewed on the same stream before it expires', async (t) => {
  let tokens = 0;
  const { stream } = await start(t, () => null, { token: () => `token-${(tokens += 1)}` });
  stream.welcome();
  const seconds = Math.floor(Date.now() / 1000) + 1;
  stream.send({ tokenStatus: { expireTime: { seconds } } });
  assert.deepEqual(await stream.receive('refreshToken'), { token: 'token-2' });
});

test('running attempts are released before a plain token expires', async (t) => {
  const running = new Deferred('the handler');
  const { stream, serving } = await start(t, async (context) => {
    running.resolve();
    await context.sleep(2 ** 31);
  });
  stream.welcome();
  stream.task();
  await running.wait();
  const seconds = Math.floor(Date.now() / 1000) + 1;
  stream.send({ tokenStatus: { expireTime: { seconds } } });
  assert.deepEqual(await stream.receive('capacity'), { slots: 0 });
  assert.deepEqual(await stream.reports(1), ['release 0']);
  stream.send({ acknowledgment: { ...id, ended: true } });
  await assert.rejects(serving, { code: 'UNAUTHORIZED', message: /cannot be refreshed/ });
});

test('a handler that awaits no report does not crash the worker', async (t) => {
  const { stream } = await start(t, async (context) => {
    for (let number = 0; number < 5; number += 1) context.output('x');
    context.saveCheckpoint('c');
    if (context.attempt === 1) await context.sleep(2 ** 31);
    return 'r';
  });
  stream.welcome({ maxUnacknowledged: 2 });
  stream.task();
  assert.deepEqual(await stream.reports(2), ['output 1', 'output 2']);
  stream.send({ revoke: id });
  stream.task({ attempt: 2 });
  assert.deepEqual(await stream.reports(2), ['output 1', 'output 2']);
  stream.send({ acknowledgment: { uid: UID, attempt: 2, number: 2 } });
  assert.deepEqual(await stream.reports(2), ['output 3', 'output 4']);
  stream.send({ acknowledgment: { uid: UID, attempt: 2, number: 4 } });
  assert.deepEqual(await stream.reports(3), ['output 5', 'checkpoint 5', 'result 5']);
});

test('error details that cannot be sent are omitted', async (t) => {
  const circular = /** @type {any} */ ({});
  circular.self = circular;
  const thrown = [
    new FatalError('whole', { details: { n: 5 } }),
    new FatalError('big integer', { details: { n: 5n } }),
    new FatalError('circular', { details: circular }),
    new FatalError('large', { details: { text: 'x'.repeat(70_000) } }),
    Object.create(null),
  ];
  const { stream } = await start(t, (context) => {
    throw thrown[context.attempt - 1];
  });
  stream.welcome();
  const received = [];
  for (let attempt = 1; attempt <= thrown.length; attempt += 1) {
    stream.task({ attempt });
    const { error } = await stream.receive('report');
    received.push([error.message, error.details?.data.toString() ?? null]);
  }
  assert.deepEqual(received, [
    ['whole', '{"n":5}'],
    ['big integer', null],
    ['circular', null],
    ['large', null],
    ['the error could not be reported', null],
  ]);
});

test('lone surrogates are replaced', async (t) => {
  const { stream } = await start(t, async (context) => {
    await context.progress({ message: 'half \ud83d' });
    await context.output(new Payload('text/\ud83d', Buffer.from('x')));
    throw new Error('half \ud83d');
  });
  stream.welcome();
  stream.task();
  assert.equal((await stream.receive('report')).progress.message, 'half \ufffd');
  assert.equal((await stream.receive('report')).output.contentType, 'text/\ufffd');
  assert.equal((await stream.receive('report')).error.message, 'half \ufffd');
});

test('the backoff is reset after a stream on which a heartbeat was answered', async (t) => {
  const processor = await FakeProcessor.start(t);
  /** @param {(stream: import('./support/fake-processor.js').FakeStream) => unknown} serve */
  const resetsAfter = async (serve) => {
    const noop = () => {};
    const stream = new WorkStream({
      endpoint: { server: processor.url },
      token: 'token',
      hello: () => ({}),
      attempts: () => [],
      onWelcome: noop,
      onTask: noop,
      findAttempt: () => undefined,
      dropAttempt: noop,
      onDraining: noop,
      onTokenExpiring: noop,
      log: noop,
    });
    const result = stream.run();
    await serve(await processor.stream());
    return resetsBackoff(await result);
  };
  /** @param {number} code @param {boolean} answered */
  const after = (code, answered) =>
    resetsAfter(async (stream) => {
      await stream.receive('hello');
      stream.welcome();
      await stream.receive('heartbeat');
      if (answered) stream.send({ heartbeatReply: {} });
      stream.fail(code, 'gone');
    });
  assert.equal(await after(status.UNAVAILABLE, true), true);
  assert.equal(await after(status.UNAVAILABLE, false), false);
  const { INTERNAL, INVALID_ARGUMENT, OUT_OF_RANGE, RESOURCE_EXHAUSTED } = status;
  for (const code of [INTERNAL, INVALID_ARGUMENT, OUT_OF_RANGE, RESOURCE_EXHAUSTED]) {
    assert.equal(await after(code, true), false);
  }
});

test('a malformed token is rejected permanently, and is not in the error', async () => {
  for (const token of ['secret\nsecond', 'sécret', ' ', '', () => 'secret\u0000']) {
    /** @param {any} error */
    const isRejection = (error) => {
      assert.deepEqual([error.code, error.status], ['UNAUTHORIZED', status.UNAUTHENTICATED]);
      assert.doesNotMatch(`${error.stack} ${error.cause}`, /s.cret/);
      return true;
    };
    /** @type {string[]} */
    const logged = [];
    const log = (/** @type {string} */ _, /** @type {string} */ text) => void logged.push(text);
    const worker = quietWorker('http://127.0.0.1:1', token, { log });
    const serving = worker.action('act', () => null).serve();
    await assert.rejects(withTimeout(serving, 'the rejection'), isRejection);
    assert.deepEqual(logged, []);
    const client = new Client({ server: 'http://127.0.0.1:1', token });
    await assert.rejects(client.list(), isRejection);
    await assert.rejects(client.watch('r').next(), isRejection);
    client.close();
  }
});

test('a worker stops while a token is pending', async () => {
  const requested = new Deferred('the token to be requested');
  const worker = quietWorker('http://127.0.0.1:1', () => {
    requested.resolve();
    return new Promise(() => {});
  });
  const serving = worker.action('act', () => null).serve();
  await requested.wait();
  await withTimeout(worker.stop(0, 500), 'the worker to stop');
  await serving;
});
