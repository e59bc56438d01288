/** The rules of docs/worker-protocol.md that a real server rarely puts to the test. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { status } from '@grpc/grpc-js';

import { Client, FatalError, Payload } from '../src/index.js';
import { WorkStream, wentWell } from '../src/worker-stream.js';
import { FakeProcessor, UID } from './support/fake-processor.js';
import { Once, within } from './support/wait.js';
import { quietWorker } from './support/worker.js';

const name = { uid: UID, attempt: 1 };

/**
 * A worker with one action, and its first stream, after `hello`.
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
  const hello = await stream.hear('hello');
  return { processor, worker, serving, stream, hello };
}

test('hello says who the worker is, and every stream says the same', async (t) => {
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
  await stream.hear('heartbeat');
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  const again = await second.hear('hello');
  assert.deepEqual([again.workerId, again.sessionSecret], [hello.workerId, sessionSecret]);
});

test('what is not known is passed over', async (t) => {
  const { stream } = await start(t, () => 5);
  stream.welcome();
  stream.say({});
  stream.say({ revoke: { uid: UID, attempt: 7 } });
  stream.say({ acknowledgment: { uid: UID, attempt: 7, number: 3 } });
  stream.task();
  const report = await stream.hear('report');
  assert.deepEqual([report.kind, report.number], ['result', '0']);
  assert.equal(report.result.data.toString(), '5');
});

test('reports are sent again from where the server is, checkpoints in their places', async (t) => {
  const { processor, stream } = await start(t, async (context) => {
    await context.progress(1);
    await context.output('a');
    await context.saveCheckpoint(2);
    await context.output('b');
    return 'done';
  });
  stream.welcome();
  stream.task();
  const whole = ['progress 1', 'output 2', 'checkpoint 2', 'output 3', 'result 3'];
  assert.deepEqual(await stream.reports(5), whole);
  stream.say({ acknowledgment: { ...name, number: 1 } });
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  assert.deepEqual((await second.hear('hello')).attempts, [name]);
  second.welcome({ resumed: [{ ...name, number: 2 }] });
  assert.deepEqual(await second.reports(3), whole.slice(2));
  second.fail(status.UNAVAILABLE, 'gone again');
  const third = await processor.stream();
  await third.hear('hello');
  third.welcome({ resumed: [{ ...name, number: 3 }] });
  assert.deepEqual(await third.reports(1), ['result 3']);
  third.say({ acknowledgment: { ...name, number: 3, ended: true } });
  third.fail(status.UNAVAILABLE, 'and again');
  const fourth = await processor.stream();
  assert.deepEqual((await fourth.hear('hello')).attempts, []);
});

test('several attempts go on together, each from where it was', async (t) => {
  const gate = new Once('the gate');
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
  await second.hear('hello');
  gate.resolve();
  // What the handlers say now, before welcome, is not sent before what went before it.
  await new Promise((resolve) => setImmediate(resolve));
  second.welcome({ resumed: [1, 2].map((attempt) => ({ uid: UID, attempt, number: 0 })) });
  const heard = /** @type {any[]} */ ([]);
  while (heard.length < 6) heard.push(await second.hear('report'));
  for (const attempt of [1, 2]) {
    const own = heard.filter((report) => report.attempt === attempt);
    const shown = own.map(({ kind, number }) => `${kind} ${number}`);
    assert.deepEqual(shown, ['output 1', 'output 2', 'result 2']);
  }
});

test('the handler waits while too much is not acknowledged, in number and in bytes', async (t) => {
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
  stream.say({ task: { uid: UID, attempt: 2, action: 'no_such' } });
  assert.deepEqual(await stream.reports(1), ['error 0'], 'nothing came in between');
  assert.deepEqual(made, [1, 2]);
  stream.say({ acknowledgment: { ...name, number: 1 } });
  assert.deepEqual(await stream.reports(1), ['output 3']);
  stream.fail(status.UNAVAILABLE, 'gone');
});

