/**
 * Reads one request's log: each event once, in order, without gaps, and at its end the proof that
 * the output is whole. Pure: who fetches the events, and how often they come, is no concern of
 * it. No dependencies; runs in browsers.
 */

import { IntegrityError } from './errors.js';
import { isTerminal } from './events.js';
import { Sha256, hex } from './sha256.js';

/**
 * An incremental SHA-256: {@link Sha256}, or one of `node:crypto`.
 * @typedef {{update(bytes: Uint8Array): unknown, copy(): Hash, digest(): Uint8Array}} Hash
 */

/**
 * The valid output up to some point of the log.
 * @typedef {object} Mark
 * @property {number} before `seq` of the last chunk before it, 0 when there is none.
 * @property {number} first `seq` of the first chunk after it.
 * @property {number} attempt The attempt whose output begins here.
 * @property {number} chunks How many chunks are before it.
 * @property {Hash} hash Of those chunks.
 */

/** Follows one log from `afterSeq` to its terminal event. */
export class LogReader {
  /** @type {Mark[]} One for each attempt that has valid output. */
  #marks = [];
  /** @type {Hash} */
  #hash;
  #lastChunkSeq = 0;

  /**
   * @param {object} [options]
   * @param {number | null} [options.afterSeq] `seq` of the last event that is known; `null` when
   *   the first one that comes says where the log begins. Default 0.
   * @param {boolean} [options.gaps] Whether progress events may be missing; default `false`.
   * @param {() => Hash} [options.createHash] Makes an incremental SHA-256.
   */
  constructor({ afterSeq = 0, gaps = false, createHash = () => new Sha256() } = {}) {
    /** `seq` of the last event that was taken in; `null` before the first when not known. */
    this.lastSeq = afterSeq;
    /** Whether the output is proved at the end: it is not when the beginning was not read. */
    this.whole = afterSeq === 0;
    /** Whether the terminal event was taken in. */
    this.ended = false;
    /** How many output chunks are valid so far. */
    this.chunks = 0;
    this.gaps = gaps;
    this.#hash = createHash();
  }

  /**
   * What the log is known to hold up to here has no output.
   * @param {number} seq
   */
  skipTo(seq) {
    this.lastSeq = Math.max(this.lastSeq ?? 0, seq);
  }

  /**
   * Whether events are missing between what was read and this one.
   * @param {{seq: number}} event
   */
  misses(event) {
    return !this.gaps && this.lastSeq !== null && event.seq > this.lastSeq + 1;
  }

  /**
   * Takes in the next event.
   * @param {import('./events.js').Event} event
   * @returns {boolean} Whether it is new; `false` for one that came before.
   * @throws {IntegrityError} When one is missing, or at the end the output is not what was
   *   produced.
   */
  accept(event) {
    if (this.ended || (this.lastSeq !== null && event.seq <= this.lastSeq)) return false;
    if (this.misses(event)) {
      throw new IntegrityError(`event ${event.seq} came after event ${this.lastSeq}`);
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

  /** @param {number} seq Chunks after it are void. */
  #rewind(seq) {
    while (this.#lastChunkSeq > seq) {
      const mark = this.#marks.pop();
      if (!mark) return;
      // A server rewinds whole attempts; of a part of one nothing could be proved.
      if (mark.first <= seq) this.whole = false;
      this.#hash = mark.hash;
      this.chunks = mark.chunks;
      this.#lastChunkSeq = mark.before;
    }
  }

  /** @param {import('./events.js').OutputSummary} summary */
  #verify(summary) {
    if (!this.whole) return;
    if (summary.chunks !== this.chunks) {
      throw new IntegrityError(
        `the output has ${summary.chunks} valid chunks, ${this.chunks} were received`,
      );
    }
    const sha256 = hex(this.#hash.copy().digest());
    if (sha256 !== summary.sha256) {
      throw new IntegrityError(`the output's SHA-256 is ${summary.sha256}, received ${sha256}`);
    }
  }
}
