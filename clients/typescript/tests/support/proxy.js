/** A TCP proxy that can cut its connections, or refuse new ones for a while. */

import { once } from 'node:events';
import { connect, createServer } from 'node:net';

export class Proxy {
  /** @type {Set<import('node:net').Socket>} */
  #sockets = new Set();
  #blocked = false;
  #muted = false;
  #server;
  /** How many connections came. */
  connections = 0;

  /** @param {string} url Of the server. */
  constructor(url) {
    const { hostname, port } = new URL(url);
    this.#server = createServer((client) => {
      this.connections += 1;
      if (this.#blocked) return client.destroy();
      const upstream = connect(Number(port), hostname);
      this.#join(client, upstream, () => true);
      this.#join(upstream, client, () => !this.#muted);
    });
  }

  /** @param {string} url Of the server. */
  static async start(url) {
    const proxy = new Proxy(url);
    proxy.#server.listen(0, '127.0.0.1');
    await once(proxy.#server, 'listening');
    return proxy;
  }

  get address() {
    const { port } = /** @type {import('node:net').AddressInfo} */ (this.#server.address());
    return `127.0.0.1:${port}`;
  }

  /**
   * @param {import('node:net').Socket} from
   * @param {import('node:net').Socket} to
   * @param {() => boolean} passes Whether what comes is passed on.
   */
  #join(from, to, passes) {
    this.#sockets.add(from);
    from.on('data', (bytes) => passes() && to.write(bytes));
    from.on('error', () => {});
    from.on('close', () => {
      this.#sockets.delete(from);
      to.destroy();
    });
  }

  /** Ends every connection, without a word. */
  cut() {
    this.#muted = false;
    for (const socket of this.#sockets) socket.destroy();
  }

  /** Swallows what the server says, until the next {@link cut}. */
  mute() {
    this.#muted = true;
  }

  /** Ends every connection, and those that come, until {@link unblock}. */
  block() {
    this.#blocked = true;
    this.cut();
  }

  unblock() {
    this.#blocked = false;
  }

  async stop() {
    this.block();
    this.#server.close();
  }
}
