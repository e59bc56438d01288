/**
 * The gRPC client, for Node: submit requests, follow them to their end, ask about them. Lost
 * connections are opened again by themselves; nothing is seen twice or missed.
 */

import { createHash, randomUUID } from 'node:crypto';

import {
  actionFrom,
  duration,
  errorFrom,
  payloadFrom,
  payloadTo,
  positionFrom,
  redrivenFrom,
  requestFrom,
  stateFrom,
  timestamp,
} from './client-messages.js';
import { watchEvents } from './client-watch.js';
import { Backoff, sleep } from './backoff.js';
import { isTerminal, requestFailed, resultOf, tell } from './events.js';
import { authorization, callError, connect } from './grpc.js';
import { LogReader } from './log-reader.js';
import { ProgressService, RouterService } from './schema.js';

/** @typedef {import('./client-messages.js').Request} Request */
/** @typedef {import('./client-messages.js').RequestState} RequestState */

/**
 * @typedef {object} CallOptions
 * @property {AbortSignal} [signal] Gives the call up; its reason is what the promise rejects with.
 * @property {number} [timeoutMs] Longest time for the call and its repetitions while the server
 *   cannot be reached, in milliseconds; default 30,000.
 */

/**
 * @typedef {object} SubmitOptions
 * @property {string} [id] Idempotency and correlation key: 1 to 128 of `[A-Za-z0-9._:@/+=-]`.
 *   Without one a random one is made, so that the call can be repeated safely.
 * @property {number} [waitMs] How long to wait for the outcome, 0 to 300,000 ms; default 0.
 * @property {number} [priority] 0 (default) to 9; higher runs first.
 * @property {number} [delayMs] Do not start earlier than this from now: 0 to 30 days, in ms.
 * @property {Date | number} [deadline] Fail unrun when not started by then; a number is
 *   milliseconds since 1970.
 * @property {object | import('./payload.js').RawJson} [metadata] Kept with the request; at most
 *   16 KiB of JSON.
 */

/**
 * The answer to a submission.
 * @typedef {object} Submission
 * @property {string} requestId The `id`.
 * @property {string} uid The server's id.
 * @property {RequestState} state Where the request stands.
 * @property {boolean} duplicate This `id` was submitted before; nothing new was started.
 * @property {number} lastSeq `seq` of its latest event; 0 for a sync action, which has no log.
 * @property {import('./events.js').QueuePosition | null} queuePosition While it waits and is due.
 * @property {import('./payload.js').Payload | null} result When it has succeeded already.
 * @property {import('./errors.js').StreamerError | null} error Why, when it has ended otherwise.
 */

/**
 * @typedef {object} ResultOptions
 * @property {boolean} [raw] Gives the result as the JSON text it is, in which no number loses
 *   digits; default `false`: parsed.
 */

/** One server, seen by a caller of requests. */
export class Client {
  #router;
  #progress;
  #token;

  /**
   * @param {object} options
   * @param {string} options.server `http://host:port`, or `https://host:port` for TLS.
   * @param {import('./grpc.js').TokenSource} options.token A JWT, or what returns one; asked for
   *   before each call, so a function should keep it until it expires.
   * @param {import('@grpc/grpc-js').ChannelCredentials} [options.credentials] For TLS, in place of
   *   the system's certificate authorities.
   */
  constructor({ server, token, credentials }) {
    this.#router = /** @type {any} */ (connect(RouterService, { server, credentials }));
    this.#progress = /** @type {any} */ (connect(ProgressService, { server, credentials }));
    this.#token = token;
  }

  /** Closes the connections. */
  close() {
    this.#router.close();
    this.#progress.close();
  }

  /**
   * Asks for an action. An async one is durable once this returns. It is repeated, under the same
   * `id`, while the server cannot be reached; a sync action may then run more than once.
   * @param {string} action
   * @param {unknown} [payload] A JSON value; a `RawJson`; or bytes. Default `{}`.
   * @param {SubmitOptions & CallOptions} [options]
   * @returns {Promise<Submission>}
   */
  async submit(action, payload = {}, options = {}) {
    const { waitMs = 0, priority = 0, delayMs, deadline, metadata } = options;
    const message = {
      id: options.id ?? randomUUID(),
      action,
      payload: payloadTo(payload, 'payload'),
      metadata: metadata === undefined ? undefined : payloadTo(metadata, 'metadata'),
      wait: waitMs > 0 ? duration(waitMs) : undefined,
      priority,
      delay: delayMs ? duration(delayMs) : undefined,
      deadline: deadline === undefined ? undefined : timestamp(deadline),
    };
    const timeoutMs = (options.timeoutMs ?? 30_000) + waitMs;
    const { signal } = options;
    const answer = await this.#call(this.#router, 'submit', message, { timeoutMs, signal });
    const { requestId, uid, acknowledgment, completed } = answer;
    const { state, duplicate, lastSeq, seq } = acknowledgment ?? completed;
    const result = completed?.result ? payloadFrom(completed.result) : null;
    const error = completed?.error ? errorFrom(completed.error) : null;
    const queuePosition = positionFrom(acknowledgment?.queuePosition);
    return {
      requestId,
      uid,
      state: stateFrom(state),
      duplicate,
      lastSeq: Number(lastSeq ?? seq),
      queuePosition,
      result,
      error,
    };
  }

