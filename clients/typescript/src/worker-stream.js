/**
 * Runs one stream of a worker, from `hello` to its end: sends the reports of the attempts, and
 * dispatches messages from the server to the attempts.
 */

import { status } from '@grpc/grpc-js';

import { authorization, callError, connect, freshToken } from './grpc.js';
import { WorkerService } from './schema.js';
import { dateOrNull, payloadFrom } from './proto-conversions.js';

/** Time within which the server must send `welcome`, in milliseconds. */
const WELCOME_TIMEOUT_MS = 20_000;
/** Limit of unacknowledged bytes if `welcome` does not specify one. */
const DEFAULT_UNACKNOWLEDGED_BYTES = 1024 * 1024;
/**
 * Maximum time between the renewal of a token and its expiry, in milliseconds. A token is renewed
 * after four fifths of its remaining lifetime if that is later.
 */
const MAX_TOKEN_LEAD_MS = 60_000;
/**
 * Time between the release of the running attempts and the expiry of a token that cannot be
 * renewed, in milliseconds.
 */
export const RELEASE_LEAD_MS = 5000;
/** Minimum delay before the renewal of a token, in milliseconds. */
const TOKEN_RETRY_MS = 1000;
/** Maximum delay of a timer, in milliseconds. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/** @typedef {import('./worker-attempt.js').Attempt} Attempt */
/** @typedef {import('./worker-attempt.js').Limits} Limits */

/**
 * Interface through which a stream uses its worker.
 * @typedef {object} StreamHost
 * @property {import('./grpc.js').Endpoint} endpoint
 * @property {import('./grpc.js').TokenSource} token
 * @property {() => object} hello Returns the `hello` message, which lists the attempts of
 *   `attempts()`.
 * @property {() => Attempt[]} attempts Returns the attempts that run or whose end is not
 *   acknowledged.
 * @property {(limits: Limits, resumed: Map<string, number>, secret: Uint8Array) => void} onWelcome
 * @property {(info: import('./worker-context.js').AttemptInfo & {sync: boolean}, limits: Limits)
 *   => void} onTask
 * @property {(id: {uid: string, attempt: number}) => Attempt | undefined} findAttempt
 * @property {(attempt: Attempt, reason: string) => void} dropAttempt Called for an attempt that has
 *   ended, or that this worker no longer owns.
 * @property {() => void} onDraining Called when the server is draining.
 * @property {() => void} onTokenExpiring Called before a token that cannot be refreshed expires.
 * @property {import('./worker.js').Log} log
 */

/**
 * @typedef {object} StreamResult
 * @property {boolean} welcomed Whether the server had sent `welcome`.
 * @property {boolean} answered Whether the server had answered a heartbeat.
 * @property {import('./grpc.js').CallError | null} error Reason why the stream ended; `null` if it
 *   was closed normally.
 */

/** Runs one bidirectional call. */
export class WorkStream {
  /** @type {any} */
  #service = null;
  /** @type {any} */
  #call = null;
  #welcomed = false;
  #answered = false;
  /** Whether every attempt has resumed, so that reports may be sent. */
  #canReport = false;
  #ended = false;
  #cancellation = new AbortController();
  /** @type {Set<Attempt>} Attempts with reports to send, in round-robin order. */
  #ready = new Set();
  #writable = true;
  /** @type {Set<ReturnType<typeof setTimeout>>} */
  #timers = new Set();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #renewal;
  /** Time at which the oldest heartbeat without a reply was sent; 0 if there is none. */
  #unanswered = 0;
  /** @type {Limits | null} */
  #limits = null;

  /** @param {StreamHost} host */
  constructor(host) {
    this.host = host;
  }

