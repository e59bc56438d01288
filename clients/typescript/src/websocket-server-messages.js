/**
 * Converts messages from the server in protocol `streamer.v1.json` to the objects of the client
 * API. No dependencies; runs in browsers.
 */

import { StreamerError } from './errors.js';
import { JSON_TYPE, Payload, TEXT_TYPE, utf8 } from './payload.js';
import { rawElements, rawMembers } from './websocket-json.js';

/**
 * One message from the server: the parsed JSON and its source text.
 * @typedef {object} Message
 * @property {any} body
 * @property {string} text
 */

/**
 * One request, as returned by `get` and `list`. Times are `null` if they do not apply.
 * @typedef {object} RequestInfo
 * @property {string} requestId
 * @property {string} uid
 * @property {string} userId
 * @property {string} action
 * @property {'QUEUED' | 'RUNNING' | 'SUCCEEDED' | 'FAILED' | 'CANCELLED'} state
 * @property {number} attempt Number of the latest attempt, from 1; 0 before the first attempt.
 * @property {number} lastSeq `seq` of the latest event.
 * @property {number} priority
 * @property {boolean} cancelRequested
 * @property {Date | null} createTime
 * @property {Date | null} startTime
 * @property {Date | null} finishTime
 * @property {Date | null} notBefore
 * @property {Date | null} deadline
 * @property {Date | null} closeBy Time by which the request must end; otherwise it fails.
 * @property {import('./events.js').QueuePosition | null} queuePosition Position in the queue;
 *   `null` unless the request is queued and due.
 * @property {string} redriveOf
 * @property {import('./events.js').Progress | null} progress
 * @property {Payload | null} metadata Metadata of the caller.
 * @property {Payload | null} payload Payload; returned only by `get`.
 * @property {Payload | null} result Result, if the request succeeded; returned only by `get`.
 * @property {StreamerError | null} error
 * @property {import('./events.js').OutputSummary | null} output
 */

/**
 * @param {any} error
 * @returns {StreamerError}
 */
export function errorFrom(error) {
  const { code, message = '', retryable, details } = error ?? {};
  return new StreamerError(message, { code, retryable, details });
}

/**
 * Returns the payload in a member, which contains JSON as its source text, text as a string, and
 * all other payloads in base64.
 * @param {Message} message
 * @param {string} name Name of the member.
 * @returns {Payload}
 */
export function payloadFrom({ body, text }, name) {
  const { content_type: contentType = JSON_TYPE, encoding } = body;
  if (encoding === 'base64') return new Payload(contentType, fromBase64(body[name]));
  if (contentType !== JSON_TYPE) return new Payload(contentType || TEXT_TYPE, utf8(body[name]));
  return new Payload(JSON_TYPE, utf8(rawMembers(text).get(name) ?? 'null'));
}

/**
 * @param {string} text
 * @returns {Uint8Array}
 */
function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let index = 0; index < binary.length; index += 1) bytes[index] = binary.charCodeAt(index);
  return bytes;
}

/**
 * @param {any} body
 * @returns {import('./events.js').Progress}
 */
function progressFrom({ percentage = null, message = '', metadata = null }) {
  return { percentage, message, metadata };
}

/**
 * @param {any} output
 * @returns {import('./events.js').OutputSummary}
 */
function summaryFrom(output) {
  return { chunks: output?.chunks ?? 0, sha256: output?.sha256 ?? '' };
}

/**
 * @param {any} position
 * @returns {import('./events.js').QueuePosition | null}
 */
export function positionFrom(position) {
  if (!position) return null;
  const { earliest, latest, estimated_start_time: start } = position;
  return { earliest, latest, estimatedStartTime: start ? new Date(start) : null };
}

/**
 * Returns the event of a request's log in a message.
 * @param {Message} message A message with a `seq`.
 * @returns {import('./events.js').Event}
 */
export function eventFrom(message) {
  const { body } = message;
  const { request_id: requestId, uid, seq, attempt, timestamp } = body;
  const head = { requestId, uid, seq, attempt, time: new Date(timestamp) };
  switch (body.type) {
    case 'accepted':
      return { ...head, type: 'accepted', action: body.action };
    case 'started':
      return { ...head, type: 'started', worker: body.worker };
    case 'progress':
      return { ...head, type: 'progress', progress: progressFrom(body) };
    case 'output': {
      const chunk = payloadFrom(message, 'data');
      return { ...head, type: 'output', chunk, chunkIndex: body.chunk_index };
    }
    case 'retrying': {
      const retryAt = new Date(body.retry_at);
      const { rewind_to_seq: rewindToSeq } = body;
      return { ...head, type: 'retrying', retryAt, rewindToSeq, error: errorFrom(body.error) };
    }
    case 'complete': {
      const result = payloadFrom(message, 'result');
      return { ...head, type: 'succeeded', result, summary: summaryFrom(body.output) };
    }
    case 'error': {
      const { rewind_to_seq: rewindToSeq } = body;
      const [error, summary] = [errorFrom(body.error), summaryFrom(body.output)];
      return { ...head, type: 'failed', error, rewindToSeq, summary };
    }
    case 'cancelled':
      return { ...head, type: 'cancelled', reason: body.reason, summary: summaryFrom(body.output) };
    default:
      return { ...head, type: 'unknown' };
  }
}

/**
 * @param {Message} message A message, or one element of its `requests`.
 * @returns {RequestInfo}
 */
export function requestFrom({ body, text }) {
  const members = rawMembers(text);
  const json = (/** @type {string} */ name) => {
    const raw = members.get(name);
    return raw === undefined ? null : new Payload(JSON_TYPE, utf8(raw));
  };
  const date = (/** @type {string | undefined} */ time) => (time ? new Date(time) : null);
  return {
    requestId: body.request_id,
    uid: body.uid,
    userId: body.user_id,
    action: body.action,
    state: body.state,
    attempt: body.attempt,
    lastSeq: body.last_seq,
    priority: body.priority,
    cancelRequested: body.cancel_requested,
    createTime: date(body.create_time),
    startTime: date(body.start_time),
    finishTime: date(body.finish_time),
    notBefore: date(body.not_before),
    deadline: date(body.deadline),
    closeBy: date(body.close_by),
    queuePosition: positionFrom(body.queue_position),
    redriveOf: body.redrive_of ?? '',
    progress: body.progress ? progressFrom(body.progress) : null,
    metadata: json('metadata'),
    payload: json('payload'),
    result: json('result'),
    error: body.error ? errorFrom(body.error) : null,
    output: body.output ? summaryFrom(body.output) : null,
  };
}

/**
 * Returns the page of requests in a message.
 * @param {Message} message
 * @returns {{requests: RequestInfo[], nextPageToken: string}}
 */
export function pageFrom({ body, text }) {
  const texts = rawElements(rawMembers(text).get('requests') ?? '[]');
  const requests = texts.map((one, index) =>
    requestFrom({ body: body.requests[index], text: one }),
  );
  return { requests, nextPageToken: body.next_page_token ?? '' };
}