  /**
   * Submits and follows to the end. Aborting `signal` asks for cancellation; the promise then
   * settles with what became of the request. `waitMs` has no meaning here.
   * @param {string} action
   * @param {unknown} [payload] As of {@link submit}.
   * @param {SubmitOptions & CallOptions & ResultOptions & import('./events.js').Observer}
   *   [options]
   * @returns {Promise<any>} The result.
   * @throws {import('./errors.js').RequestFailed} When it ended in failure.
   * @throws {import('./errors.js').RequestCancelled} When it was cancelled.
   * @throws {import('./errors.js').IntegrityError} When its log does not prove itself.
   */
  async run(action, payload = {}, options = {}) {
    const { signal, raw = false } = options;
    signal?.throwIfAborted();
    const once = { ...options, waitMs: 0, signal: undefined };
    const submission = await this.submit(action, payload, once);
    if (submission.lastSeq === 0) {
      // A sync action has no log.
      if (submission.error) throw requestFailed(submission.error, submission);
      if (submission.result) return read(submission.result, raw);
    }
    const giveUp = new AbortController();
    const cancel = () => {
      const reason = signal?.reason instanceof Error ? signal.reason.message : 'aborted';
      this.cancel(submission.uid, reason).catch((error) => giveUp.abort(error));
    };
    if (signal?.aborted) cancel();
    else signal?.addEventListener('abort', cancel, { once: true });
    try {
      return await this.#follow(submission.uid, 0, giveUp.signal, options, raw);
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
  }

  /**
   * Waits for the end of a request, without its events.
   * @param {string} requestId Its `requestId` or `uid`.
   * @param {{signal?: AbortSignal} & ResultOptions} [options] Aborting ends the wait only.
   * @returns {Promise<any>} The result; errors as of {@link run}.
   */
  wait(requestId, { signal, raw = false } = {}) {
    return this.#follow(requestId, null, signal, {}, raw);
  }

  /**
   * A request's events, past and to come, until the terminal one. Lost streams are opened again
   * where they ended; each event comes once. Leaving the loop cancels nothing.
   * @param {string} requestId Its `requestId` or `uid`.
   * @param {object} [options]
   * @param {number | null} [options.afterSeq] Events after this `seq`. Default 0: all of them, and
   *   the output is proved at the end. `null`: only what is new, and the terminal event.
   * @param {AbortSignal} [options.signal] Ends it.
   * @returns {AsyncGenerator<import('./events.js').Event, void, void>} Throws `IntegrityError` when
   *   the log does not prove itself.
   */
  watch(requestId, { afterSeq = 0, signal } = {}) {
    const reader = new LogReader({ afterSeq, createHash: () => createHash('sha256') });
    const open = async () =>
      this.#progress.watch({ requestId, ...position(reader) }, await authorization(this.#token));
    return watchEvents(open, reader, requestId, signal);
  }

  /**
   * Asks that a request end. A queued one is cancelled at once, a running one when its handler
   * notices. Safe to repeat.
   * @param {string} requestId Its `requestId` or `uid`.
   * @param {string} [reason] At most 1,024 bytes.
   * @param {CallOptions} [options]
   * @returns {Promise<Request>} The request after the call.
   */
  async cancel(requestId, reason = '', options = {}) {
    const message = { requestId, reason };
    return requestFrom((await this.#call(this.#router, 'cancel', message, options)).request);
  }

  /**
   * One request, with its payload and result.
   * @param {string} requestId Its `requestId` or `uid`.
   * @param {CallOptions} [options]
   * @returns {Promise<Request>}
   */
  async get(requestId, options = {}) {
    return requestFrom((await this.#call(this.#router, 'get', { requestId }, options)).request);
  }

  /**
   * A page of the caller's requests, newest first, without payloads and results.
   * @param {object} [options]
   * @param {RequestState[]} [options.states] Only these; default all.
   * @param {string} [options.action] Only this one; default all.
   * @param {number} [options.pageSize] 1 to 500; default 50.
   * @param {string} [options.pageToken] `nextPageToken` of the page before.
   * @param {AbortSignal} [options.signal]
   * @param {number} [options.timeoutMs]
   * @returns {Promise<{requests: Request[], nextPageToken: string}>} The token is empty after the
   *   last page.
   */
  async list(options = {}) {
    const { states = [], action = '', pageSize = 0, pageToken = '' } = options;
    const names = states.map((state) => `REQUEST_STATE_${state}`);
    const message = { states: names, action, pageSize, pageToken };
    const page = await this.#call(this.#router, 'list', message, options);
    return { requests: page.requests.map(requestFrom), nextPageToken: page.nextPageToken };
  }

  /**
   * What can be asked for, by name.
   * @param {CallOptions} [options]
   * @returns {Promise<import('./client-messages.js').Action[]>}
   */
  async actions(options = {}) {
    return (await this.#call(this.#router, 'listActions', {}, options)).actions.map(actionFrom);
  }

  /**
   * Runs a failed or cancelled request again, as a new one.
   * @param {string} requestId `requestId` or `uid` of the ended one.
   * @param {{id?: string} & CallOptions} [options] `id` of the new one; random by default.
   * @returns {Promise<Request>} The new request.
   */
  async redrive(requestId, options = {}) {
    const message = { requestId, id: options.id ?? randomUUID() };
    return requestFrom((await this.#call(this.#router, 'redrive', message, options)).request);
  }

  /**
   * Runs many failed or cancelled requests again, newest first, a page at a time: the caller's own,
   * with permission `requests:write` the tenant's. Leaving the loop leaves the rest as it is. Safe
   * to repeat: what was redriven so before is not redriven again.
   * @param {object} [options]
   * @param {('FAILED' | 'CANCELLED')[]} [options.states] Default `FAILED` only.
   * @param {string} [options.action] Only this one; default all.
   * @param {Date | number} [options.since] Only requests accepted at or after this; a number is
   *   milliseconds since 1970.
   * @param {Date | number} [options.until] Only requests accepted before this.
   * @param {boolean} [options.dryRun] Only says what would be redriven; default `false`.
   * @param {number} [options.pageSize] 1 to 500; default 50.
   * @param {AbortSignal} [options.signal]
   * @param {number} [options.timeoutMs] Of each page.
   * @returns {AsyncGenerator<import('./client-messages.js').Redriven[], void, void>} Pages; one may
   *   be empty though more follow.
   */
  async *redriveAll(options = {}) {
    const { states = [], action = '', since, until, dryRun = false, pageSize = 0 } = options;
    const message = {
      states: states.map((state) => `REQUEST_STATE_${state}`),
      action,
      createTimeFrom: since === undefined ? undefined : timestamp(since),
      createTimeUntil: until === undefined ? undefined : timestamp(until),
      dryRun,
      pageSize,
      pageToken: '',
    };
    do {
      const page = await this.#call(this.#router, 'redriveMany', message, options);
      yield page.redriven.map(redrivenFrom);
      message.pageToken = page.nextPageToken;
    } while (message.pageToken !== '');
  }

  /**
   * @param {string} requestId
   * @param {number | null} afterSeq
   * @param {AbortSignal | undefined} signal
   * @param {import('./events.js').Observer} observer
   * @param {boolean} raw
   */
  async #follow(requestId, afterSeq, signal, observer, raw) {
    for await (const event of this.watch(requestId, { afterSeq, signal })) {
      tell(observer, event);
      if (isTerminal(event)) return read(resultOf(event), raw);
    }
    throw new Error('unreachable: a watch ends with the terminal event');
  }

  /**
   * Makes a call, again and again while the server cannot be reached.
   * @param {any} service
   * @param {string} method
   * @param {object} message
   * @param {CallOptions} options
   * @returns {Promise<any>}
   */
  async #call(service, method, message, { signal, timeoutMs = 30_000 }) {
    const deadline = Date.now() + timeoutMs;
    const backoff = new Backoff();
    for (;;) {
      signal?.throwIfAborted();
      const metadata = await authorization(this.#token);
      try {
        return await unary(service, method, message, metadata, deadline, signal);
      } catch (thrown) {
        signal?.throwIfAborted();
        const error = callError(thrown);
        const wait = Math.max(backoff.next(), error.retryAfterMs ?? 0);
        if (error.code !== 'UNAVAILABLE' || Date.now() + wait >= deadline) throw error;
        await sleep(wait, signal);
      }
    }
  }
}

/**
 * @param {LogReader} reader
 * @returns {{afterSeq?: number}} Where a watch goes on.
 */
function position(reader) {
  return reader.lastSeq === null ? {} : { afterSeq: reader.lastSeq };
}

/**
 * @param {import('./payload.js').Payload} result
 * @param {boolean} raw
 */
function read(result, raw) {
  return raw ? result.text : result.value;
}

/**
 * @param {any} service
 * @param {string} method
 * @param {object} message
 * @param {import('@grpc/grpc-js').Metadata} metadata
 * @param {number} deadline
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>}
 */
function unary(service, method, message, metadata, deadline, signal) {
  return new Promise((resolve, reject) => {
    const aborted = () => call.cancel();
    const call = service[method](
      message,
      metadata,
      { deadline },
      (/** @type {Error | null} */ error, /** @type {any} */ answer) => {
        signal?.removeEventListener('abort', aborted);
        if (error) reject(error);
        else resolve(answer);
      },
    );
    signal?.addEventListener('abort', aborted, { once: true });
  });
}
