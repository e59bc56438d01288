//! Abusive clients and workers use bounded resources and do not affect other tenants.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::collections::HashMap;

use bytes::Bytes;
use h2::{SendStream, client::ResponseFuture};
use http::{Request, StatusCode};
use serde_json::{Map, Value, json};
use streamer_client::Api;
use streamer_core::{Clock, SystemClock};
use streamer_proto::{
    common::v1::Action,
    processor::v1::{report::Kind, work_request, work_response::Message},
    progress::v1::WatchRequest,
    router::v1::{SubmitRequest, submit_response::Outcome},
};
use streamer_rpc::json_payload;
use streamer_store::DeclaredAction;
use streamer_tests::{
    Client, Log, ScriptedWorker, Server, declare, hello, metrics, sum, wait_for_workers,
    within_timeout,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, Status};

/// Returns a schema with a chain of references for one value, which recurses into the items of the value.
fn chain(length: usize) -> Value {
    let mut definitions = Map::new();
    for step in 0..length {
        let next = json!({ "allOf": [{ "$ref": format!("#/$defs/d{}", step + 1) }] });
        definitions.insert(format!("d{step}"), next);
    }
    definitions.insert(format!("d{length}"), json!({ "items": { "$ref": "#" } }));
    json!({ "$ref": "#/$defs/d0", "$defs": definitions })
}

/// Returns a schema with definitions, each of which applies the next definition twice to the same value.
fn doubling(length: usize) -> Value {
    let mut definitions = Map::new();
    for step in 0..length {
        let next = json!({ "$ref": format!("#/$defs/d{}", step + 1) });
        definitions.insert(format!("d{step}"), json!({ "allOf": [next, next] }));
    }
    definitions.insert(format!("d{length}"), json!({ "type": "object" }));
    json!({ "$ref": "#/$defs/d0", "$defs": definitions })
}

/// Returns a small schema with six recursive branches.
fn branching() -> Value {
    let items = json!({ "items": { "$ref": "#" } });
    json!({ "anyOf": [items, items, items, items, items, items] })
}

fn nested(depth: usize) -> String {
    format!("{}{}", "[".repeat(depth), "]".repeat(depth))
}

fn with_schema(name: &str, schema: &Value) -> Action {
    Action { payload_schema: schema.to_string(), ..declare(name) }
}

async fn submit(
    server: &Server,
    tenant: &str,
    action: &str,
    payload: String,
) -> Result<(), Status> {
    let api = Api::new(&server.url, &server.token(tenant, "ann", &[])).unwrap();
    let request = SubmitRequest {
        action: action.into(),
        payload: Some(json_payload(payload)),
        ..SubmitRequest::default()
    };
    let response = api.router().submit(api.call(request)).await?.into_inner();
    assert!(matches!(response.outcome, Some(Outcome::Acknowledgment(_))));
    Ok(())
}

#[tokio::test]
async fn schemas_with_unbounded_cost_are_rejected_at_declaration() {
    let server = Server::start(&[]);
    let token = server.token("evil", "worker", &["worker:*"]);
    for (schema, rule) in [
        (chain(20), "the recursion through"),
        (doubling(24), "applies too many subschemas to the same value"),
        (branching(), "steps for one value nested"),
        (json!({ "anyOf": [{ "$ref": "#" }] }), "without end"),
        (json!({ "$ref": "http://127.0.0.1:1/schema.json" }), "which is not '#' or '#/…'"),
        (json!({ "$ref": "file:///etc/passwd" }), "which is not '#' or '#/…'"),
        (json!({ "pattern": "(a{1000}){1000}" }), "KiB when compiled"),
        (json!({ "pattern": "^(?!a)" }), "has look-around, which is not supported"),
    ] {
        let first = hello("w", 1, vec![declare("good"), with_schema("bomb", &schema)]);
        let first = work_request::Message::Hello(first);
        let rejected = ScriptedWorker::try_connect(&server, &token, first).await.err().unwrap();
        assert_eq!(rejected.code(), Code::InvalidArgument, "{rejected}");
        let message = rejected.message();
        assert!(message.starts_with("hello.actions[1].payload_schema: "), "{message}");
        assert!(message.contains(rule), "{message}");
    }
    // No part of the declarations was stored.
    let unknown = submit(&server, "evil", "good", "{}".into()).await.err().unwrap();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
}

#[tokio::test]
async fn deep_payloads_are_validated_and_expensive_ones_are_rejected() {
    let server = Server::start(&[]);
    let token = server.token("acme", "worker", &["worker:*"]);
    let items = json!({ "items": { "$ref": "#" } });
    let actions = vec![
        with_schema("deep", &chain(6)),
        with_schema("wide", &json!({ "anyOf": [items, items, { "type": "null" }] })),
    ];
    let mut worker = ScriptedWorker::connect(&server, &token, hello("w", 4, actions)).await;
    wait_for_workers(&server, &token, "wide", 1).await;
    let rejected = submit(&server, "acme", "wide", nested(100)).await.err().unwrap();
    assert_eq!(rejected.code(), Code::InvalidArgument);
    let rule = "payload: is too large or nested too deep for the schema of this action";
    assert!(rejected.message().starts_with(rule), "{rejected}");
    submit(&server, "acme", "wide", nested(8)).await.unwrap();
    submit(&server, "acme", "deep", nested(120)).await.unwrap();
    for task in [worker.next_task().await, worker.next_task().await] {
        worker.report(&task, 0, Kind::Result(json_payload("1"))).await;
        worker.wait_for_end(&task).await;
    }
}

