/**
 * A worker: runs actions for a Streamer server, by docs/worker-protocol.md. It stays connected
 * whatever happens to its connection, and its attempts go on meanwhile.
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
import { HAND_BACK_MS, WorkStream, isFinal, nameOf, wentWell } from './worker-stream.js';

const { version } = createRequire(import.meta.url)('../package.json');
const SDK = `streamer-client/${version} (JavaScript)`;
/** How long the server may take to acknowledge what was released, in milliseconds. */
const LAST_WORDS_MS = 10_000;

/** @typedef {import('./worker-actions.js').ActionOptions} ActionOptions */
/** @typedef {import('./worker-actions.js').Handler} Handler */
/** @typedef {(level: 'info' | 'warn' | 'error', message: string) => void} Log */

/**
 * @typedef {object} WorkerOptions
 * @property {string} server `http://host:port`, or `https://host:port` for TLS.
 * @property {import('./grpc.js').TokenSource} token A JWT with permission `worker:<action>` for
 *   every action, or what returns one. A function is asked for each connection, and again before
 *   the token expires. Before a string expires, what runs is handed back and `serve` rejects.
 * @property {number} [slots] How many tasks run at once, 1 to 10,000; default 10.
 * @property {string} [workerId] Names one run of the program in the logs of the server: unique,
 *   1 to 128 of `[A-Za-z0-9._:@/+=-]`. The host name and random digits by default.
 * @property {string} [displayName] Shown to the owners of the requests that run here, who may be of
 *   other tenants; at most 128 bytes. The host name by default.
 * @property {string} [version] The program's build, for people; at most 128 bytes.
 * @property {Log} [log] What happens to the connection; written to standard error by default.
 * @property {import('@grpc/grpc-js').ChannelCredentials} [credentials] For TLS, in place of the
 *   system's certificate authorities.
 */

/** Runs actions. */
export class Worker {
  /** @type {Map<string, {declared: object, handler: Handler, heartbeatTimeoutMs?: number}>} */
  #actions = new Map();
  /** @type {Map<string, Attempt>} What runs, or has not been acknowledged to its end. */
  #attempts = new Map();
  /** @type {WorkStream | null} */
  #stream = null;
  /** @type {Promise<void> | null} */
  #serving = null;
  /**
   * Proves on later streams that they are this worker's; empty before the first `welcome`.
   *
   * @type {Uint8Array}
   */
  #sessionSecret = new Uint8Array();
  #stopping = false;
  #stopped = false;
  /** @type {CallError | null} */
  #tokenExpired = null;
  /** Nothing is waited for any more. */
  #abandon = new AbortController();
  /** @type {Set<ReturnType<typeof setTimeout>>} */
  #timers = new Set();

  /** @param {WorkerOptions} options */
  constructor(options) {
    parseServer(options.server);
    if (typeof options.token !== 'string' && typeof options.token !== 'function') {
      throw new TypeError('token must be a string, or a function that returns one');
    }
    /** Names this run of the program. */
    this.workerId = options.workerId ?? `${hostname()}-${randomBytes(10).toString('hex')}`;
    /** How many tasks run at once. */
    this.slots = options.slots ?? 10;
    if (!Number.isInteger(this.slots) || this.slots < 1 || this.slots > 10_000) {
      throw new TypeError(`slots must be 1 to 10000, is ${this.slots}`);
    }
    this.options = options;
  }

