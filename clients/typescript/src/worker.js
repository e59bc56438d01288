/**
 * A worker: runs actions for a Streamer server, according to docs/worker-protocol.md. It reconnects
 * after a lost connection, and its attempts keep running meanwhile.
 */

import { randomBytes } from 'node:crypto';
import { createRequire } from 'node:module';
import { hostname } from 'node:os';

import { status } from '@grpc/grpc-js';

import { Backoff, sleep } from './backoff.js';
import { CallError, parseServer } from './grpc.js';
import { declaration } from './worker-actions.js';
import { Attempt } from './worker-attempt.js';
import { Cancelled, FatalError, HandlerError } from './worker-errors.js';
import {
  RELEASE_LEAD_MS,
  WorkStream,
  attemptKey,
  isFatal,
  resetsBackoff,
} from './worker-stream.js';

const { version } = createRequire(import.meta.url)('../package.json');
const SDK = `streamer-client/${version} (JavaScript)`;
/** Time to wait for the acknowledgment of released attempts, in milliseconds. */
const RELEASE_TIMEOUT_MS = 10_000;

/** @typedef {import('./worker-actions.js').ActionOptions} ActionOptions */
/** @typedef {import('./worker-actions.js').Handler} Handler */
/** @typedef {(level: 'info' | 'warn' | 'error', message: string) => void} Log */

/**
 * @typedef {object} WorkerOptions
 * @property {string} server `http://host:port`, or `https://host:port` for TLS.
 * @property {import('./grpc.js').TokenSource} token A JWT with permission `worker:<action>` for
 *   every action, or a function that returns one. A function is called for each connection, and
 *   before the token expires. Before a string expires, running attempts are released and `serve`
 *   rejects.
 * @property {number} [slots] Maximum number of concurrent tasks, 1 to 10,000; default 10.
 * @property {string} [workerId] Identifies one run of the program in the logs of the server:
 *   unique, 1 to 128 characters from `[A-Za-z0-9._:@/+=-]`. By default, it consists of the host
 *   name and random digits.
 * @property {string} [displayName] Name that is shown to the owners of the requests that this
 *   worker runs, who may belong to other tenants; at most 128 bytes. By default, it is the host
 *   name.
 * @property {string} [version] Human-readable version of the program; at most 128 bytes.
 * @property {Log} [log] Function that logs changes of the connection; by default, it writes to
 *   standard error.
 * @property {import('@grpc/grpc-js').ChannelCredentials} [credentials] TLS credentials that replace
 *   the system's certificate authorities.
 */

/** Runs actions for a server until it is stopped. */
export class Worker {
  /** @type {Map<string, {declared: object, handler: Handler, heartbeatTimeoutMs?: number}>} */
  #actions = new Map();
  /** @type {Map<string, Attempt>} Attempts that run or whose end is not acknowledged. */
  #attempts = new Map();
  /** @type {WorkStream | null} */
  #stream = null;
  /** @type {Promise<void> | null} */
  #serving = null;
  /**
   * Secret that identifies later streams as this worker's; empty before the first `welcome`.
   *
   * @type {Uint8Array}
   */
  #sessionSecret = new Uint8Array();
  #stopping = false;
  #stopped = false;
  /** @type {CallError | null} */
  #tokenExpired = null;
  /** Aborted when `stop` no longer waits for acknowledgments. */
  #abandon = new AbortController();
  /** @type {Set<ReturnType<typeof setTimeout>>} */
  #timers = new Set();

  /** @param {WorkerOptions} options */
  constructor(options) {
    parseServer(options.server);
    if (typeof options.token !== 'string' && typeof options.token !== 'function') {
      throw new TypeError('token must be a string, or a function that returns one');
    }
    /** ID of this run of the program. */
    this.workerId = options.workerId ?? `${hostname()}-${randomBytes(10).toString('hex')}`;
    /** Maximum number of concurrent tasks. */
    this.slots = options.slots ?? 10;
    if (!Number.isInteger(this.slots) || this.slots < 1 || this.slots > 10_000) {
      throw new TypeError(`slots must be 1 to 10000, is ${this.slots}`);
    }
    this.options = options;
  }

