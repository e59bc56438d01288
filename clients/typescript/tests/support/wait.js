/** Waiting on events: generous limits that only a failure reaches. */

const LIMIT_MS = 30_000;

/**
 * @template T
 * @param {Promise<T>} promise
 * @param {string} what Waited for, for the error.
 * @returns {Promise<T>}
 */
export async function within(promise, what) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  const limit = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited too long for ${what}`)), LIMIT_MS);
  });
  try {
    return await Promise.race([promise, /** @type {Promise<never>} */ (limit)]);
  } finally {
    clearTimeout(timer);
  }
}

/** Something that will be known once. */
export class Once {
  /** @type {(value?: any) => void} */
  resolve = () => {};

  /** @param {string} what */
  constructor(what) {
    this.what = what;
    /** @type {Promise<any>} */
    this.promise = new Promise((resolve) => {
      this.resolve = resolve;
    });
  }

  /** @returns {Promise<any>} */
  wait() {
    return within(this.promise, this.what);
  }
}