test('one report may go beyond the bytes, and no other begins', async (t) => {
  const { stream } = await start(t, async (context) => {
    await context.output('x'.repeat(99));
    await context.progress({ message: 'y'.repeat(100) });
    await context.progress(3);
    return null;
  });
  stream.welcome({ maxUnacknowledgedBytes: 100 });
  stream.task();
  assert.deepEqual(await stream.reports(2), ['output 1', 'progress 2']);
  stream.say({ acknowledgment: { ...name, number: 2 } });
  assert.deepEqual(await stream.reports(2), ['progress 3', 'result 3']);
});

test('of an attempt that is revoked, cut off or not resumed nothing more is sent', async (t) => {
  const running = [new Once('run 1'), new Once('run 2'), new Once('run 3')];
  const gone = [new Once('end 1'), new Once('end 2'), new Once('end 3')];
  const { processor, stream } = await start(t, async (context) => {
    const index = context.attempt - 1;
    running[index].resolve();
    await context.sleep(2 ** 31).catch(() => {});
    await assert.rejects(context.output('too late'), { name: 'Cancelled' });
    gone[index].resolve(context.signal.reason.message);
    return 'too late';
  });
  stream.welcome();
  for (const attempt of [1, 2, 3]) stream.task({ attempt });
  for (const run of running) await run.wait();
  stream.say({ revoke: { uid: UID, attempt: 1, reason: 'its lease ran out' } });
  stream.say({ acknowledgment: { uid: UID, attempt: 2, number: 0, ended: true } });
  assert.equal(await gone[0].wait(), 'its lease ran out');
  await gone[1].wait();
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  assert.deepEqual((await second.hear('hello')).attempts, [{ uid: UID, attempt: 3 }]);
  second.welcome();
  await gone[2].wait();
  second.say({ task: { uid: UID, attempt: 9, action: 'no_such' } });
  const report = await second.hear('report');
  assert.deepEqual([report.attempt, report.error.code], [9, 'ERROR_CODE_INVALID_ACTION']);
});

test('heartbeats name what runs; their replies repeat cancellations', async (t) => {
  const { stream } = await start(t, (context) => context.sleep(2 ** 31));
  stream.welcome({ heartbeatMs: 20, leaseMs: 60_000 });
  stream.task();
  let heartbeat;
  do heartbeat = await stream.hear('heartbeat');
  while (heartbeat.attempts.length === 0);
  assert.deepEqual(heartbeat.attempts, [name]);
  stream.say({ heartbeatReply: { cancelled: [{ ...name, reason: 'no use' }] } });
  const { error } = await stream.hear('report');
  assert.deepEqual([error.code, error.message], ['ERROR_CODE_CANCELLED', 'no use']);
});

test('a stream on which heartbeats are not answered is left', async (t) => {
  const { processor, stream } = await start(t, () => null);
  stream.welcome({ heartbeatMs: 10, leaseMs: 30 });
  await stream.end();
  await processor.stream();
});

test('a sync task reports its end alone, and is lost with its stream', async (t) => {
  const handlers = [new Once('the first'), new Once('the second')];
  const { processor, stream } = await start(t, async (context) => {
    await context.progress(1);
    await context.output('x');
    await context.saveCheckpoint(1);
    await context.heartbeat();
    if (context.attempt === 1) return 'answer';
    handlers[0].resolve();
    await context.sleep(2 ** 31).catch(handlers[1].resolve);
    return 'nobody waits';
  });
  stream.welcome();
  stream.task({ sync: true });
  assert.deepEqual(await stream.reports(1), ['result 0']);
  stream.task({ sync: true, attempt: 2 });
  await handlers[0].wait();
  stream.fail(status.UNAVAILABLE, 'gone');
  assert.equal((await handlers[1].wait()).name, 'Cancelled');
  const second = await processor.stream();
  assert.deepEqual((await second.hear('hello')).attempts, []);
});

test('a worker that stops releases what runs and waits for the last word', async (t) => {
  const running = new Once('the handler');
  const { worker, serving, stream } = await start(t, async (context) => {
    await context.output('half');
    running.resolve();
    await context.sleep(2 ** 31);
  });
  stream.welcome();
  stream.task();
  await running.wait();
  worker.stop(0);
  assert.deepEqual(await stream.hear('capacity'), { slots: 0 });
  const release = await stream.hear('report');
  assert.deepEqual([release.kind, release.number], ['release', '1']);
  stream.task({ attempt: 2 });
  assert.equal((await stream.hear('report')).kind, 'release', 'what comes late goes back');
  assert.equal(stream.ended, false);
  for (const attempt of [1, 2]) stream.say({ acknowledgment: { uid: UID, attempt, ended: true } });
  await stream.end();
  await serving;
});

