/** A TCP proxy that can break its connections, and reject new ones. */

import { once } from 'node:events';
import { connect, createServer } from 'node:net';

export class Proxy {
  /** @type {Set<import('node:net').Socket>} */
  #sockets = new Set();
  #blocked = false;
  #muted = false;
  #server;
  /** Number of connections accepted so far. */
  connections = 0;

  /** @param {string} url URL of the server. */
  constructor(url) {
    const { hostname, port } = new URL(url);
    this.#server = createServer((client) => {
      this.connections += 1;
      if (this.#blocked) return client.destroy();
      const upstream = connect(Number(port), hostname);
      this.#forward(client, upstream, () => true);
      this.#forward(upstream, client, () => !this.#muted);
    });
  }

  /** @param {string} url URL of the server. */
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
   * @param {() => boolean} forwards Whether data is forwarded.
   */
  #forward(from, to, forwards) {
    this.#sockets.add(from);
    from.on('data', (bytes) => forwards() && to.write(bytes));
    from.on('error', () => {});
    from.on('close', () => {
      this.#sockets.delete(from);
      to.destroy();
    });
  }

  /** Breaks every connection. */
  disconnect() {
    this.#muted = false;
    for (const socket of this.#sockets) socket.destroy();
  }

  /** Discards data from the server, until the next {@link disconnect}. */
  mute() {
    this.#muted = true;
  }

  /** Breaks every connection, and rejects new ones until {@link unblock}. */
  block() {
    this.#blocked = true;
    this.disconnect();
  }

  unblock() {
    this.#blocked = false;
  }

  async stop() {
    this.block();
    this.#server.close();
  }
}