#[tokio::test]
async fn payloads_are_rejected_while_the_stored_schema_is_invalid() {
    let data = tempfile::tempdir().unwrap();
    // Earlier versions accepted this schema.
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let action = with_schema("work", &chain(20));
    let declared = vec![DeclaredAction { tenant: Some("acme".into()), action }];
    store.save_actions(declared, SystemClock.now()).await.unwrap();
    drop(store);
    let server = Server::start_in(data, &[]);
    let rejected = submit(&server, "acme", "work", nested(120)).await.err().unwrap();
    assert_eq!(rejected.code(), Code::FailedPrecondition, "{rejected}");
    let rule = "the payload schema of action \"work\" is invalid, declare a new one: ";
    assert!(rejected.message().starts_with(rule), "{rejected}");
    // A new declaration replaces the stored declaration.
    let token = server.token("acme", "worker", &["worker:*"]);
    let action = with_schema("work", &json!({ "type": "array" }));
    let _worker = ScriptedWorker::connect(&server, &token, hello("w", 1, vec![action])).await;
    wait_for_workers(&server, &token, "work", 1).await;
    submit(&server, "acme", "work", nested(120)).await.unwrap();
    let user = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &user).await;
    client.submit("r", "echo_async", json!({ "result": 1 })).await;
    assert_eq!(client.follow(Log::after(1)).await.events.last().unwrap()["result"], json!(1));
}

const HEALTH: &str = "/grpc.health.v1.Health/Check";
const SUBMIT: &str = "/streamer.router.v1.RouterService/Submit";

/// An HTTP/2 connection on which a test sends raw frames.
struct RawGrpc {
    client: h2::client::SendRequest<Bytes>,
    address: String,
}

impl RawGrpc {
    async fn connect(server: &Server) -> Self {
        let address = server.url.trim_start_matches("http://").to_owned();
        let socket = TcpStream::connect(&address).await.unwrap();
        let (client, connection) = h2::client::handshake(socket).await.unwrap();
        tokio::spawn(connection);
        Self { client, address }
    }

    /// Starts a call without sending its message.
    async fn call(&mut self, path: &str, token: &str) -> (ResponseFuture, SendStream<Bytes>) {
        let mut request = Request::post(format!("http://{}{path}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        self.client.clone().ready().await.unwrap();
        self.client.send_request(request.body(()).unwrap(), false).unwrap()
    }
}

/// Returns a message header with the given length, and the first `sent` bytes of the message.
fn incomplete(length: u32, sent: usize) -> Bytes {
    let mut message = vec![0];
    message.extend(length.to_be_bytes());
    message.resize(5 + sent, b'x');
    message.into()
}

/// Sends data until the peer stops accepting data.
async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes) {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let Some(Ok(capacity)) =
            std::future::poll_fn(|context| stream.poll_capacity(context)).await
        else {
            return;
        };
        if stream.send_data(data.split_to(capacity.min(data.len())), false).is_err() {
            return;
        }
    }
}

