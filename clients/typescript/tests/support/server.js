/**
 * A real server for the tests: the binary that `STREAMER_TESTS_BINARY` names, on a free port and
 * a data folder of its own. It can be killed and started again on the same.
 */

import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

import { within } from './wait.js';

const binary = process.env.STREAMER_TESTS_BINARY ?? '';
if (!binary) throw new Error('STREAMER_TESTS_BINARY must name the streamer binary');

/** Every `STREAMER_…` variable would be an option of the server. */
const env = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !name.startsWith('STREAMER_')),
);

/** Short times, so that what is lost is found soon. */
const SETTINGS = ['execution.lease_ms=1500', 'execution.poll_interval_ms=50', 'log.filter=warn'];

export class Server {
  /** @type {import('node:child_process').ChildProcess | null} */
  #process = null;
  #listen = '127.0.0.1:0';
  url = '';

  /** @param {string[]} settings */
  constructor(settings) {
    this.data = mkdtempSync(join(tmpdir(), 'streamer-js-'));
    this.settings = settings;
  }

  /** @param {string[]} settings More of them. */
  static async start(...settings) {
    const server = new Server([...SETTINGS, ...settings]);
    await server.start();
    return server;
  }

  async start() {
    const settings = this.settings.flatMap((setting) => ['--set', setting]);
    const args = ['up', '--listen', this.#listen, '--data', this.data, ...settings];
    const child = spawn(binary, args, { env, stdio: ['ignore', 'pipe', 'inherit'] });
    this.#process = child;
    const lines = createInterface({ input: /** @type {any} */ (child.stdout) });
    const ready = new Promise((resolve, reject) => {
      lines.on('line', (line) => {
        const found = /^Streamer is ready: (http:\/\/(\S+))/.exec(line);
        if (found) resolve(found);
      });
      child.on('error', reject);
      child.on('exit', (code) => reject(new Error(`the server ended with ${code}`)));
    });
    const [, url, address] = await within(ready, 'the server to be ready');
    this.url = url;
    this.#listen = address;
  }

  get websocketUrl() {
    return `${this.url.replace('http', 'ws')}/ws`;
  }

  get port() {
    return Number(new URL(this.url).port);
  }

  /**
   * @param {string} permissions
   * @param {string} [user]
   * @param {string} [expires]
   */
  token(permissions, user = 'js', expires = '1h') {
    const claims = ['--user', user, '--tenant', 'dev', '--permissions', permissions];
    const args = ['token', '--data', this.data, '--expires', expires, ...claims];
    return execFileSync(binary, args, { env, encoding: 'utf8' }).trim();
  }

  /** @param {NodeJS.Signals} [signal] */
  async kill(signal = 'SIGKILL') {
    const child = this.#process;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const exit = once(child, 'exit');
    child.kill(signal);
    await within(exit, 'the server to end');
  }

  async stop() {
    await this.kill();
    rmSync(this.data, { recursive: true, force: true });
  }
}
