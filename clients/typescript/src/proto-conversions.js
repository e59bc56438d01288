/** Converts between the messages of the gRPC services and the objects of the client API. */

import { StreamerError } from './errors.js';
import { Payload, toPayload } from './payload.js';

/** @typedef {'QUEUED' | 'RUNNING' | 'SUCCEEDED' | 'FAILED' | 'CANCELLED'} RequestState */

/**
 * One request. Times are `null` if they do not apply.
 * @typedef {object} Request
 * @property {string} uid The server's globally unique ID of the request.
 * @property {string} requestId The caller's ID of the request.
 * @property {string} tenantId
 * @property {string} userId
 * @property {string} action
 * @property {RequestState} state
 * @property {number} attempt Number of the latest attempt, from 1; 0 before the first attempt.
 * @property {number} lastSeq `seq` of the latest event.
 * @property {Date | null} createTime
 * @property {Date | null} startTime Start time of the latest attempt.
 * @property {Date | null} finishTime
 * @property {Date | null} notBefore Earliest start time.
 * @property {Date | null} deadline Time by which the request must start; otherwise it fails without
 *   being run.
 * @property {Date | null} closeBy Time by which the request must end; otherwise it fails.
 * @property {number} priority Priority, 0 to 9; a higher priority runs first.
 * @property {import('./events.js').Progress | null} progress Progress of the latest attempt.
 * @property {boolean} cancelRequested
 * @property {Payload | null} metadata Metadata of the caller.
 * @property {Payload | null} payload Payload; returned only by `get`.
 * @property {Payload | null} result Result, if the request succeeded; returned only by `get`.
 * @property {StreamerError | null} error Error of a failed or cancelled request; `null` otherwise.
 * @property {import('./events.js').OutputSummary | null} output Summary of the output of an
 *   ended request; `null` before.
 * @property {string} redriveOf `uid` of the redriven request; empty if the request is not a
 *   redrive.
 * @property {import('./events.js').QueuePosition | null} queuePosition Position in the queue;
 *   `null` unless the request is queued and due.
 */

/**
 * An action that can be requested. Times are in milliseconds; 0 means no limit.
 * @typedef {object} Action
 * @property {string} name
 * @property {string} description
 * @property {boolean} sync Whether a call returns the result directly, and nothing is stored.
 * @property {number} estimatedDurationMs
 * @property {number} maxAttempts
 * @property {number} startToCloseMs
 * @property {number} scheduleToStartMs
 * @property {number} scheduleToCloseMs
 * @property {number} heartbeatTimeoutMs
 * @property {number} initialBackoffMs
 * @property {number} maxBackoffMs
 * @property {string[]} finalErrors
 * @property {string} permission Permission that a caller requires; empty if none is required.
 * @property {number} maxConcurrency
 * @property {any} payloadSchema JSON Schema; `null` if any payload is valid.
 * @property {number} workers Number of workers that offer the action; 0 if the processor runs it
 *   itself or if the action is not available.
 * @property {boolean} available Whether a worker or a processor offers the action.
 */

/**
 * One redriven request.
 * @typedef {object} Redriven
 * @property {string} uid `uid` of the ended request.
 * @property {Request | null} request The new request; `null` in a dry run.
 */

/** @param {any} timestamp @returns {Date} */
function date(timestamp) {
  return new Date(Number(timestamp?.seconds ?? 0) * 1000 + (timestamp?.nanos ?? 0) / 1e6);
}

/** @param {any} timestamp @returns {Date | null} */
export function dateOrNull(timestamp) {
  return timestamp ? date(timestamp) : null;
}

/**
 * @param {Date | number} time A date, or milliseconds since the Unix epoch.
 * @returns {{seconds: number, nanos: number}}
 */
export function timestamp(time) {
  const millis = time instanceof Date ? time.getTime() : time;
  if (!Number.isFinite(millis)) throw new TypeError(`not a time: ${time}`);
  const seconds = Math.floor(millis / 1000);
  return { seconds, nanos: Math.floor((millis - seconds * 1000) * 1e6) };
}

/** @param {number} millis */
export function duration(millis) {
  return timestamp(millis);
}

/** @param {any} payload @returns {Payload} The payload; absent data means `{}`. */
export function payloadFrom(payload) {
  return new Payload(payload?.contentType ?? '', payload?.data ?? Buffer.from('{}'));
}

/** @param {any} payload */
function payloadOrNull(payload) {
  return payload ? payloadFrom(payload) : null;
}

/**
 * @param {unknown} value
 * @param {string} name Name of the value in error messages.
 */
export function payloadTo(value, name) {
  const { contentType, bytes } = toPayload(value, name);
  return { contentType, data: bytes };
}

/** @param {any} error @returns {StreamerError} */
export function errorFrom(error) {
  return new StreamerError(error?.message ?? '', {
    code: String(error?.code ?? '').replace('ERROR_CODE_', ''),
    retryable: error?.retryable ?? false,
    details: error?.details ? payloadFrom(error.details).value : null,
  });
}

