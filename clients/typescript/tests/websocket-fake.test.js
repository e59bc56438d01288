/** Tests of the WebSocket client with a fake server. */

import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { test } from 'node:test';
import WebSocket, { WebSocketServer } from 'ws';

import { StreamerSocket } from '../src/websocket.js';
import { Deferred } from './support/wait.js';

const head = { request_id: 'r', uid: 'U', timestamp: '2030-01-01T00:00:00.000Z', attempt: 1 };

/**
 * Starts a server that sends `connected`, and passes messages to the test; returns a client.
 * @param {import('node:test').TestContext} t
 * @param {(message: any, send: (message: object | string) => void, socket: WebSocket) => void}
 *   onMessage
 * @param {object} [options] Options of the client.
 */
async function startFake(t, onMessage, options = {}) {
  const server = new WebSocketServer({ host: '127.0.0.1', port: 0 });
  /** @type {string[][]} */
  const protocols = [];
  server.on('connection', (socket, request) => {
    protocols.push(String(request.headers['sec-websocket-protocol']).split(/, ?/));
    const send = (/** @type {object | string} */ message) =>
      socket.send(typeof message === 'string' ? message : JSON.stringify(message));
    socket.on('message', (data) => onMessage(JSON.parse(String(data)), send, socket));
    send({ type: 'connected', connection_id: 'c', heartbeat_ms: 60_000, max_message_bytes: 1000 });
  });
  await once(server, 'listening');
  const { port } = /** @type {import('node:net').AddressInfo} */ (server.address());
  const socket = new StreamerSocket({
    url: `ws://127.0.0.1:${port}/ws`,
    token: 't',
    WebSocket,
    ...options,
  });
  t.after(() => {
    socket.close();
    for (const client of server.clients) client.terminate();
    server.close();
  });
  return { socket, protocols };
}

/** @param {string} text */
function summary(text, chunks = 1) {
  return { chunks, sha256: createHash('sha256').update(text).digest('hex') };
}

test('the token is sent as a second subprotocol', async (t) => {
  const { socket, protocols } = await startFake(t, (_, send) =>
    send({ type: 'requests', requests: [] }),
  );
  assert.deepEqual(await socket.list(), { requests: [], nextPageToken: '' });
  assert.deepEqual(protocols, [['streamer.v1.json', 'bearer.t']]);
});

test('output that does not match its digest is rejected', async (t) => {
  const { socket } = await startFake(t, (message, send) => {
    send({ ...head, type: 'subscribed', last_seq: 2, state: 'SUCCEEDED' });
    const [data, hashed] = message.request_id === 'r' ? ['{"a": 1}', '{"a":1}'] : ['1', '1'];
    send(`{"type":"output","request_id":"r","uid":"U","seq":1,"attempt":1,"data":${data}}`);
    send({ ...head, type: 'complete', seq: 2, result: 1, output: summary(hashed) });
  });
  await assert.rejects(socket.watch('r'), { name: 'IntegrityError', message: /SHA-256/ });
});

test('a missing event is requested once', async (t) => {
  /** @type {number[]} */
  const requested = [];
  const { socket } = await startFake(t, (message, send) => {
    requested.push(message.after_seq);
    send({ ...head, type: 'subscribed', last_seq: 3, state: 'SUCCEEDED' });
    if (requested.length === 1) send({ ...head, type: 'progress', seq: 1 });
    if (requested.length === 2)
      send({ ...head, type: 'output', seq: 2, data: 'b', content_type: 'text/x' });
    send({ ...head, type: 'complete', seq: 3, result: 'c', output: summary('b') });
  });
  assert.equal(await socket.watch('r'), 'c');
  assert.deepEqual(requested, [0, 1]);
  requested.length = 2;
  await assert.rejects(socket.watch('U'), { name: 'IntegrityError', message: /twice/ });
});

