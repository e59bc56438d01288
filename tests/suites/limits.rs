//! Limits of a connection: rates, counts, sizes and timeouts.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use serde_json::json;
use streamer_client::{Api, ClientError};
use streamer_core::CloseCode;
use streamer_proto::{processor::v1::report::Kind, router::v1::SubmitRequest};
use streamer_rpc::json_payload;
use streamer_tests::{
    Client, Log, ScriptedWorker, Server, declare, hello, metrics, sum, within_timeout,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

#[tokio::test]
async fn messages_beyond_the_rate_are_rejected_individually() {
    let server = Server::start(&["gateway.rate_limit=1", "gateway.rate_limit_burst=3"]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    for _ in 0..3 {
        let reply = client.request(json!({"action": "echo", "payload": 1})).await;
        assert_eq!(reply["type"], "response");
    }
    let rejected = client.request(json!({"id": "too-many", "action": "echo"})).await;
    assert_eq!(
        (&rejected["error"]["code"], &rejected["error"]["retryable"]),
        (&json!("RATE_LIMITED"), &json!(true))
    );
    assert_eq!(rejected["request_id"], "too-many");
    assert!(rejected["error"]["details"]["retry_after_ms"].as_i64().unwrap() > 0, "{rejected}");
    let message = rejected["error"]["message"].as_str().unwrap();
    assert!(message.contains("gateway.rate_limit"), "{message}");
}

#[tokio::test]
async fn connections_are_limited_per_address_and_in_total() {
    for (setting, name) in [
        ("gateway.max_connections_per_address=2", "gateway.max_connections_per_address"),
        ("gateway.max_connections=2", "gateway.max_connections"),
    ] {
        let server = Server::start(&[setting]);
        let token = |user: &str| server.token("acme", user, &[]);
        let mut first = Client::connect(&server.url, &token("a")).await;
        let second = Client::connect(&server.url, &token("b")).await;
        match Client::try_connect(&server.url, &token("c")).await {
            Err(ClientError::Closed { code: CloseCode::LimitExceeded, reason }) => {
                assert!(reason.contains(name), "{reason}");
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("the server accepted the connection"),
        }
        assert_eq!(first.request(json!({"type": "ping"})).await["type"], "pong");
        // A closed connection no longer counts.
        drop(second);
        while Client::try_connect(&server.url, &token("c")).await.is_err() {}
    }
}

#[tokio::test]
async fn subscriptions_of_one_connection_are_limited() {
    let server = Server::start(&["gateway.max_subscriptions=2"]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    for id in ["a", "b", "c"] {
        let submit = json!({"id": id, "action": "echo_async", "delay_ms": 3_600_000});
        let reply = client.request(submit).await;
        if id == "c" {
            assert_eq!(reply["error"]["code"], "RATE_LIMITED", "{reply}");
            let message = reply["error"]["message"].as_str().unwrap();
            assert!(message.contains("gateway.max_subscriptions"), "{message}");
        }
    }
    client.request(json!({"type": "unsubscribe", "request_id": "a"})).await;
    assert_eq!(
        client.request(json!({"type": "get", "request_id": "c"})).await["error"]["code"],
        "NOT_FOUND"
    );
    client.submit("c", "echo_async", json!({"steps": 1})).await;
}

/// Opens a WebSocket, but does not read from it.
async fn raw_connection(server: &Server) -> TcpStream {
    let address = server.url.trim_start_matches("http://");
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut socket = socket.connect(address.parse().unwrap()).await.unwrap();
    let token = server.token("acme", "ann", &[]);
    let handshake = format!(
        "GET /ws?token={token} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\n\
         Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    socket.write_all(handshake.as_bytes()).await.unwrap();
    socket
}

#[tokio::test]
async fn a_silent_client_is_pinged_and_disconnected() {
    let server = Server::start(&["gateway.ping_interval=1000ms"]);
    let mut socket = raw_connection(&server).await;
    let mut all = Vec::new();
    // Reads until the server closes the connection.
    socket.read_to_end(&mut all).await.ok();
    assert!(String::from_utf8_lossy(&all).contains(r#""type":"connected""#));
    assert!(
        all.windows(2).any(|pair| pair == [0x89, 0x00]),
        "an empty ping arrives before the close"
    );
}

#[tokio::test]
async fn an_incomplete_handshake_times_out() {
    let server = Server::start(&["gateway.handshake_timeout=100ms"]);
    let address = server.url.trim_start_matches("http://");
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(b"GET /ws HTTP/1.1\r\nHost: x\r\n").await.unwrap();
    let mut all = Vec::new();
    socket.read_to_end(&mut all).await.ok();
    assert!(!String::from_utf8_lossy(&all).contains("101"), "{all:?}");
}

#[tokio::test]
async fn a_slow_consumer_is_disconnected_and_can_resume() {
    let server = Server::start(&["gateway.slow_consumer_timeout=1000ms"]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    // More data than the socket buffers can contain.
    let payload = json!({"steps": 0, "output_chunks": 16, "chunk_bytes": 1_000_000});
    client.submit("big", "echo_async", payload).await;
    let mut slow = raw_connection(&server).await;
    slow.write_all(&text_frame(r#"{"type":"subscribe","request_id":"big","after_seq":0}"#))
        .await
        .unwrap();
    let log = client.follow(Log::after(1)).await;

    // The client reads nothing until the metrics report the disconnect.
    while sum(
        &metrics(&server.url).await,
        r#"streamer_gateway_connections_closed_total{code="4408"}"#,
    ) == 0
    {
        tokio::task::yield_now().await;
    }
    let mut all = Vec::new();
    slow.read_to_end(&mut all).await.ok();
    assert!(!String::from_utf8_lossy(&all).contains(r#""type":"complete""#));
    // Other clients are not affected, and a resumed watch receives all events.
    assert_eq!((log.count("output"), log.last_type()), (16, "complete"));
    client.send(json!({"type": "subscribe", "request_id": "big", "after_seq": 1})).await;
    assert_eq!(client.follow(Log::after(1)).await, log);
}

/// Returns a text frame of at most 125 bytes, masked with zeros.
fn text_frame(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len()).unwrap();
    [&[0x81, 0x80 | length, 0, 0, 0, 0], text.as_bytes()].concat()
}

#[tokio::test]
async fn a_grpc_message_over_the_limit_reports_the_option() {
    let server =
        Server::start(&["limits.max_payload_bytes=2048", "limits.max_output_chunk_bytes=2048"]);
    let api = Api::new(&server.url, &server.token("acme", "ann", &[])).unwrap();
    for size in [3_000, 3_000_000] {
        let submit = SubmitRequest {
            action: "echo".into(),
            payload: Some(json_payload(format!("\"{}\"", "x".repeat(size)))),
            ..SubmitRequest::default()
        };
        let rejected = api.router().submit(api.call(submit)).await.unwrap_err();
        assert!(rejected.message().contains("limits.max_payload_bytes"), "{size}: {rejected}");
    }
}

#[tokio::test]
async fn the_largest_payload_can_be_echoed() {
    let server = Server::start(&["limits.max_payload_bytes=4096"]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    let text = "x".repeat(4094);
    let reply = client.request(json!({"action": "echo", "payload": text})).await;
    assert_eq!(reply["data"]["echo"], json!(text), "{reply}");
    let rejected = client.request(json!({"action": "echo", "payload": format!("{text}x")})).await;
    let message = rejected["error"]["message"].as_str().unwrap();
    assert!(message.contains("must be at most 4096 bytes (limits.max_payload_bytes)"), "{message}");
}

#[tokio::test]
async fn watches_of_running_requests_release_the_memory_of_large_chunks() {
    const REQUESTS: usize = 75;
    // The worker and the client send no heartbeats.
    let server = Server::start(&[
        "execution.max_tenant_share_percent=100",
        "execution.lease_duration=600000ms",
        "gateway.ping_interval=600000ms",
    ]);
    let token = server.token("acme", "ann", &["worker:work"]);
    let hello = hello("w", 100, vec![declare("work")]);
    let mut worker = ScriptedWorker::connect(&server, &token, hello).await;
    let before = server.resident_bytes();
    let mut client = Client::connect(&server.url, &token).await;
    for _ in 0..REQUESTS {
        client.send(json!({"action": "work"})).await;
    }
    let chunk = json_payload(format!("\"{}\"", "x".repeat(1_000_000)));
    for _ in 0..REQUESTS {
        let task = worker.next_task().await;
        worker.report(&task, 1, Kind::Output(chunk.clone())).await;
    }
    let mut chunks = 0;
    while chunks < REQUESTS {
        chunks += usize::from(client.next().await["type"] == "output");
    }
    // The requests are still running. Their latest events use 64 MiB in the progress service and 75 MB in the
    // gateway; buffers of the watches would use an additional 225 MB.
    within_timeout("the release of memory", async {
        // The allocator releases memory only while the server is active.
        while server.resident_bytes() > before + 200 * 1024 * 1024 {
            metrics(&server.url).await;
        }
    })
    .await;
}

#[tokio::test]
async fn small_chunks_of_running_requests_use_little_memory() {
    const REQUESTS: usize = 200;
    const CHUNKS: usize = 150;
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let before = server.peak_resident_bytes();
    for _ in 0..REQUESTS {
        // The delay causes each chunk to arrive in a separate message.
        let payload = json!({"steps": CHUNKS, "delay_ms": 10, "output_chunks": CHUNKS,
            "chunk_bytes": 150});
        client.send(json!({"action": "echo_async", "payload": payload})).await;
    }
    let mut completed = 0;
    while completed < REQUESTS {
        completed += usize::from(client.next().await["type"] == "complete");
    }
    let grown = server.peak_resident_bytes().saturating_sub(before);
    // The events use 20 MB; with their receive buffers, they would use an additional 240 MB.
    assert!(grown < 128 * 1024 * 1024, "{} MiB", grown / 1024 / 1024);
}
