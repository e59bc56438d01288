/** Unit tests, without a server. */

import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { test } from 'node:test';

import {
  FatalError,
  InvalidPayload,
  LimitError,
  OutputBuffer,
  Payload,
  RawJson,
  Worker,
} from '../src/index.js';
import { Backoff } from '../src/backoff.js';
import { LogReader } from '../src/log-reader.js';
import { Sha256, hex } from '../src/sha256.js';
import { runHandler } from '../src/testing.js';
import { rawElements, rawMembers } from '../src/websocket-json.js';
import { ReportQueue } from '../src/worker-report-queue.js';

const head = { requestId: 'r', uid: 'u', attempt: 1, time: new Date(0) };
const sha256 = (/** @type {string} */ text) => createHash('sha256').update(text).digest('hex');

/** @param {number} seq @param {string} text @returns {import('../src/events.js').Event} */
function output(seq, text, attempt = 1) {
  const chunk = new Payload('text/plain', Buffer.from(text));
  return { ...head, attempt, seq, type: 'output', chunk, chunkIndex: 0 };
}

/** @param {number} seq @param {number} rewindToSeq @returns {any} */
function retrying(seq, rewindToSeq) {
  return { ...head, seq, type: 'retrying', rewindToSeq };
}

/** @param {number} seq @param {number} chunks @param {string} text @returns {any} */
function succeeded(seq, chunks, text) {
  return { ...head, seq, type: 'succeeded', summary: { chunks, sha256: sha256(text) } };
}

test('the hash equals that of node:crypto for any split, and can be copied', () => {
  for (let size = 0; size < 260; size += 1) {
    const bytes = randomBytes(size);
    const split = Math.floor(size / 3);
    const hash = new Sha256().update(bytes.subarray(0, split));
    const copy = hash.copy();
    hash.update(bytes.subarray(split));
    assert.equal(hex(hash.digest()), createHash('sha256').update(bytes).digest('hex'));
    copy.update(bytes.subarray(split));
    assert.deepEqual(copy.digest(), hash.digest());
  }
});

test('members keep their source text', () => {
  const text =
    ' {"a" : 9223372036854775807 ,"b\\"":{"x":[1,{"y":"},]\\\\"}]}\n,"c":"é\\u0041,}","d":[]}';
  const members = rawMembers(text);
  assert.deepEqual([...members.keys()], Object.keys(JSON.parse(text)));
  assert.equal(members.get('a'), ' 9223372036854775807 ');
  assert.equal(members.get('b"'), '{"x":[1,{"y":"},]\\\\"}]}\n');
  assert.equal(members.get('c'), '"é\\u0041,}"');
  assert.deepEqual([...rawMembers('{}'), ...rawMembers('[1]'), ...rawMembers('"{"')], []);
  assert.equal(rawMembers('{"a":1,"a":2}').get('a'), '2');
  assert.deepEqual(rawElements('[{"a":[1,2]}, "],[" ,3]'), ['{"a":[1,2]}', ' "],[" ', '3']);
  assert.deepEqual(rawElements(' [ ] '), []);
});

test('a log is read once, and verified after every rewind', () => {
  const reader = new LogReader();
  const buffer = new OutputBuffer();
  const events = [
    output(1, 'void', 1),
    output(2, 'too', 1),
    retrying(3, 0),
    output(4, 'again', 2),
    retrying(5, 3),
    output(6, 'a', 3),
    output(7, 'b', 3),
    succeeded(8, 2, 'ab'),
  ];
  for (const event of events) {
    assert.equal(reader.accept(event), true);
    assert.equal(reader.accept(event), false, 'a duplicate is ignored');
    buffer.apply(event);
  }
  assert.equal(reader.ended, true);
  assert.equal(buffer.text, 'ab');
});

test('a log with a missing event or wrong output is rejected', () => {
  const missing = new LogReader();
  missing.accept(output(1, 'a'));
  assert.throws(() => missing.accept(output(3, 'c')), { code: 'INTEGRITY' });
  const wrong = new LogReader();
  wrong.accept(output(1, 'x'));
  assert.throws(() => wrong.accept(succeeded(2, 1, 'a')), /SHA-256/);
  const fewer = new LogReader({ allowGaps: true });
  fewer.accept(output(2, 'b'));
  assert.throws(() => fewer.accept(succeeded(3, 2, 'ab')), /received 1 chunks, .* has 2/);
  const partial = new LogReader({ afterSeq: 1 });
  assert.equal(partial.accept(succeeded(2, 1, 'a')), true, 'a partial log is not verified');
});

test('reports are bounded, numbered, and sent again after the last durable one', () => {
  const window = { maxUnacknowledged: 3, maxUnacknowledgedBytes: 100 };
  const queue = new ReportQueue();
  const sent = () => {
    const all = [];
    for (let next = queue.next(window); next; next = queue.next(window)) all.push(next);
    return all.map(({ kind, number, body }) => `${kind} ${number} ${body}`);
  };
  queue.addCounted('progress', 'p1', 1);
  queue.addCheckpoint(Buffer.from('c1'));
  queue.addCounted('output', 'o2', 1);
  queue.addCheckpoint(Buffer.from('c2'));
  queue.addKeepAlive();
  assert.deepEqual(sent(), ['progress 1 p1', 'output 2 o2', 'checkpoint 2 c2']);
  queue.addKeepAlive();
  assert.deepEqual(sent(), ['keepAlive 2 [object Object]']);
  queue.addCounted('output', 'o3', 98);
  assert.equal(queue.hasRoom(window), false);
  queue.addFinal('result', 'r');
  assert.deepEqual(sent(), ['output 3 o3', 'result 3 r']);
  queue.resume(2);
  assert.deepEqual(sent(), ['checkpoint 2 c2', 'output 3 o3', 'result 3 r']);
  queue.acknowledge(3);
  assert.equal(queue.hasRoom(window), true);
  queue.resume(3);
  assert.deepEqual(sent(), ['result 3 r'], 'a checkpoint is durable with a later report');
});