test('two followers of one request share the position of the one that is behind', async (t) => {
  /** @type {number[]} */
  const requested = [];
  const { socket } = await startFake(t, (message, send) => {
    requested.push(message.after_seq);
    send({ ...head, type: 'subscribed', last_seq: 6, state: 'RUNNING' });
    if (requested.length < 2) return;
    const seqs = [1, 2, 3, 4, 5, 6];
    for (const seq of seqs.slice(message.after_seq)) send({ ...head, type: 'progress', seq });
    send({ ...head, type: 'complete', seq: 7, result: 1, output: summary('', 0) });
  });
  /** @type {number[]} */
  const seen = [];
  const onEvent = (/** @type {any} */ { seq }) => void seen.push(seq);
  const both = [socket.watch('r', { onEvent }), socket.watch('r', { afterSeq: 5, onEvent })];
  assert.deepEqual(await Promise.all(both), [1, 1]);
  assert.deepEqual(requested, [0, 0]);
  assert.deepEqual(seen, [1, 2, 3, 4, 5, 6, 6, 7, 7]);
});

test('a request resumes after a reconnect from a draining server', async (t) => {
  let connections = 0;
  const { socket } = await startFake(t, (message, send, connection) => {
    connections += 1;
    send({ ...head, type: 'subscribed', last_seq: 1, state: 'RUNNING' });
    if (connections === 1) {
      send({ ...head, type: 'progress', seq: 1, percentage: 1 });
      send({ type: 'draining', reconnect_after_ms: 1 });
      connection.close(1001);
    } else {
      assert.equal(message.after_seq, 1);
      send({ ...head, type: 'progress', seq: 1, percentage: 1 });
      send({ ...head, type: 'complete', seq: 2, result: 'done', output: summary('', 0) });
    }
  });
  let events = 0;
  const onEvent = () => void (events += 1);
  assert.equal(await socket.watch('r', { onEvent }), 'done');
  assert.equal(events, 2);
});

test('a token that expires soon is renewed on the same connection', async (t) => {
  const renewed = new Deferred('the fresh token');
  let tokens = 0;
  const token = () => `t${(tokens += 1)}`;
  const onMessage = (/** @type {any} */ message, /** @type {any} */ send) => {
    if (message.type === 'list') {
      send({ type: 'requests', requests: [] });
      send({ type: 'auth_expiring', expires_at: head.timestamp });
    } else {
      renewed.resolve(message);
      send({ type: 'authenticated', expires_at: head.timestamp });
    }
  };
  const { socket } = await startFake(t, onMessage, { token });
  await socket.list();
  assert.deepEqual(await renewed.wait(), { type: 'auth', token: 't2' });
});

test('a message above the rate limit is sent again', async (t) => {
  let times = 0;
  const { socket } = await startFake(t, (message, send) => {
    times += 1;
    const details = { limit: 'gateway.rate_limit', retry_after_ms: 1 };
    const error = { code: 'RATE_LIMITED', message: '', retryable: true, details };
    if (times < 3) send({ type: 'error', request_id: message.id, error });
    else send({ type: 'response', request_id: message.id, uid: 'U', success: true, data: 5 });
  });
  assert.equal(await socket.request('add'), 5);
  assert.equal(times, 3);
});

test('the client reconnects unless the close code is fatal', async (t) => {
  let connections = 0;
  const { socket } = await startFake(t, (_message, _say, connection) => {
    connections += 1;
    if (connections === 1) connection.close(4408, 'too slow');
    else connection.close(4403, 'forbidden');
  });
  await assert.rejects(socket.list(), { name: 'ConnectionClosed', code: 'FORBIDDEN' });
  assert.equal(connections, 2);
});

test('messages that services push are delivered', async (t) => {
  const pushed = new Deferred('a message');
  const onMessage = (/** @type {any} */ _, /** @type {any} */ send) =>
    send('{"type":"message","topic":"news","data":{"n":9223372036854775807}}');
  const { socket } = await startFake(t, onMessage, { onMessage: pushed.resolve });
  socket.list().catch(() => {});
  const { topic, payload } = await pushed.wait();
  assert.deepEqual([topic, payload.text], ['news', '{"n":9223372036854775807}']);
});
