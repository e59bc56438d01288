/**
 * One stream of a worker, from `hello` to its end: says what the attempts report, and tells them
 * what the server says.
 */

import { status } from '@grpc/grpc-js';

import { authorization, callError, connect, freshToken } from './grpc.js';
import { WorkerService } from './schema.js';
import { dateOrNull, payloadFrom } from './client-messages.js';

/** How long the server may take for `welcome`, in milliseconds. */
const WELCOME_TIMEOUT_MS = 20_000;
/** What counts when the server does not say how many bytes may be unacknowledged. */
const DEFAULT_UNACKNOWLEDGED_BYTES = 1024 * 1024;
/** A token is renewed when a fifth of its time is left, but not earlier than this, in ms. */
const MAX_TOKEN_LEAD_MS = 60_000;
/** Time before the expiry of a token that cannot be renewed at which running work is handed back. */
export const HAND_BACK_MS = 5000;
/** Between failed renewals of a token, in milliseconds. */
const TOKEN_RETRY_MS = 1000;
const MAX_TIMER_MS = 2 ** 31 - 1;

/** @typedef {import('./worker-attempt.js').Attempt} Attempt */
/** @typedef {import('./worker-attempt.js').Limits} Limits */

/**
 * Whose stream it is.
 * @typedef {object} Host
 * @property {import('./grpc.js').Endpoint} endpoint
 * @property {import('./grpc.js').TokenSource} token
 * @property {() => object} hello The message; its `attempts` are those of `attempts()`.
 * @property {() => Attempt[]} attempts What runs, or has not been acknowledged to its end.
 * @property {(limits: Limits, resumed: Map<string, number>, secret: Uint8Array) => void} welcomed
 * @property {(info: import('./worker-context.js').AttemptInfo & {sync: boolean}, limits: Limits)
 *   => void} task
 * @property {(name: {uid: string, attempt: number}) => Attempt | undefined} find
 * @property {(attempt: Attempt, reason: string) => void} drop It is over, or another's.
 * @property {() => void} draining The server stops.
 * @property {() => void} tokenEnds The token, which cannot be renewed, is about to expire.
 * @property {import('./worker.js').Log} log
 */

/**
 * @typedef {object} Ending
 * @property {boolean} welcomed Whether the server had let the worker in.
 * @property {boolean} answered Whether it had answered a heartbeat.
 * @property {import('./grpc.js').CallError | null} error Why it ended; `null` when it was closed
 *   in order.
 */

/** One bidirectional call. */
export class WorkStream {
  /** @type {any} */
  #service = null;
  /** @type {any} */
  #call = null;
  #welcomed = false;
  #answered = false;
  /** Every attempt knows from where it goes on: reports may be sent. */
  #open = false;
  #over = false;
  #cancellation = new AbortController();
  /** @type {Set<Attempt>} Those with something to send, in turn. */
  #ready = new Set();
  #writable = true;
  /** @type {Set<ReturnType<typeof setTimeout>>} */
  #timers = new Set();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #renewal;
  /** When the oldest heartbeat without a reply was sent; 0 when there is none. */
  #unanswered = 0;
  /** @type {Limits | null} */
  #limits = null;

  /** @param {Host} host */
  constructor(host) {
    this.host = host;
  }