/// Returns the code and the message of the gRPC status of a response.
async fn status_of(response: ResponseFuture) -> (Code, String) {
    let response = within_timeout("a response", response).await.unwrap();
    let status = Status::from_header_map(response.headers()).expect("the status is in the headers");
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn unauthenticated_calls_use_bounded_memory() {
    let server = Server::start(&[]);
    for path in [HEALTH, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"] {
        let mut raw = RawGrpc::connect(&server).await;
        let mut open = Vec::new();
        for _ in 0..300 {
            let (response, mut stream) = raw.call(path, "").await;
            send(&mut stream, incomplete(4 << 20, 100_000)).await;
            open.push((response, stream));
        }
        for (response, _stream) in open.drain(..).filter(|_| path == HEALTH) {
            let (code, message) = status_of(response).await;
            assert!(matches!(code, Code::OutOfRange | Code::ResourceExhausted), "{message}");
        }
    }
    // A debug build uses 50 MB when idle; without the limit, the server used 1.4 GB in this test.
    let peak = server.peak_resident_bytes();
    assert!(peak < 300 << 20, "{peak}");
}

#[tokio::test]
async fn incomplete_grpc_messages_time_out() {
    let server = Server::start(&["server.body_timeout=300ms"]);
    let token = server.token("acme", "ann", &[]);
    let mut raw = RawGrpc::connect(&server).await;
    for data in [Bytes::new(), incomplete(1000, 0), incomplete(1000, 999)] {
        for (path, token) in [(HEALTH, ""), (SUBMIT, &*token)] {
            let (response, mut stream) = raw.call(path, token).await;
            send(&mut stream, data.clone()).await;
            let (code, message) = status_of(response).await;
            assert_eq!(code, Code::DeadlineExceeded, "{message}");
            assert!(message.contains("server.body_timeout"), "{message}");
        }
    }
}

#[tokio::test]
async fn incomplete_messages_of_one_token_are_bounded_and_do_not_affect_others() {
    let server = Server::start(&["server.max_undecoded_bytes=1048576"]);
    let token = server.token("acme", "ann", &[]);
    let mut raw = RawGrpc::connect(&server).await;
    let (mut open, mut rejected) = (Vec::new(), None);
    for _ in 0..16 {
        let (response, mut stream) = raw.call(SUBMIT, &token).await;
        send(&mut stream, incomplete(4 << 20, 3 << 20)).await;
        open.push(stream);
        let mut response = Box::pin(status_of(response));
        // Waits until the metric includes the last bytes, or the call is rejected.
        let counted = || metric(&server, "streamer_server_undecoded_bytes");
        let read = within_timeout("all bytes", async {
            while counted().await < open.len() * (3 << 20) {}
        });
        tokio::select! {
            status = &mut response => {
                rejected = Some(status);
                break;
            }
            () = read => {}
        }
        tokio::spawn(response);
    }
    let (code, message) = rejected.expect("the limit applies");
    assert_eq!(code, Code::ResourceExhausted, "{message}");
    assert!(message.contains("server.max_undecoded_bytes"), "{message}");
    // The payload is sent in several frames, so that it is incomplete for some time.
    let large = json!({ "result": "x".repeat(1 << 20) }).to_string();
    assert!(submit(&server, "other", "echo_async", large).await.is_ok());
}

/// Returns the status and the headers of the response to a plain HTTP request.
async fn http(server: &Server, request: &str) -> (StatusCode, String) {
    let mut socket = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    // The server may respond and close the connection before it has read the whole request.
    socket.write_all(request.as_bytes()).await.ok();
    let mut reply = Vec::new();
    within_timeout("a response", socket.read_to_end(&mut reply)).await.ok();
    let reply = String::from_utf8_lossy(&reply).into_owned();
    let status = reply.split(' ').nth(1).unwrap_or_else(|| panic!("{reply:?}"));
    (status.parse().unwrap(), reply.to_ascii_lowercase())
}

#[tokio::test]
async fn plain_http_requests_get_exact_status_codes() {
    let server = Server::start(&[]);
    let tail = "Host: a\r\nConnection: close\r\n\r\n";
    for path in ["/", "/metrics/", "/ws/", "/streamer.router.v1.RouterService/Submit2"] {
        let (status, reply) = http(&server, &format!("GET {path} HTTP/1.1\r\n{tail}")).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{path}: {reply}");
        assert!(!reply.contains("grpc-status"), "{reply}");
    }
    for (request, status, header) in [
        ("POST /ws", StatusCode::METHOD_NOT_ALLOWED, "allow: get"),
        ("POST /healthz", StatusCode::METHOD_NOT_ALLOWED, "allow: get"),
        ("GET /ws", StatusCode::UPGRADE_REQUIRED, "connection: upgrade"),
    ] {
        let (found, reply) = http(&server, &format!("{request} HTTP/1.1\r\n{tail}")).await;
        assert_eq!(found, status, "{request}");
        assert!(reply.contains(header), "{reply}");
    }
    let large = format!("GET /healthz HTTP/1.1\r\nX: {}\r\n{tail}", "x".repeat(70_000));
    let (status, _) = http(&server, &large).await;
    assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
}

#[tokio::test]
async fn unauthenticated_connections_do_not_keep_clients_out() {
    let server = Server::start(&[
        "server.max_connections=64",
        "server.max_connections_per_address=64",
        // Prevents handshakes from timing out.
        "gateway.handshake_timeout=60000ms",
    ]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    // Each connection has sent a request and stays open.
    let mut unauthenticated = Vec::new();
    for _ in 0..40 {
        unauthenticated.push(partial_message(&server, "no-token", 10, 1).await);
        let mut socket =
            TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
        socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut reply = [0; 12];
        socket.read_exact(&mut reply).await.unwrap();
        assert_eq!(&reply, b"HTTP/1.1 200");
        unauthenticated.push(socket);
    }
    let mut second = Client::connect(&server.url, &token).await;
    for client in [&mut client, &mut second] {
        assert_eq!(client.request(json!({ "type": "ping" })).await["type"], "pong");
    }
    let evicted = metric(&server, "streamer_server_evicted_connections_total").await;
    assert!(evicted >= 50, "{evicted}");
}

/// Returns the value of a metric of the server.
async fn metric(server: &Server, name: &str) -> usize {
    let text = within_timeout("the metrics", metrics(&server.url)).await;
    sum(&text, name)
}

/// Opens a WebSocket and sends the first `sent` bytes of a message.
async fn partial_message(server: &Server, token: &str, length: u32, sent: usize) -> TcpStream {
    let mut socket = raw_socket(server, token).await;
    let mut frame = match u16::try_from(length) {
        Ok(length) => [&[0x81, 0xfe][..], &length.to_be_bytes()].concat(),
        Err(_) => [&[0x81, 0xff, 0, 0, 0, 0][..], &length.to_be_bytes()].concat(),
    };
    frame.resize(frame.len() + 4 + sent, b' ');
    socket.write_all(&frame).await.ok();
    socket
}

/// Opens a WebSocket, but does not read from it.
async fn raw_socket(server: &Server, token: &str) -> TcpStream {
    let address = server.url.trim_start_matches("http://");
    let mut socket = TcpStream::connect(address).await.unwrap();
    let handshake = format!(
        "GET /ws HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Authorization: Bearer {token}\r\n\r\n"
    );
    socket.write_all(handshake.as_bytes()).await.unwrap();
    socket
}

/// Returns the code and the reason of the close frame from the server.
async fn close_of(mut socket: TcpStream) -> (u16, String) {
    let mut all = Vec::new();
    within_timeout("the close frame", socket.read_to_end(&mut all)).await.ok();
    let at = all.windows(2).rposition(|pair| pair[0] == 0x88).expect("a close frame");
    let payload = &all[at + 2..];
    let code = u16::from_be_bytes([payload[0], payload[1]]);
    (code, String::from_utf8_lossy(&payload[2..]).into_owned())
}

#[tokio::test]
async fn incomplete_websocket_messages_time_out() {
    let server = Server::start(&["gateway.message_timeout=1000ms"]);
    let token = server.token("acme", "ann", &[]);
    let socket = partial_message(&server, &token, 1000, 10).await;
    let (code, reason) = close_of(socket).await;
    assert_eq!((code, reason.contains("gateway.message_timeout")), (1008, true), "{reason}");
}

#[tokio::test]
async fn pings_do_not_extend_the_message_timeout() {
    let server = Server::start(&["gateway.message_timeout=1000ms"]);
    let token = server.token("acme", "ann", &[]);
    let mut socket = partial_message(&server, &token, 1000, 0).await;
    // Completes the message, and starts the next message with a fragment.
    let mut rest = vec![b' '; 1000];
    rest.extend([0x01, 0x81, 0, 0, 0, 0, b'x']);
    socket.write_all(&rest).await.unwrap();
    let (mut read, mut write) = socket.into_split();
    let pings = tokio::spawn(async move {
        while write.write_all(&[0x89, 0x80, 0, 0, 0, 0]).await.is_ok() {
            metrics(&server.url).await;
        }
        server
    });
    let mut all = Vec::new();
    within_timeout("the close frame", read.read_to_end(&mut all)).await.ok();
    let text = String::from_utf8_lossy(&all);
    assert!(text.contains("gateway.message_timeout"), "{text}");
    drop(pings.await.unwrap());
}

#[tokio::test]
async fn incomplete_messages_of_one_user_are_bounded_and_do_not_affect_others() {
    let server = Server::start(&[]);
    let token = server.token("acme", "ann", &[]);
    let mut open = Vec::new();
    let buffered = async || metric(&server, "streamer_gateway_buffered_bytes").await;
    for number in 1..5 {
        open.push(partial_message(&server, &token, 4 << 20, (4 << 20) - 1).await);
        within_timeout("all bytes", async { while buffered().await < number * (4 << 20) {} }).await;
    }
    let last = partial_message(&server, &token, 4 << 20, (4 << 20) - 1).await;
    let (code, reason) = close_of(last).await;
    let option = "gateway.max_buffered_bytes_per_user";
    assert_eq!((code, reason.contains(option)), (4429, true), "{reason}");
    let mut other = Client::connect(&server.url, &server.token("acme", "bob", &[])).await;
    let reply = other.request(json!({ "action": "echo", "payload": "x".repeat(3 << 20) })).await;
    assert_eq!(reply["type"], "response");
    // Closed connections are no longer counted.
    drop(open);
    within_timeout("their close", async { while buffered().await > 0 {} }).await;
}

#[tokio::test]
async fn submissions_of_one_user_are_rate_limited_across_protocols() {
    let server = Server::start(&["limits.submissions_per_second_per_user=1"]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let option = "limits.submissions_per_second_per_user";
    let mut admitted = 0;
    let rejected = loop {
        let reply = client.request(json!({ "action": "echo", "payload": 1 })).await;
        if reply["type"] != "response" {
            break reply;
        }
        admitted += 1;
    };
    assert!(admitted >= 2, "{admitted}");
    assert_eq!(rejected["error"]["code"], "RATE_LIMITED");
    assert!(rejected["error"]["message"].as_str().unwrap().contains(option), "{rejected}");
    assert!(rejected["error"]["details"]["retry_after_ms"].as_i64().unwrap() > 0, "{rejected}");
    // Submissions over gRPC also count; submissions of other tenants do not.
    let rejected = loop {
        if let Err(rejected) = submit(&server, "acme", "echo_async", "{}".into()).await {
            break rejected;
        }
    };
    assert_eq!(rejected.code(), Code::ResourceExhausted, "{rejected}");
    assert!(rejected.message().contains(option), "{rejected}");
    submit(&server, "globex", "echo_async", "{}".into()).await.unwrap();
}

/// Counts the occurrences of a text in received data.
struct Occurrences {
    text: &'static str,
    count: usize,
}

impl Occurrences {
    /// Counts occurrences in the last `new` bytes of `data`; the bytes before them were counted earlier.
    fn count(&mut self, data: &[u8], new: usize) {
        let counted = data.len() - new;
        let begin = counted.saturating_sub(self.text.len() - 1);
        let windows = data[begin..].windows(self.text.len());
        self.count += windows.filter(|window| *window == self.text.as_bytes()).count();
    }
}

#[tokio::test]
async fn a_burst_of_messages_is_served_or_rejected_and_does_not_delay_others() {
    const MESSAGES: usize = 60_000;
    let server = Server::start(&[]);
    let socket = raw_socket(&server, &server.token("evil", "eve", &[])).await;
    let (mut receiving, mut sending) = socket.into_split();
    let message = r#"{"action":"echo","payload":1}"#;
    let length = u8::try_from(message.len()).unwrap();
    let frame = [&[0x81, 0x80 | length, 0, 0, 0, 0], message.as_bytes()].concat();
    let flood = tokio::spawn(async move {
        let burst = frame.repeat(1000);
        for _ in 0..MESSAGES / 1000 {
            sending.write_all(&burst).await.unwrap();
        }
        sending
    });
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let mut served = Occurrences { text: r#"{"type":"response""#, count: 0 };
    let mut rejected = Occurrences { text: r#""code":"RATE_LIMITED""#, count: 0 };
    let (mut tail, mut buffer) = (Vec::new(), vec![0; 256 * 1024]);
    let mut reads = 0;
    while served.count + rejected.count < MESSAGES {
        let new = within_timeout("responses", receiving.read(&mut buffer)).await.unwrap();
        assert!(new > 0, "the connection was closed");
        tail.extend_from_slice(&buffer[..new]);
        for occurrences in [&mut served, &mut rejected] {
            occurrences.count(&tail, new);
        }
        tail.drain(..tail.len().saturating_sub(64));
        reads += 1;
        if reads % 64 != 1 {
            continue;
        }
        // The server serves other clients at the same time.
        assert_eq!(client.request(json!({"type": "ping"})).await["type"], "pong");
    }
    drop(flood.await.unwrap());
    // The server processes at least `gateway.rate_limit_burst` messages.
    assert!(served.count >= 20_000, "{}", served.count);
    let peak = server.peak_resident_bytes();
    assert!(peak < 250 << 20, "{peak}");
}

#[tokio::test]
async fn repeated_subscriptions_do_not_leak() {
    const ROUNDS: usize = 1_000;
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.request(json!({"id": "r", "action": "echo_async", "delay_ms": 3_600_000})).await;
    let churn = async |client: &mut Client| {
        for _ in 0..ROUNDS {
            client.send(json!({"type": "subscribe", "request_id": "r"})).await;
            client.send(json!({"type": "unsubscribe", "request_id": "r"})).await;
            // The replies can arrive in either order.
            let mut types = Vec::new();
            while !types.contains(&json!("unsubscribed")) {
                types.push(client.next().await["type"].clone());
            }
        }
    };
    churn(&mut client).await;
    let before = server.peak_resident_bytes();
    churn(&mut client).await;
    let grown = server.peak_resident_bytes().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown}");
    assert_eq!(client.request(json!({"type": "ping"})).await["type"], "pong");
    client.send(json!({"type": "unsubscribe", "request_id": "r"})).await;
    let watchers = || metric(&server, "streamer_progress_watchers");
    within_timeout("the end of all watches", async { while watchers().await > 0 {} }).await;
}

/// Limits for tests of output; the server keeps several copies of each byte in memory.
const SMALL_OUTPUT_BUDGET: [&str; 2] =
    ["execution.max_buffered_output_bytes=33554432", "limits.max_payload_bytes=1048576"];

#[tokio::test]
async fn output_of_one_tenant_is_bounded_and_does_not_delay_others() {
    const FLOOD: usize = 50;
    let server =
        Server::start(&[&SMALL_OUTPUT_BUDGET[..], &["execution.lease_duration=3000ms"]].concat());
    let flood = json!({ "steps": 1, "output_chunks": 10, "chunk_bytes": 1_000_000 });
    for _ in 0..FLOOD {
        submit(&server, "evil", "echo_async", flood.to_string()).await.unwrap();
    }
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let mut rounds = 0;
    while metric(&server, r#"streamer_processor_attempts_total{outcome="succeeded"}"#).await
        < FLOOD + rounds
    {
        let id = format!("small-{rounds}");
        client.submit(&id, "echo_async", json!({ "steps": 2, "result": 1 })).await;
        assert_eq!(client.follow(Log::after(1)).await.last_type(), "complete");
        let (status, _) =
            http(&server, "GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
        assert_eq!(status, StatusCode::OK);
        rounds += 1;
    }
    assert!(rounds > 1, "other requests complete during the flood");
    for counter in [
        "lease_expiries_total",
        r#"attempts_total{outcome="fenced"}"#,
        r#"attempts_total{outcome="retrying"}"#,
        "buffered_output_bytes",
    ] {
        assert_eq!(metric(&server, &format!("streamer_processor_{counter}")).await, 0, "{counter}");
    }
    // A debug build uses 50 MB when idle.
    let peak = server.peak_resident_bytes();
    assert!(peak < 300 << 20, "{peak}");
}

#[tokio::test]
async fn reports_beyond_the_budget_are_resent_and_do_not_delay_other_tenants() {
    const TASKS: usize = 60;
    // Maximum number of unacknowledged reports.
    const CHUNKS: i64 = 17;
    let server = Server::start(&[
        // The scripted worker sends no heartbeats.
        "execution.lease_duration=60000ms",
        "execution.max_buffered_output_bytes=1048576",
        "limits.max_payload_bytes=65536",
        "limits.max_output_chunk_bytes=65536",
    ]);
    let token = server.token("shared", "worker", &["worker:*@*"]);
    let action = declare("flood");
    let mut worker = ScriptedWorker::connect(&server, &token, hello("w", 100, vec![action])).await;
    wait_for_workers(&server, &server.token("evil", "eve", &[]), "flood", 1).await;
    for _ in 0..TASKS {
        submit(&server, "evil", "flood", "{}".into()).await.unwrap();
    }
    submit(&server, "acme", "flood", "{}".into()).await.unwrap();
    let mut tasks = HashMap::new();
    while tasks.len() <= TASKS {
        let task = worker.next_task().await;
        tasks.insert(task.uid.clone(), task);
    }
    let chunk = json_payload(json!("x".repeat(65_000)).to_string());
    let last = || Kind::Result(json_payload("1"));
    let (small, large): (Vec<_>, Vec<_>) =
        tasks.values().partition(|task| task.tenant_id == "acme");
    // The reports exceed the budget many times before the first acknowledgment.
    for number in 1..=CHUNKS {
        for task in &large {
            worker.report(task, number, Kind::Output(chunk.clone())).await;
        }
    }
    for task in &large {
        worker.report(task, CHUNKS, last()).await;
    }
    worker.report(small[0], 0, last()).await;
    let (mut ended, mut ended_before, mut resends) = (0, TASKS, 0);
    while ended <= TASKS {
        match worker.next().await.unwrap() {
            Message::Acknowledgment(acknowledgment) => {
                // With this budget, the window of each attempt is smaller than the default.
                let window = 1..worker.welcome.max_unacknowledged_bytes;
                let is_small = acknowledgment.uid == small[0].uid;
                let bytes = acknowledgment.max_unacknowledged_bytes;
                assert!(is_small || window.contains(&bytes), "{acknowledgment:?}");
                if acknowledgment.ended && is_small {
                    ended_before = ended;
                }
                ended += usize::from(acknowledgment.ended);
            }
            Message::Resend(resend) => {
                let task = &tasks[&resend.uid];
                for number in resend.number + 1..=CHUNKS {
                    let output = Kind::Output(chunk.clone());
                    worker.report_after_resends(task, resend.resends, number, output).await;
                }
                worker.report_after_resends(task, resend.resends, CHUNKS, last()).await;
                resends += 1;
            }
            Message::Revoke(revoke) => panic!("revoked: {revoke:?}"),
            _ => {}
        }
    }
    assert!(resends > 0 && ended_before < TASKS / 2, "{resends}, {ended_before}");
    assert_eq!(
        metric(&server, r#"streamer_processor_attempts_total{outcome="succeeded"}"#).await,
        TASKS + 1
    );
    assert_eq!(metric(&server, "streamer_processor_buffered_output_bytes").await, 0);
    let peak = server.peak_resident_bytes();
    assert!(peak < 350 << 20, "{peak}");
}

#[tokio::test]
async fn slow_watchers_use_bounded_memory_and_do_not_delay_others() {
    const WATCHERS: usize = 300;
    let server = Server::start(&["limits.max_unread_watch_bytes=16777216"]);
    let api = |user: &str| Api::new(&server.url, &server.token("acme", user, &["*"])).unwrap();
    let eve = api("eve");
    let payload = r#"{"steps":0,"output_chunks":10,"chunk_bytes":1000000}"#;
    let submit = SubmitRequest {
        id: "large".into(),
        action: "echo_async".into(),
        payload: Some(json_payload(payload)),
        wait: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        ..SubmitRequest::default()
    };
    let uid = eve.router().submit(eve.call(submit)).await.unwrap().into_inner().uid;
    let watch =
        || WatchRequest { request_id: uid.clone(), after_seq: Some(0), ..WatchRequest::default() };
    // Each watch has a separate connection, whose window is a fraction of a chunk.
    let mut open = Vec::new();
    for _ in 0..WATCHERS {
        let eve = api("eve");
        open.push(eve.progress().watch(eve.call(watch())).await.unwrap().into_inner());
    }
    let unread = "streamer_progress_unread_watch_bytes";
    within_timeout("unread messages up to the limit", async {
        while metric(&server, unread).await < 7_000_000 {}
    })
    .await;
    let bob = api("bob");
    let mut read = bob.progress().watch(bob.call(watch())).await.unwrap().into_inner();
    let mut bytes = 0;
    while let Some(message) = within_timeout("a message", read.message()).await.unwrap() {
        bytes += prost::Message::encoded_len(&message);
    }
    assert!(bytes > 10_000_000, "{bytes}");
    assert!(metric(&server, unread).await <= 16 << 20);
    let peak = server.peak_resident_bytes();
    assert!(peak < 300 << 20, "{peak}");
    drop(open);
    within_timeout("the end of the watches", async { while metric(&server, unread).await > 0 {} })
        .await;
}

/// HTTP/2 frames that are created while they are sent.
type Frames = Box<dyn Iterator<Item = Vec<u8>> + Send>;

/// Encodes an HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Encodes the headers of a call of `Health/Check`: indexed `:method POST` and `:scheme http`, then literals.
fn headers() -> Vec<u8> {
    let mut headers = vec![0x83, 0x86, 0x04, u8::try_from(HEALTH.len()).unwrap()];
    headers.extend(HEALTH.as_bytes());
    headers.extend(b"\x01\x01a\x0f\x10\x10application/grpc\x00\x02te\x08trailers");
    headers
}

/// Sends HTTP/2 frames while reading, until a frame of the given type whose payload starts with the given bytes
/// arrives or the server closes the connection. Returns whether the frame arrived.
async fn exchange(
    server: &Server,
    frames: impl Iterator<Item = Vec<u8>> + Send,
    (expected, prefix): (u8, &'static [u8]),
) -> bool {
    let socket = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    let (mut read, mut write) = socket.into_split();
    let reading = tokio::spawn(async move {
        loop {
            let mut head = [0; 9];
            read.read_exact(&mut head).await?;
            let [high, middle, low, kind, ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, high, middle, low]) as usize];
            read.read_exact(&mut payload).await?;
            if kind == expected && payload.starts_with(prefix) {
                return std::io::Result::Ok(());
            }
        }
    });
    let mut pending = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    pending.extend(frame(SETTINGS, 0, 0, &[]));
    for frame in frames {
        pending.extend(frame);
        if pending.len() > 32 * 1024 {
            if write.write_all(&pending).await.is_err() {
                break;
            }
            pending.clear();
        }
    }
    write.write_all(&pending).await.ok();
    within_timeout("a frame or the end of the connection", reading).await.unwrap().is_ok()
}

#[tokio::test]
async fn frame_floods_use_bounded_memory_and_do_not_affect_clients() {
    const FRAMES: u32 = 100_000;
    const LAST: &[u8] = b"the last";
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    // A valid call, which receives a response.
    let call = [frame(HEADERS, END_HEADERS, 1, &headers()), frame(DATA, END_STREAM, 1, &[0; 5])];
    assert!(exchange(&server, call.into_iter(), (HEADERS, &[])).await);
    let streams = (1..).step_by(2);
    let reset = streams.clone().take(FRAMES as usize).map(|stream| {
        let mut frames = frame(HEADERS, END_HEADERS | END_STREAM, stream, &headers());
        frames.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
        frames
    });
    let pings = (0..FRAMES).map(|_| frame(PING, 0, 0, &[0; 8]));
    let settings = (0..FRAMES).map(|_| frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 255, 255]));
    // Headers that never end.
    let continued = (0..FRAMES / 100).map(|number| {
        let header = [&b"\x00\x01x\x7f\x81\x7c"[..], &[b'x'; 16_000]].concat();
        let kind = if number == 0 { HEADERS } else { CONTINUATION };
        frame(kind, 0, 1, &header)
    });
    // A header of 4,000 bytes, then 16,000 references to it per call: 64 MB of headers in 16 KB.
    let bomb = streams.take(200).map(|stream| {
        let mut headers = headers();
        if stream == 1 {
            headers.extend(b"\x40\x01x\x7f\xa1\x1e");
            headers.extend([b'x'; 4000]);
        } else {
            headers.resize(16_000, 0xbe);
        }
        frame(HEADERS, END_HEADERS | END_STREAM, stream, &headers)
    });
    let floods: [(&str, Frames); 5] = [
        ("rapid reset", Box::new(reset)),
        ("PING", Box::new(pings)),
        ("SETTINGS", Box::new(settings)),
        ("CONTINUATION", Box::new(continued)),
        ("HPACK", Box::new(bomb)),
    ];
    for (name, frames) in floods {
        let last = frame(PING, 0, 0, LAST);
        exchange(&server, frames.chain([last]), (PING, LAST)).await;
        let reply = client.request(json!({ "action": "echo", "payload": name })).await;
        assert_eq!(reply["type"], "response", "{name}");
        let peak = server.peak_resident_bytes();
        assert!(peak < 200 << 20, "{name}: {peak}");
    }
}

/// Returns texts that are invalid JSON, invalid messages, or expensive to parse.
fn hostile_texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "",
        " ",
        "\u{feff}{}",
        "null",
        "true",
        "0",
        "\"\"",
        "[]",
        "{",
        "}",
        "{]",
        "{\"type\"}",
        "{\"type\":}",
        "{,}",
        "{\"type\":\"ping\",}",
        "{\"type\":\"ping\"}{\"type\":\"ping\"}",
        "{'type':'ping'}",
        "{type:\"ping\"}",
        "/*c*/{\"type\":\"ping\"}",
        "{\"type\":NaN}",
        "{\"type\":Infinity}",
        "{\"type\":-}",
        "{\"type\":01}",
        "{\"type\":1.}",
        "{\"type\":.5}",
        "{\"type\":0x10}",
        "{\"type\":\"\\x\"}",
        "{\"type\":\"\\u12\"}",
        "{\"type\":\"\\ud800\"}",
        "{\"type\":\"\\udc00\\ud800\"}",
        "{\"type\":\"a\nb\"}",
        "{\"type\":\"\u{0}\"}",
        "{\"type\":null}",
        "{\"type\":7}",
        "{\"type\":[]}",
        "{\"type\":{}}",
        "{\"type\":\"\"}",
        "{\"type\":\"PING\"}",
        "{\"type\":\"request\"}",
        "{\"action\":7}",
        "{\"action\":\"\"}",
        "{\"action\":\"../echo\"}",
        "{\"action\":\"echo\",\"id\":7}",
        "{\"action\":\"echo\",\"id\":\"\"}",
        "{\"action\":\"echo\",\"priority\":\"9\"}",
        "{\"action\":\"echo\",\"priority\":1e9}",
        "{\"action\":\"echo\",\"priority\":-1}",
        "{\"action\":\"echo\",\"delay_ms\":-1}",
        "{\"action\":\"echo_async\",\"delay_ms\":1e300}",
        "{\"action\":\"echo_async\",\"wait_ms\":9223372036854775808}",
        "{\"action\":\"echo\",\"metadata\":[]}",
        "{\"action\":\"echo\",\"metadata\":7}",
        "{\"type\":\"subscribe\"}",
        "{\"type\":\"subscribe\",\"request_id\":7}",
        "{\"type\":\"subscribe\",\"request_id\":\"x\",\"after_seq\":-1}",
        "{\"type\":\"subscribe\",\"request_id\":\"x\",\"after_seq\":0.5}",
        "{\"type\":\"subscribe\",\"request_id\":\"x\",\"mode\":\"some\"}",
        "{\"type\":\"cancel\"}",
        "{\"type\":\"cancel\",\"request_id\":[]}",
        "{\"type\":\"get\"}",
        "{\"type\":\"get\",\"request_id\":\"\"}",
        "{\"type\":\"list\",\"limit\":-1}",
        "{\"type\":\"list\",\"limit\":1e18}",
        "{\"type\":\"list\",\"states\":\"RUNNING\"}",
        "{\"type\":\"list\",\"states\":[\"?\"]}",
        "{\"type\":\"list\",\"page_token\":\"%%%\"}",
        "{\"type\":\"list\",\"page_token\":7}",
        "{\"type\":\"auth\"}",
        "{\"type\":\"auth\",\"token\":7}",
        "{\"type\":\"unsubscribe\"}",
    ]
    .map(str::to_owned)
    .into();
    let long = "x".repeat(1_000_000);
    texts.extend([
        nested(500_000),
        "{\"a\":".repeat(200_000),
        format!("{{\"action\":\"echo\",\"metadata\":{}}}", nested(100_000)),
        format!("{{\"type\":\"{long}\"}}"),
        format!("{{\"action\":\"{long}\"}}"),
        format!("{{\"action\":\"echo\",\"id\":\"{long}\"}}"),
        format!("{{\"{long}\":1,\"type\":\"subscribe\"}}"),
        format!("{{\"type\":\"list\",\"page_token\":\"{long}\"}}"),
        format!("{{\"action\":\"echo\",\"priority\":{}}}", "9".repeat(100_000)),
        format!("{{\"type\":\"get\",\"request_id\":\"{long}\"}}"),
    ]);
    texts
}

#[tokio::test]
async fn hostile_messages_are_rejected_individually() {
    let server = Server::start(&[]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    for text in hostile_texts() {
        let excerpt: String = text.chars().take(80).collect();
        client.send_text(text).await;
        let reply = client.next().await;
        assert_eq!(reply["type"], "error", "{excerpt}: {reply}");
        let code = reply["error"]["code"].as_str().unwrap().to_owned();
        assert!(
            ["VALIDATION_ERROR", "INVALID_ACTION", "NOT_FOUND", "UNAUTHORIZED"].contains(&&*code),
            "{excerpt}: {reply}"
        );
        assert!(reply.to_string().len() < 4096, "{excerpt}: the reply is short");
    }
    assert_eq!(client.request(json!({ "type": "ping" })).await["type"], "pong");
    let peak = server.peak_resident_bytes();
    assert!(peak < 250 << 20, "{peak}");
}