/** @param {any} progress @returns {import('./events.js').Progress} */
function progressFrom(progress) {
  return {
    percentage: progress.percentage ?? null,
    message: progress.message,
    metadata: progress.metadata ? payloadFrom(progress.metadata).value : null,
  };
}

/** @param {any} summary @returns {import('./events.js').OutputSummary} */
function summaryFrom(summary) {
  return {
    chunks: Number(summary?.chunks ?? 0),
    sha256: Buffer.from(summary?.sha256 ?? []).toString('hex'),
  };
}

/** @param {any} request @returns {Request} */
export function requestFrom(request) {
  return {
    uid: request.uid,
    requestId: request.requestId,
    tenantId: request.tenantId,
    userId: request.userId,
    action: request.action,
    state: stateFrom(request.state),
    attempt: request.attempt,
    lastSeq: Number(request.lastSeq),
    createTime: dateOrNull(request.createTime),
    startTime: dateOrNull(request.startTime),
    finishTime: dateOrNull(request.finishTime),
    notBefore: dateOrNull(request.notBefore),
    deadline: dateOrNull(request.deadline),
    closeBy: dateOrNull(request.closeBy),
    priority: request.priority,
    progress: request.progress ? progressFrom(request.progress) : null,
    cancelRequested: request.cancelRequested,
    metadata: payloadOrNull(request.metadata),
    payload: payloadOrNull(request.payload),
    result: payloadOrNull(request.result),
    error: request.error ? errorFrom(request.error) : null,
    output: request.output ? summaryFrom(request.output) : null,
    redriveOf: request.redriveOf,
    queuePosition: positionFrom(request.queuePosition),
  };
}

/** @param {any} redriven @returns {Redriven} */
export function redrivenFrom({ uid, request }) {
  return { uid, request: request ? requestFrom(request) : null };
}

/** @param {any} position @returns {import('./events.js').QueuePosition | null} */
export function positionFrom(position) {
  if (!position) return null;
  return {
    earliest: Number(position.earliest),
    latest: Number(position.latest),
    estimatedStartTime: dateOrNull(position.estimatedStartTime),
  };
}

/** @param {string} state @returns {RequestState} */
export function stateFrom(state) {
  return /** @type {RequestState} */ (String(state).replace('REQUEST_STATE_', ''));
}

/** @param {any} action @returns {Action} */
export function actionFrom(action) {
  const { name, description, sync, maxAttempts, permission, maxConcurrency, workers, available } =
    action;
  const times = /** @type {const} */ ([
    'estimatedDurationMs',
    'startToCloseMs',
    'scheduleToStartMs',
    'scheduleToCloseMs',
    'heartbeatTimeoutMs',
    'initialBackoffMs',
    'maxBackoffMs',
  ]);
  const millis = /** @type {Record<typeof times[number], number>} */ (
    Object.fromEntries(times.map((field) => [field, Number(action[field])]))
  );
  const finalErrors = action.finalErrors.map((/** @type {any} */ code) =>
    String(code).replace('ERROR_CODE_', ''),
  );
  const payloadSchema = action.payloadSchema ? JSON.parse(action.payloadSchema) : null;
  return {
    name,
    description,
    sync,
    maxAttempts,
    permission,
    maxConcurrency,
    workers,
    available,
    finalErrors,
    payloadSchema,
    ...millis,
  };
}

/**
 * @param {any} event
 * @param {{requestId: string, uid: string}} ids
 * @returns {import('./events.js').Event}
 */
export function eventFrom(event, { requestId, uid }) {
  const { attempt } = event;
  const head = { requestId, uid, seq: Number(event.seq), attempt, time: date(event.time) };
  const body = event[event.kind];
  switch (event.kind) {
    case 'accepted':
      return { ...head, type: 'accepted', action: body.action };
    case 'started':
      return { ...head, type: 'started', worker: body.worker };
    case 'progress':
      return { ...head, type: 'progress', progress: progressFrom(body) };
    case 'output': {
      const chunkIndex = Number(body.chunkIndex);
      return { ...head, type: 'output', chunk: payloadFrom(body.data), chunkIndex };
    }
    case 'retrying': {
      const rewindToSeq = Number(body.rewindToSeq);
      const retryAt = date(body.retryAt);
      return { ...head, type: 'retrying', retryAt, rewindToSeq, error: errorFrom(body.error) };
    }
    case 'succeeded': {
      const result = payloadFrom(body.result);
      return { ...head, type: 'succeeded', result, summary: summaryFrom(body.output) };
    }
    case 'failed': {
      const rewindToSeq = Number(body.rewindToSeq);
      const [error, summary] = [errorFrom(body.error), summaryFrom(body.output)];
      return { ...head, type: 'failed', error, rewindToSeq, summary };
    }
    case 'cancelled':
      return { ...head, type: 'cancelled', reason: body.reason, summary: summaryFrom(body.output) };
    default:
      return { ...head, type: 'unknown' };
  }
}
