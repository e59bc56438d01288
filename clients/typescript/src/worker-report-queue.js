/**
 * Queue of the reports of one attempt that are not known to be durable. It is ordered and bounded;
 * its reports are numbered, and sent again on every new stream. No I/O. Implements rules 11 to 18
 * of docs/worker-protocol.md.
 */

/**
 * Limits of unacknowledged progress and output reports. The handler waits while a limit is reached.
 * @typedef {object} Window
 * @property {number} maxUnacknowledged
 * @property {number} maxUnacknowledgedBytes
 */

/**
 * @typedef {object} Report
 * @property {string} kind Name of the member of `Report.kind` in the protocol.
 * @property {any} body Value of the member.
 * @property {number} number Number of the report in the protocol.
 * @property {number} bytes Counted size in bytes; 0 if the report is not counted.
 * @property {boolean} counted Whether it is a progress or output report.
 */

/** Queues the unacknowledged reports of one attempt, oldest first. */
export class ReportQueue {
  /** @type {Report[]} */
  #reports = [];
  /** Number of queued reports, from the oldest, that were sent on the current stream. */
  #sent = 0;
  #unacknowledged = { count: 0, bytes: 0 };
  #inFlight = { count: 0, bytes: 0 };

  /** Number of the last progress or output report. */
  number = 0;
  /** Number of the last durable report. */
  acknowledged = 0;
  /** Whether the final report was added. */
  ended = false;
  /** Number of `resend` messages on the current stream. */
  resends = 0;

  /**
   * Returns whether the limits allow another progress or output report.
   * @param {Window} window
   */
  hasRoom(window) {
    return fits(this.#unacknowledged, window);
  }

  /**
   * Adds a progress or output report.
   * @param {'progress' | 'output'} kind
   * @param {any} body
   * @param {number} bytes Counted size, in bytes.
   */
  addCounted(kind, body, bytes) {
    this.number += 1;
    this.#unacknowledged.count += 1;
    this.#unacknowledged.bytes += bytes;
    this.#reports.push({ kind, body, number: this.number, bytes, counted: true });
  }

  /**
   * Adds a checkpoint, which replaces the previous one.
   * @param {Uint8Array} body
   */
  addCheckpoint(body) {
    const previous = this.#reports.findIndex((report) => report.kind === 'checkpoint');
    if (previous >= 0) this.#remove(previous);
    this.#add('checkpoint', body);
  }

  /** Adds a keep-alive unless an unsent report exists: every report counts as a keep-alive. */
  addKeepAlive() {
    if (this.#sent === this.#reports.length) this.#add('keepAlive', {});
  }

  /**
   * Adds the final report.
   * @param {'result' | 'error' | 'release'} kind
   * @param {any} body
   */
  addFinal(kind, body) {
    this.ended = true;
    this.#add(kind, body);
  }

  /**
   * Returns the next report to send, and marks it as sent; `null` if all reports were sent or the
   * window is full.
   * @param {Window} window
   * @returns {Report | null}
   */
  next(window) {
    const report = this.#reports[this.#sent];
    if (!report || (report.counted && !fits(this.#inFlight, window))) return null;
    if (report.kind === 'keepAlive') {
      this.#reports.splice(this.#sent, 1);
      return report;
    }
    this.#sent += 1;
    if (report.counted) {
      this.#inFlight.count += 1;
      this.#inFlight.bytes += report.bytes;
    }
    return report;
  }

  /**
   * Removes durable reports: progress and output up to report `number`, and checkpoints before it.
   * A checkpoint with exactly this number may not be durable.
   * @param {number} number Number of the last durable report.
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
   * Continues on a new stream, on which the reports after report `number` are sent.
   * @param {number} number Number of the last durable report.
   */
  resume(number) {
    this.#sent = 0;
    this.#inFlight = { count: 0, bytes: 0 };
    this.#reports = this.#reports.filter((report) => report.kind !== 'keepAlive');
    this.resends = 0;
    this.acknowledge(number);
  }

  /**
   * Resends reports that the server dropped.
   * @param {number} number Number of the last report that was not dropped.
   * @param {number} resends Number of `resend` messages on the current stream.
   */
  resend(number, resends) {
    this.resends = resends;
    const dropped = this.#reports.findIndex((report) =>
      report.counted ? report.number > number : report.number >= number,
    );
    if (dropped < 0 || dropped >= this.#sent) return;
    for (const report of this.#reports.slice(dropped, this.#sent)) {
      if (!report.counted) continue;
      this.#inFlight.count -= 1;
      this.#inFlight.bytes -= report.bytes;
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
    this.#unacknowledged.count -= 1;
    this.#unacknowledged.bytes -= report.bytes;
    if (!sent) return;
    this.#inFlight.count -= 1;
    this.#inFlight.bytes -= report.bytes;
  }
}

/**
 * @param {{count: number, bytes: number}} usage
 * @param {Window} window
 */
function fits(usage, window) {
  return usage.count < window.maxUnacknowledged && usage.bytes < window.maxUnacknowledgedBytes;
}
