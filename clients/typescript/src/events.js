/**
 * What both clients hand to their callers: the events of a request's log and how it ended. No
 * dependencies; runs in browsers.
 */

import { RequestCancelled, RequestFailed, StreamerError } from './errors.js';
import { Payload } from './payload.js';

/**
 * Proof that a reader has the whole output.
 * @typedef {object} OutputSummary
 * @property {number} chunks How many output chunks are valid, after every rewind.
 * @property {string} sha256 SHA-256 over their bytes, in hexadecimal digits.
 */

/**
 * Where a request stands in the queue: a range, since tenants take turns.
 * @typedef {object} QueuePosition
 * @property {number} earliest From 1, if no other tenant's work comes first.
 * @property {number} latest From 1, if all other tenants' work comes first.
 * @property {Date | null} estimatedStartTime `null` when nothing can be said.
 */

/**
 * @typedef {object} Progress
 * @property {number | null} percentage 0 to 100; `null` when the handler cannot tell.
 * @property {string} message What is being done, for people.
 * @property {any} metadata Anything more, as the handler gave it; `null` when nothing.
 */

/**
 * One entry of a request's log: what every event has, and what its type adds.
 * @typedef {object} EventHead
 * @property {string} requestId The caller's id of the request.
 * @property {string} uid The server's id of it.
 * @property {number} seq Position in the log, from 1 without gaps.
 * @property {number} attempt The attempt it belongs to, from 1; 0 before the first.
 * @property {Date} time When it was reported, by the server's clock.
 */

/** @typedef {EventHead & {type: 'accepted', action: string}} AcceptedEvent */
/** @typedef {EventHead & {type: 'started', worker: string}} StartedEvent */
/** @typedef {EventHead & {type: 'progress', progress: Progress}} ProgressEvent */
/** @typedef {EventHead & {type: 'output', chunk: Payload, chunkIndex: number}} OutputEvent */
/**
 * The attempt failed and another follows; output with a `seq` above `rewindToSeq` is void.
 * @typedef {EventHead & {type: 'retrying', retryAt: Date, rewindToSeq: number,
 *   error: StreamerError}} RetryingEvent
 */
/**
 * @typedef {EventHead & {type: 'succeeded', result: Payload, summary: OutputSummary}}
 *   SucceededEvent
 */
/**
 * @typedef {EventHead & {type: 'failed', error: StreamerError, rewindToSeq: number,
 *   summary: OutputSummary}} FailedEvent
 */
/**
 * @typedef {EventHead & {type: 'cancelled', reason: string, summary: OutputSummary}}
 *   CancelledEvent
 */
/** @typedef {EventHead & {type: 'unknown'}} UnknownEvent Of a kind that a newer server writes. */
/** @typedef {SucceededEvent | FailedEvent | CancelledEvent} TerminalEvent */
/**
 * @typedef {AcceptedEvent | StartedEvent | ProgressEvent | OutputEvent | RetryingEvent |
 *   TerminalEvent | UnknownEvent} Event
 */

/**
 * Callbacks of whoever follows a request. What they return is not waited for; what they throw
 * ends the following, not the request.
 * @typedef {object} Observer
 * @property {(progress: Progress, event: ProgressEvent) => void} [onProgress]
 * @property {(chunk: any, event: OutputEvent) => void} [onOutput] The chunk: JSON parsed, text as
 *   a string, anything else as bytes. `event.chunk` has the exact bytes and text.
 * @property {(rewindToSeq: number, event: RetryingEvent) => void} [onRetrying] An attempt failed
 *   and another follows: drop output whose `seq` is greater than this.
 * @property {(event: Event) => void} [onEvent] Every event, before the callbacks above.
 * @property {OutputBuffer} [output] Keeps the valid output.
 */

/** Gathers a request's output as it comes, and drops what becomes void. Keeps it in memory. */
export class OutputBuffer {
  /** @type {{seq: number, chunk: Payload}[]} */
  #entries = [];

  /**
   * Takes in the next event.
   * @param {Event} event
   */
  apply(event) {
    if (event.type === 'output') this.#entries.push({ seq: event.seq, chunk: event.chunk });
    if (event.type === 'retrying' || event.type === 'failed') {
      this.#entries = this.#entries.filter((entry) => entry.seq <= event.rewindToSeq);
    }
  }

  /** @returns {Payload[]} The valid chunks, in order. */
  get payloads() {
    return this.#entries.map((entry) => entry.chunk);
  }

  /** @returns {any[]} The values of the valid chunks, in order. */
  get values() {
    return this.payloads.map((payload) => payload.value);
  }

  /** @returns {string} The valid chunks as text, one after the other. */
  get text() {
    return this.payloads.map((payload) => payload.text).join('');
  }
}

/**
 * Tells an observer of an event.
 * @param {Observer} observer
 * @param {Event} event
 */
export function tell(observer, event) {
  observer.onEvent?.(event);
  observer.output?.apply(event);
  if (event.type === 'progress') observer.onProgress?.(event.progress, event);
  if (event.type === 'output') observer.onOutput?.(event.chunk.value, event);
  if (event.type === 'retrying') observer.onRetrying?.(event.rewindToSeq, event);
}

/**
 * @param {Event} event
 * @returns {event is TerminalEvent} Whether nothing comes after it.
 */
export function isTerminal(event) {
  return event.type === 'succeeded' || event.type === 'failed' || event.type === 'cancelled';
}

/**
 * @param {TerminalEvent} event
 * @returns {Payload} The result.
 * @throws {RequestFailed} When it ended in failure.
 * @throws {RequestCancelled} When it was cancelled.
 */
export function resultOf(event) {
  if (event.type === 'succeeded') return event.result;
  const { requestId, uid } = event;
  if (event.type === 'cancelled') throw new RequestCancelled(event.reason, { requestId, uid });
  throw requestFailed(event.error, { requestId, uid });
}

/**
 * @param {StreamerError} error Why.
 * @param {{requestId: string, uid: string}} names
 * @returns {RequestFailed}
 */
export function requestFailed(error, { requestId, uid }) {
  if (error.code === 'CANCELLED') return new RequestCancelled(error.message, { requestId, uid });
  const { code, retryable, details } = error;
  return new RequestFailed(error.message, { code, retryable, details, requestId, uid });
}
