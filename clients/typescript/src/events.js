/**
 * Events of a request's log, and its result, as both clients return them. No dependencies; runs in
 * browsers.
 */

import { RequestCancelled, RequestFailed, StreamerError } from './errors.js';
import { Payload } from './payload.js';

/**
 * Summary of the output, used to verify that the output is complete.
 * @typedef {object} OutputSummary
 * @property {number} chunks Number of valid output chunks, without those that rewinds made void.
 * @property {string} sha256 SHA-256 of the bytes of these chunks, in hexadecimal digits.
 */

/**
 * Position of a queued request: a range, because tenants share the queue fairly.
 * @typedef {object} QueuePosition
 * @property {number} earliest Position if no request of another tenant runs first, from 1.
 * @property {number} latest Position if all requests of other tenants run first, from 1.
 * @property {Date | null} estimatedStartTime Estimated start time; `null` if no estimate is
 *   available.
 */

/**
 * @typedef {object} Progress
 * @property {number | null} percentage From 0 to 100; `null` if unknown.
 * @property {string} message Human-readable description of the current step.
 * @property {any} metadata Metadata from the handler, or `null`.
 */

/**
 * Fields of every event of a request's log.
 * @typedef {object} EventHead
 * @property {string} requestId The caller's ID of the request.
 * @property {string} uid The server's ID of the request.
 * @property {number} seq Position in the log, from 1 without gaps.
 * @property {number} attempt Number of the attempt to which the event belongs, from 1; 0 before the
 *   first attempt.
 * @property {Date} time Time at which the event was reported, according to the server's clock.
 */

/** @typedef {EventHead & {type: 'accepted', action: string}} AcceptedEvent */
/** @typedef {EventHead & {type: 'started', worker: string}} StartedEvent */
/** @typedef {EventHead & {type: 'progress', progress: Progress}} ProgressEvent */
/** @typedef {EventHead & {type: 'output', chunk: Payload, chunkIndex: number}} OutputEvent */
/**
 * The attempt failed or was handed back, and another follows; output with a `seq` above
 * `rewindToSeq` is void.
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
/** @typedef {EventHead & {type: 'unknown'}} UnknownEvent Event of an unknown type. */
/** @typedef {SucceededEvent | FailedEvent | CancelledEvent} TerminalEvent */
/**
 * @typedef {AcceptedEvent | StartedEvent | ProgressEvent | OutputEvent | RetryingEvent |
 *   TerminalEvent | UnknownEvent} Event
 */

/**
 * Callbacks for the events of a request. Returned promises are not awaited. An exception in a
 * callback ends the watch, not the request.
 * @typedef {object} Observer
 * @property {(progress: Progress, event: ProgressEvent) => void} [onProgress]
 * @property {(chunk: any, event: OutputEvent) => void} [onOutput] Receives a chunk: parsed JSON,
 *   text as a string, anything else as bytes. `event.chunk` contains the exact bytes and text.
 * @property {(rewindToSeq: number, event: RetryingEvent) => void} [onRetrying] Called when an
 *   attempt has failed and another follows: output with a `seq` greater than `rewindToSeq` is void.
 * @property {(event: Event) => void} [onEvent] Receives every event, before the other callbacks are
 *   called.
 * @property {OutputBuffer} [output] Collects the valid output.
 */

/** Collects the output of a request in memory, and removes void chunks. */
export class OutputBuffer {
  /** @type {{seq: number, chunk: Payload}[]} */
  #entries = [];

  /**
   * Applies the next event.
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

  /** @returns {string} The concatenated text of the valid chunks. */
  get text() {
    return this.payloads.map((payload) => payload.text).join('');
  }
}

/**
 * Calls the callbacks of an observer for an event.
 * @param {Observer} observer
 * @param {Event} event
 */
export function notify(observer, event) {
  observer.onEvent?.(event);
  observer.output?.apply(event);
  if (event.type === 'progress') observer.onProgress?.(event.progress, event);
  if (event.type === 'output') observer.onOutput?.(event.chunk.value, event);
  if (event.type === 'retrying') observer.onRetrying?.(event.rewindToSeq, event);
}

/**
 * @param {Event} event
 * @returns {event is TerminalEvent} Whether the event is the last event of the log.
 */
export function isTerminal(event) {
  return event.type === 'succeeded' || event.type === 'failed' || event.type === 'cancelled';
}

/**
 * @param {TerminalEvent} event
 * @returns {Payload} The result.
 * @throws {RequestFailed} If the request failed.
 * @throws {RequestCancelled} If the request was cancelled.
 */
export function resultOf(event) {
  if (event.type === 'succeeded') return event.result;
  const { requestId, uid } = event;
  if (event.type === 'cancelled') throw new RequestCancelled(event.reason, { requestId, uid });
  throw requestFailed(event.error, { requestId, uid });
}

/**
 * @param {StreamerError} error
 * @param {{requestId: string, uid: string}} ids
 * @returns {RequestFailed}
 */
export function requestFailed(error, { requestId, uid }) {
  if (error.code === 'CANCELLED') return new RequestCancelled(error.message, { requestId, uid });
  const { code, retryable, details } = error;
  return new RequestFailed(error.message, { code, retryable, details, requestId, uid });
}
