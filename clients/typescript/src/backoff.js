/**
 * Exponential backoff with full jitter: delays are drawn uniformly between 0 and a bound that
 * doubles with each failure. No dependencies; runs in browsers.
 */

/** Maximum delay of a timer, in milliseconds. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/** Generates the delays between the retries of one operation. */
export class Backoff {
  /**
   * @param {object} [options]
   * @param {number} [options.initialMs] Initial bound, in milliseconds; default 100.
   * @param {number} [options.maxMs] Maximum bound, in milliseconds; default 10,000.
   * @param {() => number} [options.random] Returns uniformly distributed numbers from 0 to 1.
   */
  constructor({ initialMs = 100, maxMs = 10_000, random = Math.random } = {}) {
    this.initialMs = initialMs;
    this.maxMs = maxMs;
    this.random = random;
    this.failures = 0;
  }

  /** Resets the bound to its initial value after a success. */
  reset() {
    this.failures = 0;
  }

  /** @returns {number} The next delay, in milliseconds. */
  next() {
    const bound = Math.min(this.maxMs, this.initialMs * 2 ** Math.min(this.failures, 30));
    this.failures += 1;
    return this.random() * bound;
  }
}

/**
 * Resolves after a delay.
 * @param {number} ms Delay, in milliseconds.
 * @param {AbortSignal} [signal] Ends the delay early.
 * @returns {Promise<void>} Rejects with the signal's reason when it aborts.
 */
export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const onAbort = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(
      () => {
        signal?.removeEventListener('abort', onAbort);
        resolve();
      },
      Math.min(Math.max(ms, 0), MAX_TIMER_MS),
    );
    signal?.addEventListener('abort', onAbort, { once: true });
  });
}
