/** Waits with a timeout that is reached only if a test fails. */

const TIMEOUT_MS = 30_000;

/**
 * @template T
 * @param {Promise<T>} promise
 * @param {string} description Description of the promise for the error message.
 * @returns {Promise<T>}
 */
export async function withTimeout(promise, description) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  const timeout = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`timeout waiting for ${description}`)), TIMEOUT_MS);
  });
  try {
    return await Promise.race([promise, /** @type {Promise<never>} */ (timeout)]);
  } finally {
    clearTimeout(timer);
  }
}

/** A promise that the test resolves. */
export class Deferred {
  /** @type {(value?: any) => void} */
  resolve = () => {};

  /** @param {string} description */
  constructor(description) {
    this.description = description;
    /** @type {Promise<any>} */
    this.promise = new Promise((resolve) => {
      this.resolve = resolve;
    });
  }

  /** @returns {Promise<any>} */
  wait() {
    return withTimeout(this.promise, this.description);
  }
}
