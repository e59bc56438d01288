/**
 * A worker program: `node worker-process.js URL TOKEN`. For each step, its action `steps` sends one
 * chunk of output, saves a checkpoint, and prints `at <step>`. The first attempt waits before step
 * `hold` until it is stopped or cancelled.
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