  /**
   * Declares an action. Before {@link run} or {@link serve}.
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
    if (this.#actions.has(name)) throw new TypeError(`${name} is declared twice`);
    const { heartbeatTimeoutMs } = options;
    this.#actions.set(name, { declared: declaration(name, options), handler, heartbeatTimeoutMs });
    return this;
  }

  /**
   * Serves until SIGTERM or SIGINT, then stops in order: takes no more tasks, lets what runs end
   * for a while, and releases the rest. A second signal releases at once.
   * @param {object} [options]
   * @param {number} [options.graceMs] How long what runs may take to end, in milliseconds; default
   *   30,000.
   * @returns {Promise<void>} Rejects when the server refuses the worker for good.
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
   * Serves until {@link stop}.
   * @returns {Promise<void>} Rejects with a `CallError` when the server refuses the worker for
   *   good: its token, its permissions or its declarations.
   */
  async serve() {
    if (this.#actions.size === 0) throw new TypeError('a worker needs an action');
    this.#serving ??= this.#serve();
    await this.#serving;
  }

  /**
   * Stops in order.
   * @param {number} [graceMs] How long what runs may take to end, in milliseconds; then it is
   *   released, and another worker goes on from its checkpoints. Default 30,000. May be called
   *   again to shorten it.
   * @param {number} [releaseMs] How long the server may take after that to acknowledge it, in
   *   milliseconds; default 10,000.
   * @returns {Promise<void>} Resolves once everything is acknowledged and the stream is closed, or
   *   the time is up.
   */
  async stop(graceMs = 30_000, releaseMs = LAST_WORDS_MS) {
    if (!this.#stopping && !this.#stopped) {
      this.#log('info', `stopping; ${this.#attempts.size} attempts run`);
    }
    this.#stopping = true;
    if (!this.#serving || this.#stopped) return;
    this.#stream?.capacity(0);
    this.#finishIfDone();
    this.#after(graceMs, () => this.#releaseAll());
    this.#after(graceMs + releaseMs, () => this.#giveUp());
    await this.#serving;
  }

  async #serve() {
    const backoff = new Backoff();
    try {
      while (!this.#done) {
        this.#stream = new WorkStream(this.#host());
        const ending = await this.#stream.run();
        this.#stream = null;
        this.#loseSyncAttempts();
        if (this.#tokenExpired) throw this.#tokenExpired;
        if (isFinal(ending)) throw ending.error;
        if (this.#done) break;
        this.#explain(ending);
        if (wentWell(ending)) backoff.reset();
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

  /** @returns {import('./worker-stream.js').Host} */
  #host() {
    const { server, credentials, token } = this.options;
    return {
      endpoint: { server, credentials },
      token,
      hello: () => this.#hello(),
      attempts: () => [...this.#attempts.values()],
      welcomed: (limits, resumed, sessionSecret) => {
        // An older server sends none.
        if (sessionSecret.length > 0) this.#sessionSecret = sessionSecret;
        this.#onWelcomed(limits, resumed);
      },
      task: (info, limits) => this.#onTask(info, limits),
      find: (name) => this.#attempts.get(nameOf(name)),
      drop: (attempt, reason) => this.#drop(attempt, reason),
      draining: () => this.#log('info', 'the server stops; what runs here runs on'),
      tokenEnds: () => this.#onTokenEnds(),
      log: (level, message) => this.#log(level, message),
    };
  }

  /** The token cannot be renewed: hands back what runs, in time for that to be acknowledged. */
  #onTokenEnds() {
    this.#tokenExpired = new CallError(
      'the token has expired and cannot be renewed; give a function that returns fresh tokens, such as tokenFile',
      { code: 'UNAUTHORIZED', status: status.UNAUTHENTICATED },
    );
    // Its end is the end of `serve`, which says why.
    this.stop(0, HAND_BACK_MS).catch(() => {});
  }

  #hello() {
    const actions = [...this.#actions.values()].map(({ declared }) => declared);
    const attempts = [...this.#attempts.values()].map(({ name }) => name);
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
  #onWelcomed(limits, resumed) {
    for (const [name, attempt] of this.#attempts) {
      const number = resumed.get(name);
      if (number === undefined) this.#drop(attempt, 'the server gave the attempt to another');
      else attempt.resume(number, limits);
    }
    this.#finishIfDone();
  }

  /**
   * @param {import('./worker-context.js').AttemptInfo & {sync: boolean}} info
   * @param {import('./worker-attempt.js').Limits} limits
   */
  #onTask(info, limits) {
    const action = this.#actions.get(info.action);
    const heartbeatTimeoutMs = action?.heartbeatTimeoutMs ?? 0;
    const changed = (/** @type {Attempt} */ one) => this.#stream?.ready(one);
    const attempt = new Attempt(info, limits, heartbeatTimeoutMs, changed);
    this.#attempts.set(nameOf(info), attempt);
    if (this.#stopping) this.#handBack(attempt);
    else if (action) this.#run(attempt, action.handler);
    else attempt.fail(new FatalError(`no ${info.action} here`, { code: 'INVALID_ACTION' }));
  }

  /**
   * @param {Attempt} attempt
   * @param {Handler} handler
   */
  #run(attempt, handler) {
    attempt.run(handler).catch(() => {
      attempt.fail(new HandlerError('the handler threw what cannot be told'));
    });
  }

  /**
   * @param {Attempt} attempt
   * @param {string} reason
   */
  #drop(attempt, reason) {
    this.#attempts.delete(nameOf(attempt.name));
    attempt.stop(reason);
    this.#finishIfDone();
  }

  /** Whoever asked for them does not wait any more. */
  #loseSyncAttempts() {
    for (const attempt of [...this.#attempts.values()]) {
      if (attempt.info.sync) this.#drop(attempt, 'the stream was lost');
    }
  }

  #releaseAll() {
    for (const attempt of this.#attempts.values()) this.#handBack(attempt);
  }

  /** @param {Attempt} attempt */
  #handBack(attempt) {
    const reason = 'the worker stops';
    if (!attempt.info.sync) return attempt.release(reason);
    // There is no other attempt of a sync action; its caller may ask again.
    attempt.cancel(reason);
    attempt.fail(new HandlerError(reason, { code: 'UNAVAILABLE' }));
  }

  #finishIfDone() {
    if (!this.#stopping || this.#attempts.size > 0) return;
    this.#stream?.finish();
    this.#after(LAST_WORDS_MS, () => this.#giveUp());
    if (!this.#stream) this.#abandon.abort();
  }

  #giveUp() {
    this.#abandon.abort(new Cancelled('the worker has stopped'));
    this.#stream?.cancel();
  }

  /** @param {import('./worker-stream.js').Ending} ending */
  #explain({ welcomed, error }) {
    const why = error ? `${error.code}: ${error.message}` : 'the server closed it';
    this.#log('warn', `${welcomed ? 'the stream ended' : 'not connected'}: ${why}`);
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
