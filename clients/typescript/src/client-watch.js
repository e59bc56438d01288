/** Watches a request, and reopens lost streams. */

import { Backoff, sleep } from './backoff.js';
import { eventFrom, stateFrom } from './proto-conversions.js';
import { callError } from './grpc.js';

/**
 * @param {() => Promise<any>} open Opens a stream after the last event that the reader accepted.
 * @param {import('./log-reader.js').LogReader} reader
 * @param {string} requestId `requestId` or `uid`.
 * @param {AbortSignal} [signal]
 * @returns {AsyncGenerator<import('./events.js').Event, void, void>}
 */
export async function* watchEvents(open, reader, requestId, signal) {
  const backoff = new Backoff({ maxMs: 5000 });
  let ids = { requestId, uid: '' };
  while (!reader.ended) {
    signal?.throwIfAborted();
    let received = false;
    try {
      for await (const response of responses(await open(), signal)) {
        received = true;
        backoff.reset();
        if (response.snapshot) ids = response.snapshot;
        for (const message of response.events) {
          const event = eventFrom(message, ids);
          if (reader.accept(event)) yield event;
        }
        if (reader.ended || hasNoEventsLeft(response.snapshot, reader)) return;
      }
    } catch (thrown) {
      signal?.throwIfAborted();
      if (!isRetryable(thrown, received)) {
        throw isCallFailure(thrown) ? callError(thrown) : thrown;
      }
    }
    await sleep(backoff.next(), signal);
  }
}

/**
 * @param {any} snapshot The request at the start of the stream; set only in its first message.
 * @param {import('./log-reader.js').LogReader} reader
 * @returns {boolean} Whether the reader is past the terminal event, so that no events follow.
 */
function hasNoEventsLeft(snapshot, reader) {
  if (!snapshot || reader.lastSeq === null || Number(snapshot.lastSeq) > reader.lastSeq)
    return false;
  return !['QUEUED', 'RUNNING'].includes(stateFrom(snapshot.state));
}

/**
 * Yields the messages of a stream; cancels the stream when the caller stops iterating.
 * @param {any} call
 * @param {AbortSignal} [signal]
 */
async function* responses(call, signal) {
  const onAbort = () => call.cancel();
  // Ignores errors that occur after the caller has stopped iterating.
  call.on('error', () => {});
  signal?.addEventListener('abort', onAbort, { once: true });
  try {
    yield* call;
  } finally {
    signal?.removeEventListener('abort', onAbort);
    call.cancel();
  }
}

/** @param {any} thrown */
function isCallFailure(thrown) {
  return typeof thrown?.code === 'number' && thrown.metadata !== undefined;
}

/**
 * @param {unknown} thrown
 * @param {boolean} received Whether the stream has delivered a message.
 */
function isRetryable(thrown, received) {
  if (!isCallFailure(thrown)) return false;
  const error = callError(thrown);
  // The token of a long watch may expire while the stream is open; a new stream uses a fresh token.
  return error.transient || (received && error.code === 'UNAUTHORIZED');
}