  /** Runs until the stream ends. @returns {Promise<StreamResult>} */
  async run() {
    /** @type {import('./grpc.js').CallError | null} */
    let error = null;
    try {
      // The token function may never settle.
      const { signal } = this.#cancellation;
      const metadata = await unlessAborted(authorization(this.host.token), signal);
      // A separate channel, so that the worker controls reconnects, not the channel.
      this.#service = connect(WorkerService, this.host.endpoint, {
        'grpc.use_local_subchannel_pool': 1,
      });
      await this.#exchange(metadata);
    } catch (thrown) {
      error = callError(thrown);
    }
    this.#ended = true;
    for (const timer of this.#timers) clearTimeout(timer);
    this.#service?.close();
    return { welcomed: this.#welcomed, answered: this.#answered, error };
  }

  /**
   * Sends the pending reports of an attempt.
   * @param {Attempt} attempt
   */
  ready(attempt) {
    this.#ready.add(attempt);
    this.#flush();
  }

  /** @param {number} slots Number of tasks that the worker can run. */
  capacity(slots) {
    if (this.#welcomed) this.#write({ capacity: { slots } });
  }

  /** Closes the worker's side of the stream; cancels a stream without `welcome`. */
  finish() {
    if (this.#ended) return;
    if (this.#welcomed) this.#call.end();
    else this.cancel();
  }

  /** Cancels the stream. */
  cancel() {
    this.#cancellation.abort();
    this.#call?.cancel();
  }

  /**
   * @param {import('@grpc/grpc-js').Metadata} metadata
   * @returns {Promise<void>} Rejects with the status of the call if it is not OK.
   */
  #exchange(metadata) {
    return new Promise((resolve, reject) => {
      const call = this.#service.work(metadata);
      this.#call = call;
      call.on('data', (/** @type {any} */ message) => this.#onData(message));
      call.on('error', reject);
      call.on('status', () => resolve());
      call.on('drain', () => {
        this.#writable = true;
        this.#flush();
      });
      this.#after(WELCOME_TIMEOUT_MS, () => {
        if (!this.#welcomed) call.cancel();
      });
      if (this.#cancellation.signal.aborted) call.cancel();
      else this.#write({ hello: this.host.hello() });
    });
  }

  /** @param {any} message */
  #onData(message) {
    try {
      this.#handleMessage(message);
    } catch (error) {
      this.host.log('error', `failed to handle a message: ${error}`);
      this.cancel();
    }
  }

  /** @param {any} message */
  #handleMessage(message) {
    const body = message[message.message];
    switch (message.message) {
      case 'welcome':
        return this.#onWelcome(body);
      case 'task':
        return this.#onTask(body);
      case 'acknowledgment':
        return this.#onAcknowledgment(body);
      case 'resend':
        return this.host.findAttempt(body)?.resend(Number(body.number), body.resends);
      case 'cancel':
        return this.host.findAttempt(body)?.cancel(body.reason);
      case 'revoke':
        return this.#onRevoke(body);
      case 'heartbeatReply':
        return this.#onHeartbeatReply(body);
      case 'drain':
        return this.host.onDraining();
      case 'tokenStatus':
        return this.#renewToken(tokenExpiry(body));
      default:
        // A message type that only newer servers use.
        return undefined;
    }
  }

  /** @param {any} welcome */
  #onWelcome(welcome) {
    this.#limits = {
      heartbeatMs: Number(welcome.heartbeatMs),
      leaseMs: Number(welcome.leaseMs),
      maxPayloadBytes: Number(welcome.maxPayloadBytes),
      maxOutputChunkBytes: Number(welcome.maxOutputChunkBytes),
      maxUnacknowledged: welcome.maxUnacknowledged,
      maxUnacknowledgedBytes:
        Number(welcome.maxUnacknowledgedBytes) || DEFAULT_UNACKNOWLEDGED_BYTES,
    };
    this.#welcomed = true;
    const resumed = new Map();
    for (const known of welcome.resumed) resumed.set(attemptKey(known), Number(known.number));
    this.host.log('info', `connected to ${welcome.processor}`);
    this.host.onWelcome(this.#limits, resumed, welcome.sessionSecret);
    this.#canReport = true;
    this.#flush();
    this.#heartbeat();
  }

  /** @param {any} task */
  #onTask(task) {
    if (!this.#limits || this.host.findAttempt(task)) return;
    const { uid, requestId, tenantId, userId, action, attempt, traceParent, traceState, sync } =
      task;
    const payload = payloadFrom(task.payload);
    const checkpoint = task.checkpoint ?? null;
    const deadline = dateOrNull(task.deadline);
    this.host.onTask(
      {
        uid,
        requestId,
        tenantId,
        userId,
        action,
        attempt,
        traceParent,
        traceState,
        sync,
        payload,
        checkpoint,
        deadline,
      },
      this.#limits,
    );
  }

  /** @param {any} acknowledgment */
  #onAcknowledgment(acknowledgment) {
    const attempt = this.host.findAttempt(acknowledgment);
    if (!attempt) return;
    if (acknowledgment.ended) this.host.dropAttempt(attempt, 'the attempt has ended');
    else {
      const { number, maxUnacknowledgedBytes } = acknowledgment;
      attempt.acknowledge(Number(number), Number(maxUnacknowledgedBytes));
    }
  }

  /** @param {any} revoke */
  #onRevoke(revoke) {
    const attempt = this.host.findAttempt(revoke);
    if (attempt) this.host.dropAttempt(attempt, revoke.reason || 'the attempt was revoked');
  }

  /** @param {any} reply */
  #onHeartbeatReply(reply) {
    this.#unanswered = 0;
    this.#answered = true;
    for (const cancel of reply.cancelled) this.host.findAttempt(cancel)?.cancel(cancel.reason);
    for (const revoke of reply.revoked) this.#onRevoke(revoke);
    if (reply.draining) this.host.onDraining();
  }

  /** Sends a heartbeat and schedules the next one; cancels the stream if replies are missing. */
  #heartbeat() {
    const { heartbeatMs, leaseMs } = /** @type {Limits} */ (this.#limits);
    const now = performance.now();
    if (this.#unanswered && now - this.#unanswered > leaseMs) {
      this.host.log('warn', `no heartbeat answered for ${leaseMs} ms`);
      this.cancel();
      return;
    }
    this.#unanswered ||= now;
    this.#write({ heartbeat: { attempts: this.host.attempts().map(({ id }) => id) } });
    // Earlier than required, so that heartbeats are in time even if the process is busy.
    this.#after((heartbeatMs * 2) / 3, () => this.#heartbeat());
  }

  /**
   * Schedules the refresh of the token, or the release of the attempts if it cannot be refreshed.
   * @param {Date | null} expireTime Time at which the token of the stream expires.
   */
  #renewToken(expireTime) {
    if (this.#renewal) clearTimeout(this.#renewal);
    if (!expireTime) return;
    const remaining = expireTime.getTime() - Date.now();
    if (typeof this.host.token !== 'function') {
      const seconds = Math.round(remaining / 1000);
      this.host.log(
        'warn',
        `the token expires in ${seconds} s and cannot be refreshed: before that, the worker` +
          ' releases its running attempts and exits; pass a function that returns fresh tokens,' +
          ' such as tokenFile',
      );
      const delay = Math.max(remaining - RELEASE_LEAD_MS, remaining / 2);
      this.#renewal = this.#after(delay, () => {
        if (delay <= MAX_TIMER_MS) this.host.onTokenExpiring();
        else this.#renewToken(expireTime);
      });
      return;
    }
    const delay = remaining - Math.min(remaining / 5, MAX_TOKEN_LEAD_MS);
    this.#renewal = this.#after(Math.max(delay, TOKEN_RETRY_MS), async () => {
      try {
        const token = await freshToken(this.host.token);
        if (!this.#ended) this.#write({ refreshToken: { token } });
      } catch (error) {
        this.host.log('error', `failed to get a fresh token: ${error}`);
        if (!this.#ended) this.#renewToken(expireTime);
      }
    });
  }

  /** Sends reports, in round-robin order of the attempts. */
  #flush() {
    while (this.#canReport && !this.#ended && this.#writable && this.#ready.size > 0) {
      const [attempt] = this.#ready;
      this.#ready.delete(attempt);
      const report = attempt.next();
      if (!report) continue;
      const { kind, body, number } = report;
      const { id, resends } = attempt;
      this.#writable = this.#write({ report: { ...id, number, resends, [kind]: body } });
      this.#ready.add(attempt);
    }
  }

  /**
   * @param {object} message
   * @returns {boolean} Whether more can be written without waiting for `drain`.
   */
  #write(message) {
    return this.#ended || this.#call.writableEnded ? true : this.#call.write(message);
  }

  /**
   * @param {number} ms
   * @param {() => void} action
   */
  #after(ms, action) {
    const timer = setTimeout(
      () => {
        this.#timers.delete(timer);
        if (!this.#ended) action();
      },
      Math.min(ms, MAX_TIMER_MS),
    );
    this.#timers.add(timer);
    return timer;
  }
}

