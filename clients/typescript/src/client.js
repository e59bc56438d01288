/**
 * The gRPC client for Node: submits, watches and manages requests. It reopens lost streams, and
 * delivers every event exactly once.
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
} from './proto-conversions.js';
import { watchEvents } from './client-watch.js';
import { Backoff, sleep } from './backoff.js';
import { isTerminal, notify, requestFailed, resultOf } from './events.js';
import { authorization, callError, connect } from './grpc.js';
import { LogReader } from './log-reader.js';
import { ProgressService, RouterService } from './schema.js';

/** @typedef {import('./proto-conversions.js').Request} Request */
/** @typedef {import('./proto-conversions.js').RequestState} RequestState */

/**
 * @typedef {object} CallOptions
 * @property {AbortSignal} [signal] Aborts the call; the promise rejects with the signal's reason.
 * @property {number} [timeoutMs] Time limit for the call and its retries while the server cannot be
 *   reached, in milliseconds; default 30,000.
 */

/**
 * @typedef {object} SubmitOptions
 * @property {string} [id] Idempotency and correlation key: 1 to 128 characters from
 *   `[A-Za-z0-9._:@/+=-]`. Random by default, so that the call can be retried safely.
 * @property {number} [waitMs] Maximum time to wait for the result, 0 to 300,000 ms; default 0.
 * @property {number} [priority] Priority, 0 (default) to 9; a higher priority runs first.
 * @property {number} [delayMs] Delay before the earliest start: 0 to 30 days, in milliseconds.
 * @property {Date | number} [deadline] Time by which the request must start; otherwise it fails
 *   without being run. A number is in milliseconds since the Unix epoch.
 * @property {object | import('./payload.js').RawJson} [metadata] Metadata to store with the
 *   request; at most 16 KiB of JSON.
 */

/**
 * Response to a submission.
 * @typedef {object} Submission
 * @property {string} requestId The `id` of the request.
 * @property {string} uid The server's ID of the request.
 * @property {RequestState} state State of the request.
 * @property {boolean} duplicate Whether the `id` was submitted before, so that no new request was
 *   created.
 * @property {number} lastSeq `seq` of the latest event; 0 for a sync action, which has no log.
 * @property {import('./events.js').QueuePosition | null} queuePosition Position in the queue;
 *   `null` unless the request is queued and due.
 * @property {import('./payload.js').Payload | null} result The result, if the request succeeded.
 * @property {import('./errors.js').StreamerError | null} error The error, if the request failed or
 *   was cancelled.
 */

/**
 * @typedef {object} ResultOptions
 * @property {boolean} [raw] Whether to return the result as JSON text, in which numbers keep their
 *   full precision, instead of the parsed value; default `false`.
 */

/** A client of one server. */
export class Client {
  #router;
  #progress;
  #token;

