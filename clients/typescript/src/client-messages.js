/** Between the messages of the gRPC services and the objects that the client hands out. */

import { StreamerError } from './errors.js';
import { Payload, toPayload } from './payload.js';

/** @typedef {'QUEUED' | 'RUNNING' | 'SUCCEEDED' | 'FAILED' | 'CANCELLED'} RequestState */

/**
 * One unit of asked-for work. Times are `null` where they do not apply.
 * @typedef {object} Request
 * @property {string} uid The server's globally unique id.
 * @property {string} requestId The id under which the caller submitted it.
 * @property {string} tenantId
 * @property {string} userId
 * @property {string} action
 * @property {RequestState} state
 * @property {number} attempt The latest, from 1; 0 before the first.
 * @property {number} lastSeq `seq` of its latest event.
 * @property {Date | null} createTime
 * @property {Date | null} startTime When its latest attempt began.
 * @property {Date | null} finishTime
 * @property {Date | null} notBefore It does not start before this.
 * @property {Date | null} deadline It fails unrun when it has not started by then.
 * @property {Date | null} closeBy It fails when it has not ended by then.
 * @property {number} priority 0 to 9; higher runs first.
 * @property {import('./events.js').Progress | null} progress Of the latest attempt.
 * @property {boolean} cancelRequested
 * @property {Payload | null} metadata What the caller attached.
 * @property {Payload | null} payload Its input; only of `get`.
 * @property {Payload | null} result Only of `get`, when it succeeded.
 * @property {StreamerError | null} error Why, when it failed or was cancelled.
 * @property {import('./events.js').OutputSummary | null} output Proof of its output, once ended.
 * @property {string} redriveOf `uid` of the request that it repeats; empty when it repeats none.
 * @property {import('./events.js').QueuePosition | null} queuePosition While it waits and is due.
 */

/**
 * What can be asked for. Times are milliseconds; 0 means no limit.
 * @typedef {object} Action
 * @property {string} name
 * @property {string} description
 * @property {boolean} sync Whether it is answered at once.
 * @property {number} estimatedDurationMs
 * @property {number} maxAttempts
 * @property {number} startToCloseMs
 * @property {number} scheduleToStartMs
 * @property {number} scheduleToCloseMs
 * @property {number} heartbeatTimeoutMs
 * @property {number} initialBackoffMs
 * @property {number} maxBackoffMs
 * @property {string[]} finalErrors
 * @property {string} permission Empty when none is needed.
 * @property {number} maxConcurrency
 * @property {any} payloadSchema JSON Schema; `null` when any payload will do.
 * @property {number} workers How many workers offer it; 0 when the server itself does, or nobody.
 * @property {boolean} available Whether somebody offers it now.
 */

/**
 * One of many requests that were redriven.
 * @typedef {object} Redriven
 * @property {string} uid Of the ended request.
 * @property {Request | null} request The new one; `null` in a dry run.
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
 * @param {Date | number} time A date, or milliseconds since 1970.
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

/** @param {any} payload @returns {Payload} An absent body is `{}`. */
export function payloadFrom(payload) {
  return new Payload(payload?.contentType ?? '', payload?.data ?? Buffer.from('{}'));
}

/** @param {any} payload */
function payloadOrNull(payload) {
  return payload ? payloadFrom(payload) : null;
}

/**
 * @param {unknown} value
 * @param {string} name What it is, for the error.
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
 * @param {{requestId: string, uid: string}} names
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
