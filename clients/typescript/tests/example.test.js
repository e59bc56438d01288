/** Tests of the example worker `examples/workers/analyze_log.js`, without a server. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { analyzeLog, parseLine, sampleLog } from '../../../examples/workers/analyze_log.js';
import { runHandler } from '../src/testing.js';

test('lines of both formats are parsed, others are not', () => {
  const common = '203.0.113.9 - frank [10/Oct/2000:13:55:36 -0700] "GET /a?b=c HTTP/1.0" 200 2326';
  const entry = {
    client: '203.0.113.9',
    hour: '2000-10-10T13',
    path: '/a',
    status: 200,
    bytes: 2326,
  };
  assert.deepEqual(parseLine(common), entry);
  assert.deepEqual(parseLine(`${common} "http://x/" "M \\"8\\""`), entry);
  assert.equal(parseLine(common.replace('2326', '-'))?.bytes, 0);
  assert.equal(parseLine(common.replace('GET /a?b=c HTTP/1.0', '-'))?.path, '-');
  assert.equal(parseLine('nonsense'), null);
  assert.equal(parseLine(common.replace('Oct', 'Foo')), null);
});

test('every section is an output chunk, and the result contains all of them', async () => {
  const { result, output, progress, error } = await runHandler(analyzeLog, {
    log: `${sampleLog(5000)}\n`,
    top: 2,
  });
  assert.equal(error, null);
  assert.equal(result.lines, 5000);
  assert.equal(result.traffic.requests + result.traffic.bad_lines, 5000);
  assert.equal(result.traffic.bad_lines, 1);
  assert.deepEqual(Object.keys(result.traffic.statuses), ['200', '304', '404', '500']);
  assert.deepEqual([result.top_paths.length, result.top_clients.length], [2, 2]);
  const sections = Object.fromEntries(output.map(({ value }) => [value.section, value.data]));
  assert.deepEqual({ lines: 5000, ...sections }, result);
  const percentages = progress.map(({ percentage }) => percentage ?? -1);
  assert.deepEqual(
    percentages,
    [...percentages].sort((a, b) => a - b),
  );
  assert.equal(percentages.at(-1), 100);
});

test('a second attempt resumes from the checkpoint, and sends all output', async () => {
  const payload = { log: sampleLog(3000) };
  const full = await runHandler(analyzeLog, payload);
  const [, partial] = full.checkpoints.map((checkpoint) => JSON.stringify(checkpoint));
  const resumed = await runHandler(analyzeLog, payload, {
    checkpoint: JSON.parse(partial),
    attempt: 2,
  });
  assert.deepEqual(resumed.result, full.result);
  assert.equal(resumed.outputText, full.outputText);
  assert.ok(resumed.progress.length < full.progress.length);
});

test('an invalid payload is rejected', async () => {
  const invalidField = async (/** @type {unknown} */ payload) =>
    (await runHandler(analyzeLog, payload)).error?.violations[0].field;
  assert.equal(await invalidField({}), 'log');
  assert.equal(await invalidField({ log: '  ' }), 'log');
  assert.equal(await invalidField({ log: 'x', top: 0 }), 'top');
  const cancelled = await runHandler(analyzeLog, { log: 'x' }, { signal: AbortSignal.abort() });
  assert.equal(cancelled.error?.code, 'CANCELLED');
});