/**
 * @param {any} status
 * @returns {Date | null} Time at which the token expires, according to the local clock.
 */
function tokenExpiry({ timeLeftMs, expireTime }) {
  const remaining = Number(timeLeftMs);
  return remaining > 0 ? new Date(Date.now() + remaining) : dateOrNull(expireTime);
}

/**
 * @param {{uid: string, attempt: number}} attempt
 * @returns {string} Unique key of the attempt.
 */
export function attemptKey({ uid, attempt }) {
  return `${uid}/${attempt}`;
}

/** Status codes that mean, before `welcome`, that a retry cannot succeed. */
const FATAL = new Set([status.UNAUTHENTICATED, status.PERMISSION_DENIED, status.INVALID_ARGUMENT]);
/** Status codes that a message may have caused; the next stream sends that message again. */
const PROTOCOL_ERRORS = new Set([
  status.INVALID_ARGUMENT,
  status.INTERNAL,
  status.OUT_OF_RANGE,
  status.RESOURCE_EXHAUSTED,
]);

/**
 * @param {StreamResult} result
 * @returns {boolean} Whether the worker must not reconnect.
 */
export function isFatal({ welcomed, error }) {
  if (!error) return false;
  // Another program uses the ID of this worker.
  if (error.status === status.ALREADY_EXISTS) return true;
  return !welcomed && FATAL.has(error.status);
}

/**
 * @param {StreamResult} result
 * @returns {boolean} Whether to reset the backoff: a heartbeat was answered, so the reports before
 *   it were processed, and no message of the worker is likely to have ended the stream.
 */
export function resetsBackoff({ answered, error }) {
  return answered && !(error && PROTOCOL_ERRORS.has(error.status));
}

/**
 * @template T
 * @param {Promise<T>} promise
 * @param {AbortSignal} signal
 * @returns {Promise<T>} Rejects with the signal's reason if it aborts first.
 */
function unlessAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(signal.reason);
    if (signal.aborted) onAbort();
    signal.addEventListener('abort', onAbort, { once: true });
    promise.then(resolve, reject);
  });
}