  /** Speaks until the stream ends. @returns {Promise<Ending>} */
  async run() {
    /** @type {import('./grpc.js').CallError | null} */
    let error = null;
    try {
      // Whoever makes the token may take for ever.
      const { signal } = this.#cancellation;
      const metadata = await unlessAborted(authorization(this.host.token), signal);
      // A channel of its own: when to try again is decided here, not by the channel.
      this.#service = connect(WorkerService, this.host.endpoint, {
        'grpc.use_local_subchannel_pool': 1,
      });
      await this.#converse(metadata);
    } catch (thrown) {
      error = callError(thrown);
    }
    this.#over = true;
    for (const timer of this.#timers) clearTimeout(timer);
    this.#service?.close();
    return { welcomed: this.#welcomed, answered: this.#answered, error };
  }

  /** @param {Attempt} attempt It may have something to send. */
  ready(attempt) {
    this.#ready.add(attempt);
    this.#flush();
  }

  /** @param {number} slots How many tasks the worker can run from now on. */
  capacity(slots) {
    if (this.#welcomed) this.#write({ capacity: { slots } });
  }

  /** Closes this side, in order; before `welcome` there is no order to keep. */
  finish() {
    if (this.#over) return;
    if (this.#welcomed) this.#call.end();
    else this.cancel();
  }

  /** Ends it now. */
  cancel() {
    this.#cancellation.abort();
    this.#call?.cancel();
  }

  /**
   * @param {import('@grpc/grpc-js').Metadata} metadata
   * @returns {Promise<void>} Rejects with the status when it is not OK.
   */
  #converse(metadata) {
    return new Promise((resolve, reject) => {
      const call = this.#service.work(metadata);
      this.#call = call;
      call.on('data', (/** @type {any} */ message) => this.#listen(message));
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
  #listen(message) {
    try {
      this.#hear(message);
    } catch (error) {
      this.host.log('error', `a message could not be dealt with: ${error}`);
      this.cancel();
    }
  }

  /** @param {any} message */
  #hear(message) {
    const body = message[message.message];
    switch (message.message) {
      case 'welcome':
        return this.#onWelcome(body);
      case 'task':
        return this.#onTask(body);
      case 'acknowledgment':
        return this.#onAcknowledgment(body);
      case 'resend':
        return this.host.find(body)?.resend(Number(body.number), body.resends);
      case 'cancel':
        return this.host.find(body)?.cancel(body.reason);
      case 'revoke':
        return this.#onRevoke(body);
      case 'heartbeatReply':
        return this.#onHeartbeatReply(body);
      case 'drain':
        return this.host.draining();
      case 'tokenStatus':
        return this.#renewToken(expiryOf(body));
      default:
        // Of a kind that a newer server sends.
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
    for (const known of welcome.resumed) resumed.set(nameOf(known), Number(known.number));
    this.host.log('info', `connected to ${welcome.processor}`);
    this.host.welcomed(this.#limits, resumed, welcome.sessionSecret);
    this.#open = true;
    this.#flush();
    this.#heartbeat();
  }

  /** @param {any} task */
  #onTask(task) {
    if (!this.#limits || this.host.find(task)) return;
    const { uid, requestId, tenantId, userId, action, attempt, traceParent, traceState, sync } =
      task;
    const payload = payloadFrom(task.payload);
    const checkpoint = task.checkpoint ?? null;
    const deadline = dateOrNull(task.deadline);
    this.host.task(
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
    const attempt = this.host.find(acknowledgment);
    if (!attempt) return;
    if (acknowledgment.ended) this.host.drop(attempt, 'the attempt has ended');
    else {
      const { number, maxUnacknowledgedBytes } = acknowledgment;
      attempt.acknowledge(Number(number), Number(maxUnacknowledgedBytes));
    }
  }

  /** @param {any} revoke */
  #onRevoke(revoke) {
    const attempt = this.host.find(revoke);
    if (attempt) this.host.drop(attempt, revoke.reason || "the attempt is not this worker's");
  }

  /** @param {any} reply */
  #onHeartbeatReply(reply) {
    this.#unanswered = 0;
    this.#answered = true;
    for (const cancel of reply.cancelled) this.host.find(cancel)?.cancel(cancel.reason);
    for (const revoke of reply.revoked) this.#onRevoke(revoke);
    if (reply.draining) this.host.draining();
  }

  /** Says that the worker lives, and again in time; ends the stream when nobody answers. */
  #heartbeat() {
    const { heartbeatMs, leaseMs } = /** @type {Limits} */ (this.#limits);
    const now = performance.now();
    if (this.#unanswered && now - this.#unanswered > leaseMs) {
      this.host.log('warn', `no heartbeat was answered for ${leaseMs} ms`);
      this.cancel();
      return;
    }
    this.#unanswered ||= now;
    this.#write({ heartbeat: { attempts: this.host.attempts().map(({ name }) => name) } });
    // In time even when the process is busy.
    this.#after((heartbeatMs * 2) / 3, () => this.#heartbeat());
  }

  /** @param {Date | null} expireTime When the token of the stream expires. */
  #renewToken(expireTime) {
    if (this.#renewal) clearTimeout(this.#renewal);
    if (!expireTime) return;
    const left = expireTime.getTime() - Date.now();
    if (typeof this.host.token !== 'function') {
      this.host.log(
        'warn',
        `the token expires in ${Math.round(left / 1000)} s and cannot be renewed: before that, the` +
          ' worker releases its running attempts and exits; give a function that returns fresh tokens, such as tokenFile',
      );
      const wait = Math.max(left - HAND_BACK_MS, left / 2);
      this.#renewal = this.#after(wait, () => {
        if (wait <= MAX_TIMER_MS) this.host.tokenEnds();
        else this.#renewToken(expireTime);
      });
      return;
    }
    const wait = left - Math.min(left / 5, MAX_TOKEN_LEAD_MS);
    this.#renewal = this.#after(Math.max(wait, TOKEN_RETRY_MS), async () => {
      try {
        const token = await freshToken(this.host.token);
        if (!this.#over) this.#write({ refreshToken: { token } });
      } catch (error) {
        this.host.log('error', `no fresh token: ${error}`);
        if (!this.#over) this.#renewToken(expireTime);
      }
    });
  }

  /** Sends what the attempts have to say, one report of each in turn. */
  #flush() {
    while (this.#open && !this.#over && this.#writable && this.#ready.size > 0) {
      const [attempt] = this.#ready;
      this.#ready.delete(attempt);
      const report = attempt.next();
      if (!report) continue;
      const { kind, body, number } = report;
      const { name, resends } = attempt;
      this.#writable = this.#write({ report: { ...name, number, resends, [kind]: body } });
      this.#ready.add(attempt);
    }
  }

  /**
   * @param {object} message
   * @returns {boolean} Whether more can be written at once.
   */
  #write(message) {
    return this.#over || this.#call.writableEnded ? true : this.#call.write(message);
  }

  /**
   * @param {number} ms
   * @param {() => void} action
   */
  #after(ms, action) {
    const timer = setTimeout(
      () => {
        this.#timers.delete(timer);
        if (!this.#over) action();
      },
      Math.min(ms, MAX_TIMER_MS),
    );
    this.#timers.add(timer);
    return timer;
  }
}

/**
 * @param {any} status
 * @returns {Date | null} When the token expires, by the clock of this machine.
 */
function expiryOf({ timeLeftMs, expireTime }) {
  const left = Number(timeLeftMs);
  return left > 0 ? new Date(Date.now() + left) : dateOrNull(expireTime);
}

/**
 * @param {{uid: string, attempt: number}} attempt
 * @returns {string} What tells attempts apart.
 */
export function nameOf({ uid, attempt }) {
  return `${uid}/${attempt}`;
}

/** Endings before `welcome` after which repeating does not help. */
const FINAL = new Set([status.UNAUTHENTICATED, status.PERMISSION_DENIED, status.INVALID_ARGUMENT]);
/** Endings that may say that the worker broke a rule, and would break it again. */
const OUR_FAULT = new Set([
  status.INVALID_ARGUMENT,
  status.INTERNAL,
  status.OUT_OF_RANGE,
  status.RESOURCE_EXHAUSTED,
]);

/**
 * @param {Ending} ending
 * @returns {boolean} Whether the worker should not come back.
 */
export function isFinal({ welcomed, error }) {
  if (!error) return false;
  // Another program has taken the name of this one.
  if (error.status === status.ALREADY_EXISTS) return true;
  return !welcomed && FINAL.has(error.status);
}

/**
 * @param {Ending} ending
 * @returns {boolean} Whether the next waits begin anew. What is sent again after `welcome` may be
 *   what ended the stream; a heartbeat is answered after the reports before it were taken in.
 */
export function wentWell({ answered, error }) {
  return answered && !(error && OUR_FAULT.has(error.status));
}

/**
 * @template T
 * @param {Promise<T>} promise
 * @param {AbortSignal} signal
 * @returns {Promise<T>} Rejects with the signal's reason when it aborts before.
 */
function unlessAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    const aborted = () => reject(signal.reason);
    if (signal.aborted) aborted();
    signal.addEventListener('abort', aborted, { once: true });
    promise.then(resolve, reject);
  });
}
