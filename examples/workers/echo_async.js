/**
 * JavaScript worker of the built-in action `echo_async`, for tests and load generators. The payload
 * sets the number of progress reports and output chunks, their interval, the number of failing
 * attempts, and the result.
 *
 *     streamer up --set execution.builtin_actions=echo
 *     export STREAMER_TOKEN=$(streamer token --permissions 'worker:*')
 *     node examples/workers/echo_async.js
 *
 * It reads STREAMER_SERVER, STREAMER_TOKEN or STREAMER_TOKEN_FILE, and STREAMER_SLOTS.
 */

import { HandlerError, Worker, tokenFile } from '../../clients/typescript/src/index.js';

/**
 * Runs the number of steps, and fails the number of attempts, that the payload specifies.
 * @param {import('../../clients/typescript/src/index.js').Context} context
 * @param {any} payload
 */
async function echoAsync(context, payload) {
  const { steps = 10, delay_ms: delay = 0, output_chunks: chunks = 0, result = null } = payload;
  const text = 'x'.repeat(payload.chunk_bytes ?? 64);
  const fails = context.attempt <= (payload.fail_attempts ?? 0);
  const part = fails ? 0.5 : 1;
  let emitted = 0;
  for (let step = 1; step <= Math.floor(steps * part); step += 1) {
    context.signal.throwIfAborted();
    if (delay > 0) await context.sleep(delay);
    await context.progress({ percentage: (100 * step) / steps, message: `step ${step} of ${steps}` });
    for (; emitted < Math.floor((chunks * step) / steps); emitted += 1) await context.output([text]);
  }
  // If there are no steps, no chunk has been emitted yet.
  for (; emitted < Math.floor(chunks * part); emitted += 1) {
    context.signal.throwIfAborted();
    await context.output([text]);
  }
  if (fails) throw new HandlerError(`attempt ${context.attempt} fails as requested`, { retryable: true });
  return result;
}

const server = process.env.STREAMER_SERVER ?? 'http://127.0.0.1:8080';
const file = process.env.STREAMER_TOKEN_FILE;
const token = file ? tokenFile(file) : process.env.STREAMER_TOKEN;
if (!token) throw new TypeError('set STREAMER_TOKEN_FILE or STREAMER_TOKEN');
const slots = Number(process.env.STREAMER_SLOTS ?? 8);
await new Worker({ server, token, slots })
  .action('echo_async', { maxAttempts: 10, initialBackoffMs: 100 }, echoAsync)
  .run();
