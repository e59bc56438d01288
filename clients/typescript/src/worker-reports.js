/**
 * The reports of one attempt that the server may not have yet: numbered, in order, bounded, and
 * sent again on every new stream. Pure: it decides what is sent, and others send it. The rules
 * are 11 to 18 of docs/worker-protocol.md.
 */

/**
 * Bounds of unacknowledged progress and output reports.
 * @typedef {object} Window
 * @property {number} maxUnacknowledged At this number the handler waits.
 * @property {number} maxUnacknowledgedBytes Beyond this size it waits.
 */

/**
 * @typedef {object} Report
 * @property {string} kind Name of the member of `Report.kind` in the protocol.
 * @property {any} body Its value.
 * @property {number} number As the protocol numbers it.
 * @property {number} bytes What it counts for; 0 for what is not counted.
 * @property {boolean} counted Whether it is a progress or output report.
 */

/** Unacknowledged reports, oldest first. */
export class ReportQueue {
  /** @type {Report[]} */
  #reports = [];
  /** How many of them, from the front, were sent on this stream. */
  #sent = 0;
  #kept = { count: 0, bytes: 0 };
  #onTheWay = { count: 0, bytes: 0 };

  /** Number of the last progress or output report that was made. */
  number = 0;
  /** Reports up to this number are durable. */
  acknowledged = 0;
  /** Whether the last report was made. */
  ended = false;
  /** How often the server asked for dropped reports on this stream. */
  resends = 0;

  /**
   * Whether another progress or output report may be made.
   * @param {Window} window
   */
  hasRoom(window) {
    return fits(this.#kept, window);
  }

  /**
   * Adds a progress or output report.
   * @param {'progress' | 'output'} kind
   * @param {any} body
   * @param {number} bytes What it counts for.
   */
  addCounted(kind, body, bytes) {
    this.number += 1;
    this.#kept.count += 1;
    this.#kept.bytes += bytes;
    this.#reports.push({ kind, body, number: this.number, bytes, counted: true });
  }

  /**
   * Adds a checkpoint, in place of any that is not known to be durable.
   * @param {Uint8Array} body
   */
  addCheckpoint(body) {
    const before = this.#reports.findIndex((report) => report.kind === 'checkpoint');
    if (before >= 0) this.#remove(before);
    this.#add('checkpoint', body);
  }

  /** Says that the handler lives, unless something that waits says so anyway. */
  addKeepAlive() {
    if (this.#sent === this.#reports.length) this.#add('keepAlive', {});
  }

  /**
   * Adds the last report.
   * @param {'result' | 'error' | 'release'} kind
   * @param {any} body
   */
  addLast(kind, body) {
    this.ended = true;
    this.#add(kind, body);
  }

  /**
   * The next report to send, if one may be sent now; it counts as sent.
   * @param {Window} window
   * @returns {Report | null}
   */
  next(window) {
    const report = this.#reports[this.#sent];
    if (!report || (report.counted && !fits(this.#onTheWay, window))) return null;
    if (report.kind === 'keepAlive') {
      this.#reports.splice(this.#sent, 1);
      return report;
    }
    this.#sent += 1;
    if (report.counted) {
      this.#onTheWay.count += 1;
      this.#onTheWay.bytes += report.bytes;
    }
    return report;
  }

  /**
   * Forgets what is durable: progress and output up to this number, and checkpoints before it.
   * One that stands at exactly this number may not be.
   * @param {number} number
   */
  acknowledge(number) {
    this.acknowledged = Math.max(this.acknowledged, Math.min(number, this.number));
    for (let index = 0; index < this.#reports.length;) {
      const report = this.#reports[index];
      const durable = report.counted
        ? report.number <= this.acknowledged
        : report.kind === 'checkpoint' && report.number < this.acknowledged;
      if (durable) this.#remove(index);
      else if (report.counted) return;
      else index += 1;
    }
  }

  /**
   * Begins on a new stream, where reports up to this number are known.
   * @param {number} number
   */
  restart(number) {
    this.#sent = 0;
    this.#onTheWay = { count: 0, bytes: 0 };
    this.#reports = this.#reports.filter((report) => report.kind !== 'keepAlive');
    this.resends = 0;
    this.acknowledge(number);
  }

  /**
   * Sends again what the server has dropped.
   * @param {number} number Reports up to this one have arrived.
   * @param {number} resends How often the server asked on this stream.
   */
  resend(number, resends) {
    this.resends = resends;
    const dropped = this.#reports.findIndex((report) =>
      report.counted ? report.number > number : report.number >= number,
    );
    if (dropped < 0 || dropped >= this.#sent) return;
    for (const report of this.#reports.slice(dropped, this.#sent)) {
      if (!report.counted) continue;
      this.#onTheWay.count -= 1;
      this.#onTheWay.bytes -= report.bytes;
    }
    this.#sent = dropped;
  }

  /**
   * @param {string} kind
   * @param {any} body
   */
  #add(kind, body) {
    this.#reports.push({ kind, body, number: this.number, bytes: 0, counted: false });
  }

  /** @param {number} index */
  #remove(index) {
    const [report] = this.#reports.splice(index, 1);
    const sent = index < this.#sent;
    if (sent) this.#sent -= 1;
    if (!report.counted) return;
    this.#kept.count -= 1;
    this.#kept.bytes -= report.bytes;
    if (!sent) return;
    this.#onTheWay.count -= 1;
    this.#onTheWay.bytes -= report.bytes;
  }
}

/**
 * @param {{count: number, bytes: number}} kept
 * @param {Window} window
 */
function fits(kept, window) {
  return kept.count < window.maxUnacknowledged && kept.bytes < window.maxUnacknowledgedBytes;
}
