/** The WebSocket client against a server that does what a real one does rarely, or never. */

import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { test } from 'node:test';
import WebSocket, { WebSocketServer } from 'ws';

import { StreamerSocket } from '../src/websocket.js';
import { Once } from './support/wait.js';

const names = { request_id: 'r', uid: 'U', timestamp: '2030-01-01T00:00:00.000Z', attempt: 1 };

/**
 * A server that greets, and hands what it hears to the test.
 * @param {import('node:test').TestContext} t
 * @param {(message: any, say: (message: object | string) => void, socket: WebSocket) => void} hear
 * @param {object} [options] Of the client.
 */
async function fake(t, hear, options = {}) {
  const server = new WebSocketServer({ host: '127.0.0.1', port: 0 });
  /** @type {string[][]} */
  const protocols = [];
  server.on('connection', (socket, request) => {
    protocols.push(String(request.headers['sec-websocket-protocol']).split(/, ?/));
    const say = (/** @type {object | string} */ message) =>
      socket.send(typeof message === 'string' ? message : JSON.stringify(message));
    socket.on('message', (data) => hear(JSON.parse(String(data)), say, socket));
    say({ type: 'connected', connection_id: 'c', heartbeat_ms: 60_000, max_message_bytes: 1000 });
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
function proof(text, chunks = 1) {
  return { chunks, sha256: createHash('sha256').update(text).digest('hex') };
}

test('the token goes as a subprotocol, beside the one that is spoken', async (t) => {
  const { socket, protocols } = await fake(t, (_, say) => say({ type: 'requests', requests: [] }));
  assert.deepEqual(await socket.list(), { requests: [], nextPageToken: '' });
  assert.deepEqual(protocols, [['streamer.v1.json', 'bearer.t']]);
});

test('an output that is not what was produced is detected', async (t) => {
  const { socket } = await fake(t, (message, say) => {
    say({ ...names, type: 'subscribed', last_seq: 2, state: 'SUCCEEDED' });
    const [data, hashed] = message.request_id === 'r' ? ['{"a": 1}', '{"a":1}'] : ['1', '1'];
    say(`{"type":"output","request_id":"r","uid":"U","seq":1,"attempt":1,"data":${data}}`);
    say({ ...names, type: 'complete', seq: 2, result: 1, output: proof(hashed) });
  });
  await assert.rejects(socket.watch('r'), { name: 'IntegrityError', message: /SHA-256/ });
});

test('an event that is missing is asked for once', async (t) => {
  /** @type {number[]} */
  const asked = [];
  const { socket } = await fake(t, (message, say) => {
    asked.push(message.after_seq);
    say({ ...names, type: 'subscribed', last_seq: 3, state: 'SUCCEEDED' });
    if (asked.length === 1) say({ ...names, type: 'progress', seq: 1 });
    if (asked.length === 2)
      say({ ...names, type: 'output', seq: 2, data: 'b', content_type: 'text/x' });
    say({ ...names, type: 'complete', seq: 3, result: 'c', output: proof('b') });
  });
  assert.equal(await socket.watch('r'), 'c');
  assert.deepEqual(asked, [0, 1]);
  asked.length = 2;
  await assert.rejects(socket.watch('U'), { name: 'IntegrityError', message: /twice/ });
});

test('two who follow one request share its place: that of whoever is behind', async (t) => {
  /** @type {number[]} */
  const asked = [];
  const { socket } = await fake(t, (message, say) => {
    asked.push(message.after_seq);
    say({ ...names, type: 'subscribed', last_seq: 6, state: 'RUNNING' });
    if (asked.length < 2) return;
    const seqs = [1, 2, 3, 4, 5, 6];
    for (const seq of seqs.slice(message.after_seq)) say({ ...names, type: 'progress', seq });
    say({ ...names, type: 'complete', seq: 7, result: 1, output: proof('', 0) });
  });
  /** @type {number[]} */
  const seen = [];
  const onEvent = (/** @type {any} */ { seq }) => void seen.push(seq);
  const both = [socket.watch('r', { onEvent }), socket.watch('r', { afterSeq: 5, onEvent })];
  assert.deepEqual(await Promise.all(both), [1, 1]);
  assert.deepEqual(asked, [0, 0]);
  assert.deepEqual(seen, [1, 2, 3, 4, 5, 6, 6, 7, 7]);
});

test('a draining server is left, and the request resumed where it was', async (t) => {
  let connections = 0;
  const { socket } = await fake(t, (message, say, connection) => {
    connections += 1;
    say({ ...names, type: 'subscribed', last_seq: 1, state: 'RUNNING' });
    if (connections === 1) {
      say({ ...names, type: 'progress', seq: 1, percentage: 1 });
      say({ type: 'draining', reconnect_after_ms: 1 });
      connection.close(1001);
    } else {
      assert.equal(message.after_seq, 1);
      say({ ...names, type: 'progress', seq: 1, percentage: 1 });
      say({ ...names, type: 'complete', seq: 2, result: 'done', output: proof('', 0) });
    }
  });
  let events = 0;
  const onEvent = () => void (events += 1);
  assert.equal(await socket.watch('r', { onEvent }), 'done');
  assert.equal(events, 2);
});

test('a token that expires soon is renewed on the same connection', async (t) => {
  const renewed = new Once('the fresh token');
  let tokens = 0;
  const token = () => `t${(tokens += 1)}`;
  const hear = (/** @type {any} */ message, /** @type {any} */ say) => {
    if (message.type === 'list') {
      say({ type: 'requests', requests: [] });
      say({ type: 'auth_expiring', expires_at: names.timestamp });
    } else {
      renewed.resolve(message);
      say({ type: 'authenticated', expires_at: names.timestamp });
    }
  };
  const { socket } = await fake(t, hear, { token });
  await socket.list();
  assert.deepEqual(await renewed.wait(), { type: 'auth', token: 't2' });
});

test('a message that was not looked at is sent again', async (t) => {
  let times = 0;
  const { socket } = await fake(t, (message, say) => {
    times += 1;
    const details = { limit: 'gateway.messages_per_second', retry_after_ms: 1 };
    const error = { code: 'RATE_LIMITED', message: '', retryable: true, details };
    if (times < 3) say({ type: 'error', request_id: message.id, error });
    else say({ type: 'response', request_id: message.id, uid: 'U', success: true, data: 5 });
  });
  assert.equal(await socket.request('add'), 5);
  assert.equal(times, 3);
});

test('close codes that say so are final, and others are not', async (t) => {
  let connections = 0;
  const { socket } = await fake(t, (_message, _say, connection) => {
    connections += 1;
    if (connections === 1) connection.close(4408, 'too slow');
    else connection.close(4403, 'forbidden');
  });
  await assert.rejects(socket.list(), { name: 'ConnectionClosed', code: 'FORBIDDEN' });
  assert.equal(connections, 2);
});

test('what services push is handed on', async (t) => {
  const pushed = new Once('a message');
  const hear = (/** @type {any} */ _, /** @type {any} */ say) =>
    say('{"type":"message","topic":"news","data":{"n":9223372036854775807}}');
  const { socket } = await fake(t, hear, { onMessage: pushed.resolve });
  socket.list().catch(() => {});
  const { topic, payload } = await pushed.wait();
  assert.deepEqual([topic, payload.text], ['news', '{"n":9223372036854775807}']);
});