test('a worker that stops lets what runs end', async (t) => {
  const running = new Once('the handler');
  const gate = new Once('the gate');
  const { worker, serving, stream } = await start(t, async () => {
    running.resolve();
    await gate.promise;
    return 'done';
  });
  stream.welcome();
  stream.task();
  await running.wait();
  worker.stop(60_000);
  await stream.hear('capacity');
  gate.resolve();
  assert.deepEqual(await stream.reports(1), ['result 0']);
  stream.say({ acknowledgment: { ...name, ended: true } });
  await serving;
});

test('a refusal before welcome ends the worker, other endings do not', async (t) => {
  const { processor, serving, stream } = await start(t, () => null);
  stream.fail(status.UNAVAILABLE, 'not now');
  const second = await processor.stream();
  second.welcome();
  await second.hear('heartbeat');
  second.fail(status.UNAUTHENTICATED, 'the token has expired');
  const third = await processor.stream();
  third.fail(status.INVALID_ARGUMENT, 'hello.slots: must be 1');
  await assert.rejects(serving, { code: 'VALIDATION_ERROR', message: 'hello.slots: must be 1' });
});

test('another program with the same name ends the worker', async (t) => {
  const { serving, stream } = await start(t, () => null);
  stream.welcome();
  await stream.hear('heartbeat');
  stream.fail(status.ALREADY_EXISTS, 'another stream took its place');
  await assert.rejects(serving, { code: 'CONFLICT' });
});

test('a worker that has to come back while it stops declares no slots', async (t) => {
  const running = new Once('the handler');
  const { processor, worker, serving, stream } = await start(t, async (context) => {
    running.resolve();
    await context.sleep(2 ** 31);
  });
  stream.welcome();
  stream.task();
  await running.wait();
  worker.stop(60_000);
  await stream.hear('capacity');
  stream.fail(status.UNAVAILABLE, 'gone');
  const second = await processor.stream();
  assert.equal((await second.hear('hello')).slots, 0);
  second.welcome();
  await serving;
});

test('a token is renewed in time, on the same stream', async (t) => {
  let tokens = 0;
  const { stream } = await start(t, () => null, { token: () => `token-${(tokens += 1)}` });
  stream.welcome();
  const seconds = Math.floor(Date.now() / 1000) + 1;
  stream.say({ tokenStatus: { expireTime: { seconds } } });
  assert.deepEqual(await stream.hear('refreshToken'), { token: 'token-2' });
});

test('what runs is handed back before a token expires that cannot be renewed', async (t) => {
  const running = new Once('the handler');
  const { stream, serving } = await start(t, async (context) => {
    running.resolve();
    await context.sleep(2 ** 31);
  });
  stream.welcome();
  stream.task();
  await running.wait();
  const seconds = Math.floor(Date.now() / 1000) + 1;
  stream.say({ tokenStatus: { expireTime: { seconds } } });
  assert.deepEqual(await stream.hear('capacity'), { slots: 0 });
  assert.deepEqual(await stream.reports(1), ['release 0']);
  stream.say({ acknowledgment: { ...name, ended: true } });
  await assert.rejects(serving, { code: 'UNAUTHORIZED', message: /cannot be renewed/ });
});

test('a handler that waits for nothing does not bring the worker down', async (t) => {
  const { stream } = await start(t, async (context) => {
    for (let number = 0; number < 5; number += 1) context.output('x');
    context.saveCheckpoint('c');
    if (context.attempt === 1) await context.sleep(2 ** 31);
    return 'r';
  });
  stream.welcome({ maxUnacknowledged: 2 });
  stream.task();
  assert.deepEqual(await stream.reports(2), ['output 1', 'output 2']);
  stream.say({ revoke: name });
  stream.task({ attempt: 2 });
  assert.deepEqual(await stream.reports(2), ['output 1', 'output 2']);
  stream.say({ acknowledgment: { uid: UID, attempt: 2, number: 2 } });
  assert.deepEqual(await stream.reports(2), ['output 3', 'output 4']);
  stream.say({ acknowledgment: { uid: UID, attempt: 2, number: 4 } });
  assert.deepEqual(await stream.reports(3), ['output 5', 'checkpoint 5', 'result 5']);
});

