/**
 * Verifies one request's log: each event once, in order, without gaps, and the digest of the output
 * at the end. No I/O and no dependencies; runs in browsers.
 */

import { IntegrityError } from './errors.js';
import { isTerminal } from './events.js';
import { Sha256, hex } from './sha256.js';

/**
 * An incremental SHA-256: {@link Sha256}, or a hash of `node:crypto`.
 * @typedef {{update(bytes: Uint8Array): unknown, copy(): Hash, digest(): Uint8Array}} Hash
 */

/**
 * State before the first chunk of an attempt.
 * @typedef {object} Mark
 * @property {number} before `seq` of the last chunk before the attempt; 0 if there is none.
 * @property {number} first `seq` of the first chunk of the attempt.
 * @property {number} attempt Number of the attempt.
 * @property {number} chunks Number of valid chunks before the attempt.
 * @property {Hash} hash Hash of the valid chunks before the attempt.
 */

/** Reads one log from `afterSeq` to its terminal event. */
export class LogReader {
  /** @type {Mark[]} Marks of the attempts that have valid output. */
  #marks = [];
  /** @type {Hash} */
  #hash;
  #lastChunkSeq = 0;

  /**
   * @param {object} [options]
   * @param {number | null} [options.afterSeq] `seq` of the last known event; `null` if the first
   *   received event sets the position. Default 0.
   * @param {boolean} [options.allowGaps] Whether progress events may be missing; default `false`.
   * @param {() => Hash} [options.createHash] Creates an incremental SHA-256.
   */
  constructor({ afterSeq = 0, allowGaps = false, createHash = () => new Sha256() } = {}) {
    /** `seq` of the last accepted event; `null` before the first one if the position is unknown. */
    this.lastSeq = afterSeq;
    /** Whether all output was read, so that it can be verified at the end. */
    this.verifiable = afterSeq === 0;
    /** Whether the terminal event was accepted. */
    this.ended = false;
    /** Number of valid output chunks so far. */
    this.chunks = 0;
    this.allowGaps = allowGaps;
    this.#hash = createHash();
  }

  /**
   * Skips events that contain no output.
   * @param {number} seq `seq` of the last event to skip.
   */
  skipTo(seq) {
    this.lastSeq = Math.max(this.lastSeq ?? 0, seq);
  }

  /**
   * Returns whether events are missing between the last accepted event and `event`.
   * @param {{seq: number}} event
   */
  hasGapBefore(event) {
    return !this.allowGaps && this.lastSeq !== null && event.seq > this.lastSeq + 1;
  }

  /**
   * Reads the next event.
   * @param {import('./events.js').Event} event
   * @returns {boolean} Whether the event is new; `false` for a duplicate.
   * @throws {IntegrityError} If an event is missing, or the output does not match the digest in the
   *   terminal event.
   */
  accept(event) {
    if (this.ended || (this.lastSeq !== null && event.seq <= this.lastSeq)) return false;
    if (this.hasGapBefore(event)) {
      throw new IntegrityError(`received event ${event.seq} after event ${this.lastSeq}`);
    }
    if (event.type === 'output') this.#addChunk(event);
    if (event.type === 'retrying' || event.type === 'failed') this.#rewind(event.rewindToSeq);
    this.lastSeq = event.seq;
    if (isTerminal(event)) {
      this.ended = true;
      this.#verify(event.summary);
    }
    return true;
  }

  /** @param {import('./events.js').OutputEvent} event */
  #addChunk(event) {
    if (this.#marks.at(-1)?.attempt !== event.attempt) {
      const hash = this.#hash.copy();
      const { attempt, seq: first } = event;
      const before = this.#lastChunkSeq;
      this.#marks.push({ before, first, attempt, chunks: this.chunks, hash });
    }
    this.#hash.update(event.chunk.bytes);
    this.#lastChunkSeq = event.seq;
    this.chunks += 1;
  }

  /** @param {number} seq `seq` after which chunks are void. */
  #rewind(seq) {
    while (this.#lastChunkSeq > seq) {
      const mark = this.#marks.pop();
      if (!mark) return;
      // A server rewinds whole attempts only; after any other rewind the hash is unknown.
      if (mark.first <= seq) this.verifiable = false;
      this.#hash = mark.hash;
      this.chunks = mark.chunks;
      this.#lastChunkSeq = mark.before;
    }
  }

  /** @param {import('./events.js').OutputSummary} summary */
  #verify(summary) {
    if (!this.verifiable) return;
    if (summary.chunks !== this.chunks) {
      throw new IntegrityError(
        `output mismatch: received ${this.chunks} chunks, the terminal event has ${summary.chunks}`,
      );
    }
    const sha256 = hex(this.#hash.copy().digest());
    if (sha256 !== summary.sha256) {
      throw new IntegrityError(
        `output mismatch: received SHA-256 ${sha256}, the terminal event has ${summary.sha256}`,
      );
    }
  }
}
