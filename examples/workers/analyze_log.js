/**
 * JavaScript worker of the action `analyze_log`: analyzes the access log of a web server (Common or
 * Combined Log Format) and reports traffic, hours, paths and clients.
 *
 * Each section of the report is emitted as an output chunk when it is complete. A checkpoint contains
 * the completed sections, so that a later attempt does not count them again; the attempt emits them
 * again, because the output of a failed attempt is void.
 */

import { realpathSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { InvalidPayload, Worker, tokenFile } from '../../clients/typescript/src/index.js';

const HELP = `Worker that analyzes access logs of web servers.

Usage: streamer token --permissions 'worker:*' > worker.token
       STREAMER_TOKEN_FILE=worker.token node analyze_log.js [OPTIONS]
       node analyze_log.js --sample 1000 | streamer submit analyze_log -

Options:
      --server <URL>    URL of the server [env: STREAMER_SERVER] [default: http://127.0.0.1:8080]
      --slots <N>       Number of concurrent logs [default: 4]
      --sample <LINES>  Print a payload with a generated log, and exit
  -h, --help            Print help

The token file is read whenever a token is needed. Alternatively, set STREAMER_TOKEN to a token; the
worker exits before the token expires.

Payload: {"log": <text of the log>, "top": <length of each list, 1 to 100, default 10>}
`;

/** Number of lines between progress reports. */
const LINES_PER_REPORT = 2000;
const MONTHS = 'Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec'.split(' ');
// host ident user [day/month/year:hour:minute:second zone] "request" status bytes, followed by
// further fields of the format.
const TIME = String.raw`(\d\d)/(\w{3})/(\d{4}):(\d\d):\d\d:\d\d [+-]\d{4}`;
const QUOTED = String.raw`"((?:[^"\\]|\\.)*)"`;
const LINE = new RegExp(String.raw`^(\S+) \S+ \S.* \[${TIME}\] ${QUOTED} (\d{3}) (\d+|-)(?: |$)`);

/**
 * @typedef {object} Entry Request that the web server handled.
 * @property {string} client
 * @property {string} hour Hour, such as `2024-05-31T14`, in the time zone of the web server.
 * @property {string} path Path of the request, without the query.
 * @property {number} status
 * @property {number} bytes
 */

/**
 * @param {string} line
 * @returns {Entry | null} `null` if the line is not an access log entry.
 */
export function parseLine(line) {
  const found = LINE.exec(line);
  if (!found) return null;
  const [, client, day, monthName, year, clock, request, status, bytes] = found;
  const month = MONTHS.indexOf(monthName) + 1;
  if (month === 0) return null;
  const [, target = request] = request.split(' ');
  return {
    client,
    hour: `${year}-${String(month).padStart(2, '0')}-${day}T${clock}`,
    path: target.split('?')[0],
    status: Number(status),
    bytes: bytes === '-' ? 0 : Number(bytes),
  };
}

/** Counters by key. */
class Tally {
  /** @type {Map<string, number>} */
  counts = new Map();

  /** @param {string} key */
  add(key) {
    this.counts.set(key, (this.counts.get(key) ?? 0) + 1);
  }

  sorted() {
    return Object.fromEntries([...this.counts].sort(([a], [b]) => (a < b ? -1 : 1)));
  }

  /** @param {number} limit */
  top(limit) {
    const all = [...this.counts].sort(([a, m], [b, n]) => n - m || (a < b ? -1 : 1));
    return all.slice(0, limit).map(([name, requests]) => ({ name, requests }));
  }
}

/** @typedef {{add(entry: Entry | null): void, done(): object}} Section Counter of entries. */

/** @type {Record<string, (top: number) => Section>} Sections, in the order of the report. */
const SECTIONS = {
  traffic() {
    const statuses = new Tally();
    let [requests, bytes, errors, bad] = [0, 0, 0, 0];
    return {
      add(entry) {
        if (!entry) {
          bad += 1;
          return;
        }
        requests += 1;
        bytes += entry.bytes;
        if (entry.status >= 400) errors += 1;
        statuses.add(String(entry.status));
      },
      done: () => ({
        requests,
        bytes,
        bad_lines: bad,
        error_rate: requests === 0 ? 0 : Math.round((errors / requests) * 10_000) / 10_000,
        statuses: statuses.sorted(),
      }),
    };
  },
  hours() {
    const hours = new Tally();
    return { add: (entry) => entry && hours.add(entry.hour), done: () => hours.sorted() };
  },
  top_paths(top) {
    const paths = new Tally();
    return { add: (entry) => entry && paths.add(entry.path), done: () => paths.top(top) };
  },
  top_clients(top) {
    const clients = new Tally();
    return { add: (entry) => entry && clients.add(entry.client), done: () => clients.top(top) };
  },
};

/**
 * Handles the action `analyze_log`.
 * @param {import('../../clients/typescript/src/index.js').Context} context
 * @param {any} payload
 * @returns {Promise<object>} All sections, by name.
 */
export async function analyzeLog(context, payload) {
  const { log, top = 10 } = payload ?? {};
  if (typeof log !== 'string' || log.trim() === '') {
    throw new InvalidPayload('log', 'must be the text of an access log');
  }
  if (!Number.isInteger(top) || top < 1 || top > 100) {
    throw new InvalidPayload('top', `must be an integer from 1 to 100, is ${top}`);
  }
  const lines = log.split('\n').filter((line) => line.trim() !== '');
  const names = Object.keys(SECTIONS);
  /** @type {Record<string, object>} */
  const report = context.checkpoint ?? {};
  for (const [index, name] of names.entries()) {
    if (!report[name]) {
      const done = index / names.length;
      report[name] = await count(context, lines, SECTIONS[name](top), (part) => ({
        percentage: 100 * (done + part / names.length),
        message: `${name}: ${Math.round(part * lines.length)} of ${lines.length} lines`,
      }));
      await context.saveCheckpoint(report);
    }
    await context.output({ section: name, data: report[name] });
  }
  return { lines: lines.length, ...report };
}

/**
 * @param {import('../../clients/typescript/src/index.js').Context} context
 * @param {string[]} lines
 * @param {Section} section
 * @param {(part: number) => {percentage: number, message: string}} progress Returns the report for
 *   a completed fraction, 0 to 1.
 */
async function count(context, lines, section, progress) {
  for (let begin = 0; begin < lines.length; begin += LINES_PER_REPORT) {
    context.signal.throwIfAborted();
    for (const line of lines.slice(begin, begin + LINES_PER_REPORT)) section.add(parseLine(line));
    const done = Math.min(begin + LINES_PER_REPORT, lines.length);
    await context.progress(progress(done / lines.length));
  }
  return section.done();
}

/** @param {number} count @returns {string} The same log for every call, with `count` lines. */
export function sampleLog(count) {
  const paths = ['/', '/about', '/search?q=late+trains', '/img/logo.svg', '/api/orders', '/admin'];
  const statuses = [200, 200, 200, 304, 200, 404, 200, 500];
  const lines = [];
  for (let number = 0; number < count; number += 1) {
    const second = (number * 37) % 86_400;
    const clock = [second / 3600, (second / 60) % 60, second % 60]
      .map((part) => String(Math.floor(part)).padStart(2, '0'))
      .join(':');
    const client = `192.0.2.${(number * number) % 23}`;
    const path = paths[(number * 7 + (number >> 3)) % paths.length];
    const status = statuses[(number * 3) % statuses.length];
    lines.push(
      `${client} - - [31/May/2024:${clock} +0200] "GET ${path} HTTP/1.1" ${status} ` +
        `${status === 304 ? '-' : 200 + ((number * 911) % 5000)} "-" "curl/8.5.0"`,
    );
  }
  if (count > 10) lines[10] = 'this line is not an access log entry';
  return lines.join('\n');
}

async function main() {
  const { values } = parseArgs({
    options: {
      server: { type: 'string', default: process.env.STREAMER_SERVER ?? 'http://127.0.0.1:8080' },
      slots: { type: 'string', default: '4' },
      sample: { type: 'string' },
      help: { type: 'boolean', short: 'h' },
    },
  });
  if (values.help) {
    process.stdout.write(HELP);
    return;
  }
  if (values.sample !== undefined) {
    process.stdout.write(`${JSON.stringify({ log: sampleLog(Number(values.sample)) })}\n`);
    return;
  }
  const file = process.env.STREAMER_TOKEN_FILE;
  const token = file ? tokenFile(file) : process.env.STREAMER_TOKEN;
  if (!token) throw new TypeError('set STREAMER_TOKEN_FILE or STREAMER_TOKEN; see --help');
  const worker = new Worker({ server: String(values.server), token, slots: Number(values.slots) });
  const description = 'Analyzes an access log of a web server: statuses, hours, paths, clients';
  await worker.action('analyze_log', { description, maxAttempts: 3 }, analyzeLog).run();
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main().catch((error) => {
    process.stderr.write(`error: ${error.message}\n`);
    process.exitCode = error instanceof TypeError ? 2 : 1;
  });
}
