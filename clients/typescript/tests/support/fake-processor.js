/** A fake processor that a test drives. */

import { Server, ServerCredentials } from '@grpc/grpc-js';

import { WorkerService } from '../../src/schema.js';
import { withTimeout } from './wait.js';

export const UID = '01J00000000000000000000000';

/** The server side of one worker stream. */
export class FakeStream {
  /** @type {any[]} */
  #received = [];
  #wake = () => {};
  ended = false;

  /** @param {any} call */
  constructor(call) {
    this.call = call;
    call.on('data', (/** @type {any} */ message) => {
      this.#received.push(message);
      this.#wake();
    });
    call.on('end', () => {
      this.ended = true;
      call.end();
      this.#wake();
    });
    call.on('error', () => {});
    call.on('cancelled', () => {
      this.ended = true;
      this.#wake();
    });
  }

  /** @param {object} message */
  send(message) {
    this.call.write(message);
  }

  /** @param {number} code @param {string} details */
  fail(code, details) {
    this.call.emit('error', { code, details });
  }

  /** @param {object} [more] */
  welcome(more = {}) {
    this.send({
      welcome: {
        processor: 'fake',
        heartbeatMs: 30_000,
        leaseMs: 90_000,
        maxPayloadBytes: 1000,
        maxOutputChunkBytes: 1000,
        maxUnacknowledged: 100,
        ...more,
      },
    });
  }

  /** @param {object} [more] */
  task(more = {}) {
    const payload = { contentType: 'application/json', data: Buffer.from('{}') };
    this.send({ task: { uid: UID, attempt: 1, requestId: 'r', action: 'act', payload, ...more } });
  }

  /**
   * Returns the next message of the given kind, and discards the messages before it.
   * @param {string} kind
   * @returns {Promise<any>}
   */
  async receive(kind) {
    const find = async () => {
      for (;;) {
        while (this.#received.length > 0) {
          const message = this.#received.shift();
          if (message.message === kind) return message[kind];
        }
        if (this.ended) throw new Error(`the stream ended before ${kind}`);
        await this.#change();
      }
    };
    return withTimeout(find(), kind);
  }

  /**
   * Returns the next `count` reports, each as `kind number`.
   * @param {number} count
   */
  async reports(count) {
    const reports = [];
    while (reports.length < count) {
      const report = await this.receive('report');
      reports.push(`${report.kind} ${report.number}`);
    }
    return reports;
  }

  async end() {
    const ended = async () => {
      while (!this.ended) await this.#change();
    };
    await withTimeout(ended(), 'the stream to end');
  }

  #change() {
    return new Promise((resolve) => {
      this.#wake = () => resolve(undefined);
    });
  }
}

/** Accepts the streams of workers. */
export class FakeProcessor {
  #server = new Server();
  /** @type {FakeStream[]} */
  #streams = [];
  #wake = () => {};
  url = '';

  /** @param {import('node:test').TestContext} t */
  static async start(t) {
    const fake = new FakeProcessor();
    fake.#server.addService(WorkerService.service, {
      work: (/** @type {any} */ call) => {
        fake.#streams.push(new FakeStream(call));
        fake.#wake();
      },
    });
    const port = await new Promise((resolve, reject) => {
      const insecure = ServerCredentials.createInsecure();
      fake.#server.bindAsync('127.0.0.1:0', insecure, (error, bound) =>
        error ? reject(error) : resolve(bound),
      );
    });
    fake.url = `http://127.0.0.1:${port}`;
    t.after(() => fake.#server.forceShutdown());
    return fake;
  }

  /** @returns {Promise<FakeStream>} The next stream that a worker opens. */
  async stream() {
    const next = async () => {
      for (;;) {
        const stream = this.#streams.shift();
        if (stream) return stream;
        await new Promise((resolve) => {
          this.#wake = () => resolve(undefined);
        });
      }
    };
    return withTimeout(next(), 'a stream');
  }
}
