/**
 * A worker in a process of its own: `node worker-process.js URL TOKEN`. Its action `steps` makes
 * one chunk of output and one checkpoint a step, then says `at <step>` on standard output, and
 * waits before the step `hold` until it is stopped or cancelled.
 */

import { Worker } from '../../src/index.js';

const [server, token] = process.argv.slice(2);
const worker = new Worker({ server, token, slots: 2 });

worker.action('steps', async (context, { steps, hold }) => {
  const begin = context.checkpoint?.done ?? 0;
  for (let step = begin; step < steps; step += 1) {
    if (step === hold && context.attempt === 1) await context.sleep(2 ** 31);
    await context.output(`${step};`);
    await context.saveCheckpoint({ done: step + 1 });
    process.stdout.write(`at ${step + 1}\n`);
  }
  return { begin, attempt: context.attempt };
});

await worker.run({ graceMs: 0 });
process.stdout.write('stopped\n');