  /**
   * Declares an action. Call it before {@link run} or {@link serve}.
   * @overload
   * @param {string} name `[a-z][a-z0-9_.-]{0,63}`
   * @param {ActionOptions} options
   * @param {Handler} handler
   * @returns {this}
   */
  /**
   * @overload
   * @param {string} name
   * @param {Handler} handler
   * @returns {this}
   */
  /**
   * @param {string} name
   * @param {ActionOptions | Handler} options
   * @param {Handler} [handler]
   * @returns {this}
   */
  action(name, options, handler) {
    if (typeof options === 'function') return this.action(name, {}, options);
    if (typeof handler !== 'function') throw new TypeError(`${name}: the handler is missing`);
    if (this.#actions.has(name)) throw new TypeError(`${name} is already declared`);
    const { heartbeatTimeoutMs } = options;
    this.#actions.set(name, { declared: declaration(name, options), handler, heartbeatTimeoutMs });
    return this;
  }

  /**
   * Serves until SIGTERM or SIGINT, then stops gracefully: stops accepting tasks, waits for running
   * handlers, and releases the remaining attempts. A second signal releases them immediately.
   * @param {object} [options]
   * @param {number} [options.graceMs] Maximum time to wait for running handlers, in milliseconds;
   *   default 30,000.
   * @returns {Promise<void>} Rejects if the server permanently rejects the worker.
   */
  async run({ graceMs = 30_000 } = {}) {
    let signals = 0;
    const onSignal = () => {
      signals += 1;
      this.stop(signals === 1 ? graceMs : 0).catch(() => {});
    };
    process.on('SIGTERM', onSignal).on('SIGINT', onSignal);
    try {
      await this.serve();
    } finally {
      process.off('SIGTERM', onSignal).off('SIGINT', onSignal);
    }
  }

  /**
   * Serves until {@link stop} is called.
   * @returns {Promise<void>} Rejects with a `CallError` if the server permanently rejects the
   *   worker because of its token, permissions or declarations.
   */
  async serve() {
    if (this.#actions.size === 0) throw new TypeError('a worker needs at least one action');
    this.#serving ??= this.#serve();
    await this.#serving;
  }

  /**
   * Stops gracefully.
   * @param {number} [graceMs] Maximum time to wait for running handlers, in milliseconds; then
   *   their attempts are released, and another worker resumes from their checkpoints. Default
   *   30,000. Call `stop` again to shorten this time.
   * @param {number} [releaseMs] Maximum time to wait for acknowledgments after that, in
   *   milliseconds; default 10,000.
   * @returns {Promise<void>} Resolves once all reports are acknowledged and the stream is closed,
   *   or once both times have passed.
   */
  async stop(graceMs = 30_000, releaseMs = RELEASE_TIMEOUT_MS) {
    if (!this.#stopping && !this.#stopped) {
      this.#log('info', `stopping; ${this.#attempts.size} attempts are running`);
    }
    this.#stopping = true;
    if (!this.#serving || this.#stopped) return;
    this.#stream?.capacity(0);
    this.#closeStreamIfDone();
    this.#after(graceMs, () => this.#releaseAll());
    this.#after(graceMs + releaseMs, () => this.#stopWaiting());
    await this.#serving;
  }

  async #serve() {
    const backoff = new Backoff();
    try {
      while (!this.#done) {
        this.#stream = new WorkStream(this.#host());
        const result = await this.#stream.run();
        this.#stream = null;
        this.#dropSyncAttempts();
        if (this.#tokenExpired) throw this.#tokenExpired;
        if (isFatal(result)) throw result.error;
        if (this.#done) break;
        this.#logStreamEnd(result);
        if (resetsBackoff(result)) backoff.reset();
        await sleep(backoff.next(), this.#abandon.signal).catch(() => {});
      }
    } finally {
      this.#stopped = true;
      for (const timer of this.#timers) clearTimeout(timer);
      for (const attempt of this.#attempts.values()) attempt.stop('the worker has stopped');
      this.#attempts.clear();
    }
  }

  get #done() {
    return this.#stopping && (this.#attempts.size === 0 || this.#abandon.signal.aborted);
  }

  /** @returns {import('./worker-stream.js').StreamHost} */
  #host() {
    const { server, credentials, token } = this.options;
    return {
      endpoint: { server, credentials },
      token,
      hello: () => this.#hello(),
      attempts: () => [...this.#attempts.values()],
      onWelcome: (limits, resumed, sessionSecret) => {
        // Older servers send no secret.
        if (sessionSecret.length > 0) this.#sessionSecret = sessionSecret;
        this.#onWelcome(limits, resumed);
      },
      onTask: (info, limits) => this.#onTask(info, limits),
      findAttempt: (id) => this.#attempts.get(attemptKey(id)),
      dropAttempt: (attempt, reason) => this.#drop(attempt, reason),
      onDraining: () => this.#log('info', 'the server is draining; handlers keep running'),
      onTokenExpiring: () => this.#onTokenExpiring(),
      log: (level, message) => this.#log(level, message),
    };
  }

  /** Releases the running attempts before a token that cannot be refreshed expires. */
  #onTokenExpiring() {
    this.#tokenExpired = new CallError(
      'the token has expired and cannot be refreshed; pass a function that returns fresh tokens,' +
        ' such as tokenFile',
      { code: 'UNAUTHORIZED', status: status.UNAUTHENTICATED },
    );
    // `serve` rejects with the same error.
    this.stop(0, RELEASE_LEAD_MS).catch(() => {});
  }

  #hello() {
    const actions = [...this.#actions.values()].map(({ declared }) => declared);
    const attempts = [...this.#attempts.values()].map(({ id }) => id);
    const slots = this.#stopping ? 0 : this.slots;
    return {
      workerId: this.workerId,
      version: (this.options.version ?? '').toWellFormed(),
      sdk: SDK,
      slots,
      actions,
      attempts,
      sessionSecret: this.#sessionSecret,
      displayName: (this.options.displayName ?? hostname()).toWellFormed(),
    };
  }

  /**
   * @param {import('./worker-attempt.js').Limits} limits
   * @param {Map<string, number>} resumed
   */
  #onWelcome(limits, resumed) {
    for (const [key, attempt] of this.#attempts) {
      const number = resumed.get(key);
      if (number === undefined) this.#drop(attempt, 'the server did not resume the attempt');
      else attempt.resume(number, limits);
    }
    this.#closeStreamIfDone();
  }

  /**
   * @param {import('./worker-context.js').AttemptInfo & {sync: boolean}} info
   * @param {import('./worker-attempt.js').Limits} limits
   */
  #onTask(info, limits) {
    const action = this.#actions.get(info.action);
    const heartbeatTimeoutMs = action?.heartbeatTimeoutMs ?? 0;
    const onChange = (/** @type {Attempt} */ one) => this.#stream?.ready(one);
    const attempt = new Attempt(info, limits, heartbeatTimeoutMs, onChange);
    this.#attempts.set(attemptKey(info), attempt);
    if (this.#stopping) this.#release(attempt);
    else if (action) this.#run(attempt, action.handler);
    else {
      const message = `this worker does not declare action ${info.action}`;
      attempt.fail(new FatalError(message, { code: 'INVALID_ACTION' }));
    }
  }

  /**
   * @param {Attempt} attempt
   * @param {Handler} handler
   */
  #run(attempt, handler) {
    attempt.run(handler).catch(() => {
      attempt.fail(new HandlerError('the error could not be reported'));
    });
  }

  /**
   * @param {Attempt} attempt
   * @param {string} reason
   */
  #drop(attempt, reason) {
    this.#attempts.delete(attemptKey(attempt.id));
    attempt.stop(reason);
    this.#closeStreamIfDone();
  }

  /** Drops sync attempts, which end with their stream. */
  #dropSyncAttempts() {
    for (const attempt of [...this.#attempts.values()]) {
      if (attempt.info.sync) this.#drop(attempt, 'the stream was lost');
    }
  }

  #releaseAll() {
    for (const attempt of this.#attempts.values()) this.#release(attempt);
  }

  /** @param {Attempt} attempt */
  #release(attempt) {
    const reason = 'the worker is shutting down';
    if (!attempt.info.sync) return attempt.release(reason);
    // A sync action cannot be released: its caller receives an error and may retry.
    attempt.cancel(reason);
    attempt.fail(new HandlerError(reason, { code: 'UNAVAILABLE' }));
  }

  #closeStreamIfDone() {
    if (!this.#stopping || this.#attempts.size > 0) return;
    this.#stream?.finish();
    this.#after(RELEASE_TIMEOUT_MS, () => this.#stopWaiting());
    if (!this.#stream) this.#abandon.abort();
  }

  #stopWaiting() {
    this.#abandon.abort(new Cancelled('the worker has stopped'));
    this.#stream?.cancel();
  }

  /** @param {import('./worker-stream.js').StreamResult} result */
  #logStreamEnd({ welcomed, error }) {
    const reason = error ? `${error.code}: ${error.message}` : 'closed by the server';
    this.#log('warn', `${welcomed ? 'stream ended' : 'failed to connect'}: ${reason}`);
  }

  /**
   * @param {'info' | 'warn' | 'error'} level
   * @param {string} message
   */
  #log(level, message) {
    if (this.options.log) this.options.log(level, message);
    else process.stderr.write(`${level}: worker ${this.workerId}: ${message}\n`);
  }

  /**
   * @param {number} ms
   * @param {() => void} action
   */
  #after(ms, action) {
    this.#timers.add(setTimeout(action, ms));
  }
}
