//! Acknowledged requests survive `kill -9`.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::{Value, json};
use streamer_client::{ClientError, ReceivedMessage, ServerMessage, Session};
use streamer_core::CloseCode;
use streamer_tests::{Client, Log, Server};
use tokio::sync::Notify;

/// Messages that one submitter received before the kill.
#[derive(Default)]
struct Received {
    acknowledged: Vec<String>,
    /// Complete logs, from the second event.
    ended: HashMap<String, Vec<Value>>,
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_request_survives_a_kill() {
    const ROUNDS: usize = 3;
    let mut server = Server::start(&["execution.lease_duration=1000ms"]);
    let token = server.token("acme", "ann", &[]);
    for round in 0..ROUNDS {
        let enough = Arc::new(Notify::new());
        let ended = Arc::new(AtomicUsize::new(0));
        let submitters: Vec<_> = (0..4)
            .map(|number| {
                let session = (server.url.clone(), token.clone());
                let name = format!("r{round}-s{number}");
                tokio::spawn(submit_until_killed(session, name, ended.clone(), enough.clone()))
            })
            .collect();
        // Under load: some requests have ended, others are running or queued.
        enough.notified().await;
        server.kill_and_restart();
        for submitter in submitters {
            check(&server, &token, submitter.await.unwrap()).await;
        }
    }
}

async fn submit_until_killed(
    (url, token): (String, String),
    name: String,
    ended: Arc<AtomicUsize>,
    enough: Arc<Notify>,
) -> Received {
    const ENOUGH: usize = 200;
    const WINDOW: usize = 32;
    let mut session = Session::connect(&url, &token).await.unwrap();
    let mut received = Received::default();
    let mut logs: HashMap<String, Vec<Value>> = HashMap::new();
    let mut submitted = 0;
    loop {
        while submitted < received.ended.len() + WINDOW {
            let id = format!("{name}-{submitted}");
            let message = json!({"id": id, "action": "echo_async", "payload": {"steps": 5}});
            if session.send(message.to_string()).await.is_err() {
                return received;
            }
            submitted += 1;
        }
        let Ok(ReceivedMessage { message, text, .. }) = session.next().await else {
            return received;
        };
        let value: Value = serde_json::from_str(&text).unwrap();
        let Some(id) = message.request_id().map(str::to_owned) else { continue };
        if let ServerMessage::Acknowledgment(_) = message {
            received.acknowledged.push(id);
            continue;
        }
        let log = logs.entry(id.clone()).or_default();
        log.push(value);
        if let ServerMessage::Complete(_) = message {
            received.ended.insert(id.clone(), logs.remove(&id).unwrap());
            if ended.fetch_add(1, Ordering::SeqCst) + 1 == ENOUGH {
                enough.notify_one();
            }
        }
    }
}

/// Checks that each acknowledged request ends exactly once, and that received logs are unchanged.
async fn check(server: &Server, token: &str, received: Received) {
    assert!(!received.acknowledged.is_empty());
    let mut client = Client::connect(&server.url, token).await;
    for id in received.acknowledged {
        let subscribe = json!({"type": "subscribe", "request_id": id, "after_seq": 0});
        let reply = client.request(subscribe).await;
        assert_eq!(reply["type"], "subscribed", "{reply}");
        let log = client.follow(Log::default()).await;
        assert_eq!(log.last_type(), "complete");
        if let Some(events) = received.ended.get(&id) {
            assert_eq!(log.events[1..], *events);
        }
    }
}

#[tokio::test]
async fn a_stopping_server_closes_connections_and_exits_successfully() {
    let mut server = Server::start(&["server.drain_timeout=5000ms"]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    let stopping = tokio::task::spawn_blocking(move || server.stop());
    assert_eq!(client.next().await["type"], "draining");
    let closed = client.try_next().await;
    assert!(
        matches!(closed, Err(ClientError::Closed { code: CloseCode::GoingAway, .. })),
        "{closed:?}"
    );
    drop(client);
    assert_eq!(stopping.await.unwrap(), Some(0));
}

#[tokio::test]
async fn a_second_signal_stops_a_draining_server() {
    let mut server = Server::start(&["server.drain_timeout=600000ms"]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    client.submit("long", "echo_async", json!({"steps": 2, "delay_ms": 3_600_000})).await;
    while client.next().await["type"] != "started" {}
    server.terminate();
    while client.next().await["type"] != "draining" {}
    server.terminate();
    assert_eq!(server.wait(), Some(0));
    server.restart();
    let mut client = Client::connect(&server.url, &token).await;
    client.send(json!({"type": "cancel", "request_id": "long"})).await;
    client.send(json!({"type": "subscribe", "request_id": "long", "after_seq": 2})).await;
    let log = client.follow(Log::after(2)).await;
    assert_eq!(log.last_type(), "cancelled", "the request still exists");
}