test('the send window limits reports that are sent again', () => {
  const queue = new ReportQueue();
  for (let number = 1; number <= 4; number += 1) queue.addCounted('output', number, 1);
  const window = { maxUnacknowledged: 2, maxUnacknowledgedBytes: 100 };
  const next = () => queue.next(window)?.number;
  assert.deepEqual([next(), next(), next()], [1, 2, undefined]);
  queue.acknowledge(1);
  assert.deepEqual([next(), next()], [3, undefined]);
});

test('dropped reports are sent again from the first one, within the window', () => {
  const queue = new ReportQueue();
  for (let number = 1; number <= 3; number += 1) queue.addCounted('output', number, 1);
  queue.addCheckpoint(Buffer.from('c'));
  queue.addFinal('result', 'r');
  const window = { maxUnacknowledged: 3, maxUnacknowledgedBytes: 100 };
  const sent = (limits = window) => {
    const all = [];
    for (let next = queue.next(limits); next; next = queue.next(limits)) all.push(next);
    return all.map(({ kind, number }) => `${kind} ${number}`);
  };
  assert.deepEqual(sent(), ['output 1', 'output 2', 'output 3', 'checkpoint 3', 'result 3']);
  queue.resend(3, 1);
  assert.equal(queue.resends, 1);
  assert.deepEqual(sent(), ['checkpoint 3', 'result 3']);
  queue.resend(1, 2);
  assert.deepEqual(sent({ ...window, maxUnacknowledged: 2 }), ['output 2']);
  queue.resume(2);
  assert.equal(queue.resends, 0);
  assert.deepEqual(sent(), ['output 3', 'checkpoint 3', 'result 3']);
});

test('delays are drawn below a bound that doubles', () => {
  const backoff = new Backoff({ random: () => 1 });
  const delays = Array.from({ length: 9 }, () => backoff.next());
  assert.deepEqual(delays, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
  backoff.reset();
  assert.equal(backoff.next(), 100);
});

test('runHandler records the reports of a handler', async () => {
  const recording = await runHandler(
    async (context, payload) => {
      await context.progress({ percentage: 50, message: 'half', metadata: { rows: 1 } });
      await context.output('text');
      await context.output({ row: 1 });
      await context.saveCheckpoint({ at: payload.at + 1 });
      await context.heartbeat();
      return new RawJson(context.payloadText);
    },
    new RawJson('{"at":1,"n":9223372036854775807}'),
    { checkpoint: { at: 1 }, attempt: 2 },
  );
  assert.equal(recording.error, null);
  assert.equal(recording.resultText, '{"at":1,"n":9223372036854775807}');
  assert.deepEqual(recording.progress, [
    { percentage: 50, message: 'half', metadata: { rows: 1 } },
  ]);
  assert.equal(recording.outputText, 'text{"row":1}');
  assert.deepEqual([recording.checkpoint, recording.heartbeats], [{ at: 2 }, 1]);
});

test('runHandler records errors as a worker reports them', async () => {
  const failed = async (/** @type {any} */ handler, /** @type {any} */ options = {}) =>
    (await runHandler(handler, {}, options)).error;
  const invalid = await failed(() => {
    throw new InvalidPayload('rows[3]', 'must be positive, is -1');
  });
  assert.deepEqual([invalid?.code, invalid?.retryable], ['VALIDATION_ERROR', false]);
  assert.deepEqual(invalid?.violations, [
    { field: 'rows[3]', description: 'must be positive, is -1' },
  ]);
  const plain = await failed(() => Promise.reject(new RangeError('no')));
  assert.deepEqual([plain?.code, plain?.retryable], ['PROCESSING_FAILED', true]);
  const large = await failed(
    (/** @type {import('../src/index.js').Context} */ context) => context.output('123456'),
    { maxOutputChunkBytes: 5 },
  );
  assert.ok(large instanceof FatalError);
  assert.equal(large?.message, 'output must be at most 5 bytes, is 6');
  const signal = AbortSignal.abort();
  const cancelled = await failed(
    (/** @type {import('../src/index.js').Context} */ context) => context.sleep(60_000),
    { signal },
  );
  assert.equal(cancelled?.code, 'CANCELLED');
});

test('invalid declarations and options throw', () => {
  const worker = new Worker({ server: 'http://127.0.0.1:1', token: 'x' });
  assert.throws(() => worker.action('No', () => null), /must match/);
  assert.throws(() => worker.action('a', { maxAttempts: -1 }, () => null), /maxAttempts/);
  assert.throws(() => worker.action('a', { maxAttempts: 0 }, () => null), /at least 1/);
  assert.throws(() => new Worker({ server: 'localhost:1', token: 'x' }), /http:\/\//);
  assert.throws(() => new Worker({ server: 'http://x', token: 'x', slots: 0 }), /slots/);
  assert.throws(() => new RawJson('{'), SyntaxError);
  assert.equal(new LimitError('output', 6, 5).limit, 5);
});

test('invalid reports reject, and a report that is not awaited is still sent', async () => {
  const { error, output } = await runHandler(async (context) => {
    await assert.rejects(context.progress(101), RangeError);
    await assert.rejects(context.output(5n), /cannot be encoded as JSON/);
    await assert.rejects(context.saveCheckpoint('x'.repeat(300_000)), { field: 'checkpoint' });
    await assert.rejects(context.progress({ message: 'x'.repeat(5000) }), { limit: 4096 });
    context.output('not awaited');
  });
  assert.equal(error, null);
  assert.equal(output.length, 1);
});
