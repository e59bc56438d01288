/** Watches a request over as many streams as it takes. */

import { Backoff, sleep } from './backoff.js';
import { eventFrom, stateFrom } from './client-messages.js';
import { callError } from './grpc.js';

/**
 * @param {() => Promise<any>} open Opens a stream after what the reader has.
 * @param {import('./log-reader.js').LogReader} reader
 * @param {string} requestId As the caller named it.
 * @param {AbortSignal} [signal]
 * @returns {AsyncGenerator<import('./events.js').Event, void, void>}
 */
export async function* watchEvents(open, reader, requestId, signal) {
  const backoff = new Backoff({ maxMs: 5000 });
  let names = { requestId, uid: '' };
  while (!reader.ended) {
    signal?.throwIfAborted();
    let heard = false;
    try {
      for await (const response of responses(await open(), signal)) {
        heard = true;
        backoff.reset();
        if (response.snapshot) names = response.snapshot;
        for (const message of response.events) {
          const event = eventFrom(message, names);
          if (reader.accept(event)) yield event;
        }
        if (reader.ended || isPast(response.snapshot, reader)) return;
      }
    } catch (thrown) {
      signal?.throwIfAborted();
      if (!mayReopen(thrown, heard)) throw isCallFailure(thrown) ? callError(thrown) : thrown;
    }
    await sleep(backoff.next(), signal);
  }
}

/**
 * @param {any} snapshot The request when the stream began; only of its first message.
 * @param {import('./log-reader.js').LogReader} reader
 * @returns {boolean} Whether the caller began after the terminal event: nothing comes.
 */
function isPast(snapshot, reader) {
  if (!snapshot || reader.lastSeq === null || Number(snapshot.lastSeq) > reader.lastSeq)
    return false;
  return !['QUEUED', 'RUNNING'].includes(stateFrom(snapshot.state));
}

/**
 * The messages of a stream; ends the stream when the loop is left.
 * @param {any} call
 * @param {AbortSignal} [signal]
 */
async function* responses(call, signal) {
  const aborted = () => call.cancel();
  // What comes after the loop was left concerns nobody.
  call.on('error', () => {});
  signal?.addEventListener('abort', aborted, { once: true });
  try {
    yield* call;
  } finally {
    signal?.removeEventListener('abort', aborted);
    call.cancel();
  }
}

/** @param {any} thrown */
function isCallFailure(thrown) {
  return typeof thrown?.code === 'number' && thrown.metadata !== undefined;
}

/**
 * @param {unknown} thrown
 * @param {boolean} heard Whether the stream had brought anything.
 */
function mayReopen(thrown, heard) {
  if (!isCallFailure(thrown)) return false;
  const error = callError(thrown);
  // The token of a long watch expires while it runs; a fresh one is asked for each time.
  return error.transient || (heard && error.code === 'UNAUTHORIZED');
}
