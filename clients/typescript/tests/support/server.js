/**
 * A real server for the tests: runs the binary `STREAMER_TESTS_BINARY` with a separate loopback
 * address and data folder, which it keeps when it is killed and restarted.
 */

import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

import { withTimeout } from './wait.js';

const binary = process.env.STREAMER_TESTS_BINARY ?? '';
if (!binary) throw new Error('STREAMER_TESTS_BINARY must be the path of the streamer binary');

/** Environment without `STREAMER_…` variables, which configure the server. */
const env = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !name.startsWith('STREAMER_')),
);

/** Settings with short intervals, so that lost attempts and requests are recovered quickly. */
const SETTINGS = ['execution.lease_duration=1500ms', 'execution.poll_interval=50ms', 'log.filter=warn'];

/** Port that is bound on an address while it is claimed, as in tests/harness/loopback.rs. */
const CLAIM_PORT = 10_000;
/** Port of a server, below the ephemeral ports of the system. */
const SERVER_PORT = 10_001;

/** Command prefix: the kernel kills the process when the test process exits. */
export const KILLED_WITH_TESTS = ['setpriv', '--pdeathsig', 'KILL', '--'];

let candidates = process.pid * 64;

/** Claims a loopback address that no other test uses until the claim is closed. */
async function claimLoopbackAddress() {
  for (let attempt = 0; attempt < 100; attempt += 1) {
    const number = candidates % (254 << 16);
    candidates += 1;
    const host = `127.${(number >> 16) + 1}.${(number >> 8) & 255}.${number & 255}`;
    const claim = createServer().unref();
    try {
      claim.listen(CLAIM_PORT, host);
      await once(claim, 'listening');
      return { host, claim };
    } catch (error) {
      if (/** @type {NodeJS.ErrnoException} */ (error).code !== 'EADDRINUSE') throw error;
    }
  }
  throw new Error(`port ${CLAIM_PORT} is in use on every address`);
}

export class Server {
  /** @type {import('node:child_process').ChildProcess | null} */
  #process = null;
  #claim;
  #address;

  /**
   * @param {string[]} settings
   * @param {{ host: string, claim: import('node:net').Server }} address
   */
  constructor(settings, { host, claim }) {
    this.#claim = claim;
    this.#address = `${host}:${SERVER_PORT}`;
    this.data = mkdtempSync(join(tmpdir(), 'streamer-js-'));
    this.settings = settings;
  }

  /** @param {string[]} settings Additional settings. */
  static async start(...settings) {
    const server = new Server([...SETTINGS, ...settings], await claimLoopbackAddress());
    await server.start();
    return server;
  }

  async start() {
    const settings = this.settings.flatMap((setting) => ['--set', setting]);
    const args = ['up', '--listen', this.#address, '--data', this.data, ...settings];
    const [program, ...rest] = [...KILLED_WITH_TESTS, binary, ...args];
    const child = spawn(program, rest, { env, stdio: ['ignore', 'pipe', 'inherit'] });
    this.#process = child;
    const lines = createInterface({ input: /** @type {any} */ (child.stdout) });
    const ready = new Promise((resolve, reject) => {
      lines.on('line', (line) => {
        if (line.startsWith(`Streamer is ready: ${this.url} `)) resolve(undefined);
      });
      child.on('error', reject);
      child.on('exit', (code) => reject(new Error(`the server exited with code ${code}`)));
    });
    await withTimeout(ready, 'the server to be ready');
  }

  get url() {
    return `http://${this.#address}`;
  }

  get websocketUrl() {
    return `${this.url.replace('http', 'ws')}/ws`;
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
    await withTimeout(exit, 'the server to exit');
  }

  async stop() {
    await this.kill();
    this.#claim.close();
    rmSync(this.data, { recursive: true, force: true });
  }
}