test('what cannot be told of an error is left out, and the worker lives on', async (t) => {
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
  const heard = [];
  for (let attempt = 1; attempt <= thrown.length; attempt += 1) {
    stream.task({ attempt });
    const { error } = await stream.hear('report');
    heard.push([error.message, error.details?.data.toString() ?? null]);
  }
  assert.deepEqual(heard, [
    ['whole', '{"n":5}'],
    ['big integer', null],
    ['circular', null],
    ['large', null],
    ['the handler threw what cannot be told', null],
  ]);
});

test('text that has no UTF-8 is made well-formed', async (t) => {
  const { stream } = await start(t, async (context) => {
    await context.progress({ message: 'half \ud83d' });
    await context.output(new Payload('text/\ud83d', Buffer.from('x')));
    throw new Error('half \ud83d');
  });
  stream.welcome();
  stream.task();
  assert.equal((await stream.hear('report')).progress.message, 'half \ufffd');
  assert.equal((await stream.hear('report')).output.contentType, 'text/\ufffd');
  assert.equal((await stream.hear('report')).error.message, 'half \ufffd');
});

test('waits begin anew after a stream on which a heartbeat was answered', async (t) => {
  const processor = await FakeProcessor.start(t);
  /** @param {(stream: import('./support/fake-processor.js').FakeStream) => unknown} speak */
  const wentWellAfter = async (speak) => {
    const nothing = () => {};
    const stream = new WorkStream({
      endpoint: { server: processor.url },
      token: 'token',
      hello: () => ({}),
      attempts: () => [],
      welcomed: nothing,
      task: nothing,
      find: () => undefined,
      drop: nothing,
      draining: nothing,
      tokenEnds: nothing,
      log: nothing,
    });
    const ending = stream.run();
    const seen = await processor.stream();
    await speak(seen);
    return wentWell(await ending);
  };
  /** @param {number} code @param {boolean} answered */
  const after = (code, answered) =>
    wentWellAfter(async (stream) => {
      await stream.hear('hello');
      stream.welcome();
      await stream.hear('heartbeat');
      if (answered) stream.say({ heartbeatReply: {} });
      stream.fail(code, 'gone');
    });
  assert.equal(await after(status.UNAVAILABLE, true), true);
  assert.equal(await after(status.UNAVAILABLE, false), false);
  const { INTERNAL, INVALID_ARGUMENT, OUT_OF_RANGE, RESOURCE_EXHAUSTED } = status;
  for (const code of [INTERNAL, INVALID_ARGUMENT, OUT_OF_RANGE, RESOURCE_EXHAUSTED]) {
    assert.equal(await after(code, true), false);
  }
});

test('a token that cannot be one is refused for good, and not repeated', async () => {
  for (const token of ['secret\nsecond', 'sécret', ' ', '', () => 'secret\u0000']) {
    /** @param {any} error */
    const refused = (error) => {
      assert.deepEqual([error.code, error.status], ['UNAUTHORIZED', status.UNAUTHENTICATED]);
      assert.doesNotMatch(`${error.stack} ${error.cause}`, /s.cret/);
      return true;
    };
    /** @type {string[]} */
    const logged = [];
    const log = (/** @type {string} */ _, /** @type {string} */ text) => void logged.push(text);
    const worker = quietWorker('http://127.0.0.1:1', token, { log });
    await assert.rejects(within(worker.action('act', () => null).serve(), 'refusal'), refused);
    assert.deepEqual(logged, []);
    const client = new Client({ server: 'http://127.0.0.1:1', token });
    await assert.rejects(client.list(), refused);
    await assert.rejects(client.watch('r').next(), refused);
    client.close();
  }
});

test('a worker stops though its token never comes', async () => {
  const asked = new Once('the token to be asked for');
  const worker = quietWorker('http://127.0.0.1:1', () => {
    asked.resolve();
    return new Promise(() => {});
  });
  const serving = worker.action('act', () => null).serve();
  await asked.wait();
  await within(worker.stop(0, 500), 'the worker to stop');
  await serving;
});