  /**
   * @param {object} options
   * @param {string} options.server `http://host:port`, or `https://host:port` for TLS.
   * @param {import('./grpc.js').TokenSource} options.token A JWT, or a function that returns one;
   *   it is called before each call, so it should cache the token until it expires.
   * @param {import('@grpc/grpc-js').ChannelCredentials} [options.credentials] TLS credentials that
   *   replace the system's certificate authorities.
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
   * Submits a request for an action. An async request is durable on return. The call is retried
   * with the same `id` while the server cannot be reached; a sync action may then run more than
   * once.
   * @param {string} action
   * @param {unknown} [payload] A JSON value, a `RawJson`, or bytes; default `{}`.
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
    const response = await this.#call(this.#router, 'submit', message, { timeoutMs, signal });
    const { requestId, uid, acknowledgment, completed } = response;
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
   * Submits a request and watches it until it ends. Aborting `signal` requests cancellation; the
   * promise still settles when the request ends. `waitMs` is ignored.
   * @param {string} action
   * @param {unknown} [payload] Same as for {@link submit}.
   * @param {SubmitOptions & CallOptions & ResultOptions & import('./events.js').Observer}
   *   [options]
   * @returns {Promise<any>} The result.
   * @throws {import('./errors.js').RequestFailed} If the request failed.
   * @throws {import('./errors.js').RequestCancelled} If the request was cancelled.
   * @throws {import('./errors.js').IntegrityError} If events or output are missing.
   */
  async run(action, payload = {}, options = {}) {
    const { signal, raw = false } = options;
    signal?.throwIfAborted();
    const submitOptions = { ...options, waitMs: 0, signal: undefined };
    const submission = await this.submit(action, payload, submitOptions);
    if (submission.lastSeq === 0) {
      // A sync action has no log.
      if (submission.error) throw requestFailed(submission.error, submission);
      if (submission.result) return readResult(submission.result, raw);
    }
    const watchAbort = new AbortController();
    const cancel = () => {
      const reason = signal?.reason instanceof Error ? signal.reason.message : 'aborted';
      this.cancel(submission.uid, reason).catch((error) => watchAbort.abort(error));
    };
    if (signal?.aborted) cancel();
    else signal?.addEventListener('abort', cancel, { once: true });
    try {
      return await this.#follow(submission.uid, 0, watchAbort.signal, options, raw);
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
  }

  /**
   * Waits until a request ends, without reading its events.
   * @param {string} requestId `requestId` or `uid`.
   * @param {{signal?: AbortSignal} & ResultOptions} [options] Aborting `signal` ends only the wait.
   * @returns {Promise<any>} The result; throws the same errors as {@link run}.
   */
  wait(requestId, { signal, raw = false } = {}) {
    return this.#follow(requestId, null, signal, {}, raw);
  }

  /**
   * Yields the events of a request, past and future, up to the terminal event. A lost stream is
   * reopened after the last event received; each event is yielded once. Ending the iteration does
   * not cancel the request.
   * @param {string} requestId `requestId` or `uid`.
   * @param {object} [options]
   * @param {number | null} [options.afterSeq] `seq` after which events are yielded. 0 (default)
   *   yields all events, and the output is verified at the end; `null` yields only new events and
   *   the terminal event.
   * @param {AbortSignal} [options.signal] Ends the watch.
   * @returns {AsyncGenerator<import('./events.js').Event, void, void>} Throws `IntegrityError` if
   *   events or output are missing.
   */
  watch(requestId, { afterSeq = 0, signal } = {}) {
    const reader = new LogReader({ afterSeq, createHash: () => createHash('sha256') });
    const open = async () =>
      this.#progress.watch(
        { requestId, ...resumePosition(reader) },
        await authorization(this.#token),
      );
    return watchEvents(open, reader, requestId, signal);
  }

  /**
   * Requests cancellation. A queued request is cancelled immediately, a running request when its
   * handler stops. Safe to retry.
   * @param {string} requestId `requestId` or `uid`.
   * @param {string} [reason] At most 1,024 bytes.
   * @param {CallOptions} [options]
   * @returns {Promise<Request>} The request after the call.
   */
  async cancel(requestId, reason = '', options = {}) {
    const message = { requestId, reason };
    return requestFrom((await this.#call(this.#router, 'cancel', message, options)).request);
  }

  /**
   * Returns a request, with its payload and result.
   * @param {string} requestId `requestId` or `uid`.
   * @param {CallOptions} [options]
   * @returns {Promise<Request>}
   */
  async get(requestId, options = {}) {
    return requestFrom((await this.#call(this.#router, 'get', { requestId }, options)).request);
  }

  /**
   * Returns a page of the caller's requests, newest first, without payloads and results.
   * @param {object} [options]
   * @param {RequestState[]} [options.states] States of the requests to return; default all.
   * @param {string} [options.action] Action of the requests to return; default all.
   * @param {number} [options.pageSize] Number of requests per page, 1 to 500; default 50.
   * @param {string} [options.pageToken] `nextPageToken` of the previous page.
   * @param {AbortSignal} [options.signal]
   * @param {number} [options.timeoutMs]
   * @returns {Promise<{requests: Request[], nextPageToken: string}>} The token is empty on the last
   *   page.
   */
  async list(options = {}) {
    const { states = [], action = '', pageSize = 0, pageToken = '' } = options;
    const names = states.map((state) => `REQUEST_STATE_${state}`);
    const message = { states: names, action, pageSize, pageToken };
    const page = await this.#call(this.#router, 'list', message, options);
    return { requests: page.requests.map(requestFrom), nextPageToken: page.nextPageToken };
  }

  /**
   * Returns the actions that can be requested, ordered by name.
   * @param {CallOptions} [options]
   * @returns {Promise<import('./proto-conversions.js').Action[]>}
   */
  async actions(options = {}) {
    return (await this.#call(this.#router, 'listActions', {}, options)).actions.map(actionFrom);
  }

  /**
   * Submits a failed or cancelled request again, as a new request.
   * @param {string} requestId `requestId` or `uid` of the ended request.
   * @param {{id?: string} & CallOptions} [options] `id` of the new request; random by default.
   * @returns {Promise<Request>} The new request.
   */
  async redrive(requestId, options = {}) {
    const message = { requestId, id: options.id ?? randomUUID() };
    return requestFrom((await this.#call(this.#router, 'redrive', message, options)).request);
  }

  /**
   * Submits failed or cancelled requests again, newest first, one page at a time: those of the
   * caller, or with permission `requests:write` those of the tenant. Ending the iteration leaves
   * the remaining requests unchanged. Safe to retry: a request that was redriven this way is not
   * redriven again.
   * @param {object} [options]
   * @param {('FAILED' | 'CANCELLED')[]} [options.states] States of the requests; default `FAILED`
   *   only.
   * @param {string} [options.action] Action of the requests; default all.
   * @param {Date | number} [options.since] Start of the time range in which requests were accepted,
   *   inclusive. A number is in milliseconds since the Unix epoch.
   * @param {Date | number} [options.until] End of the time range, exclusive.
   * @param {boolean} [options.dryRun] Whether to list the requests without redriving them; default
   *   `false`.
   * @param {number} [options.pageSize] Number of requests per page, 1 to 500; default 50.
   * @param {AbortSignal} [options.signal]
   * @param {number} [options.timeoutMs] Timeout of each page.
   * @returns {AsyncGenerator<import('./proto-conversions.js').Redriven[], void, void>} Pages; a
   *   page may be empty although more pages follow.
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
      notify(observer, event);
      if (isTerminal(event)) return readResult(resultOf(event), raw);
    }
    throw new Error('unreachable: a watch ends with the terminal event');
  }

  /**
   * Makes a call, and retries it while the server cannot be reached.
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
        const delay = Math.max(backoff.next(), error.retryAfterMs ?? 0);
        if (error.code !== 'UNAVAILABLE' || Date.now() + delay >= deadline) throw error;
        await sleep(delay, signal);
      }
    }
  }
}

/**
 * @param {LogReader} reader
 * @returns {{afterSeq?: number}} Position at which a watch resumes.
 */
function resumePosition(reader) {
  return reader.lastSeq === null ? {} : { afterSeq: reader.lastSeq };
}

/**
 * @param {import('./payload.js').Payload} result
 * @param {boolean} raw
 */
function readResult(result, raw) {
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
    const onAbort = () => call.cancel();
    const call = service[method](
      message,
      metadata,
      { deadline },
      (/** @type {Error | null} */ error, /** @type {any} */ response) => {
        signal?.removeEventListener('abort', onAbort);
        if (error) reject(error);
        else resolve(response);
      },
    );
    signal?.addEventListener('abort', onAbort, { once: true });
  });
}
