//! Delivery: every watcher receives exactly the log, even across reconnects.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::sync::Arc;

use serde_json::json;
use streamer_tests::{Client, Log, Server};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_concurrent_submissions_of_one_id_create_one_request() {
    let server = Server::start(&[]);
    let token = server.token("acme", "ann", &[]);
    let mut tasks = JoinSet::new();
    for _ in 0..10 {
        let (url, token) = (server.url.clone(), token.clone());
        tasks.spawn(async move {
            let mut client = Client::connect(&url, &token).await;
            let submit = json!({"id": "one", "action": "echo_async", "payload": {"steps": 20}});
            for _ in 0..10 {
                client.send(submit.clone()).await;
            }
            let (mut acknowledgments, mut log, mut uids) = (0, Log::after(1), Vec::new());
            while acknowledgments < 10 || !log.has_ended() {
                let message = client.next().await;
                if message["type"] == "acknowledgment" {
                    acknowledgments += 1;
                    uids.push(message["uid"].clone());
                } else if log.has_ended() {
                    // A repeated submission after the end replays the same log.
                    let at = usize::try_from(message["seq"].as_i64().unwrap() - 2).unwrap();
                    assert_eq!(log.events[at], message);
                } else {
                    log.push(message);
                }
            }
            uids.dedup();
            assert_eq!(uids.len(), 1);
            (uids.remove(0), log)
        });
    }
    let all = tasks.join_all().await;
    assert!(all.iter().all(|received| *received == all[0]), "all clients receive the same log");
    assert_eq!((all[0].1.count("started"), all[0].1.last_type()), (1, "complete"));
    let mut client = Client::connect(&server.url, &token).await;
    let list = client.request(json!({"type": "list"})).await;
    assert_eq!(list["requests"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_watchers_that_join_late_and_reconnect_receive_exactly_the_log() {
    const WATCHERS: usize = 1000;
    const STEPS: i64 = 300;
    // On a busy machine, a thousand concurrent handshakes may take longer than the default of 10 s.
    let settings = ["gateway.handshake_timeout=60000ms", "gateway.max_connections_per_user=5000"];
    let server = Server::start(&settings);
    let token: Arc<str> = server.token("acme", "ann", &[]).into();
    let mut owner = Client::connect(&server.url, &token).await;
    owner.submit("shared", "echo_async", json!({"steps": STEPS, "delay_ms": 20})).await;
    let mut watchers = JoinSet::new();
    for number in 0..WATCHERS {
        let (url, token) = (server.url.clone(), token.clone());
        watchers.spawn(async move { watch(&url, &token, number).await });
    }
    let expected = owner.follow(Log::after(1)).await;
    assert_eq!(expected.last_seq(), STEPS + 3);
    let mut finished = 0;
    while let Some(log) = watchers.join_next().await {
        let log = log.unwrap();
        assert_eq!(log.events[0]["type"], "accepted");
        assert_eq!(log.events[1..], expected.events);
        finished += 1;
    }
    assert_eq!(finished, WATCHERS);
}

/// Watches the log; every third watcher reconnects after some events.
async fn watch(url: &str, token: &str, number: usize) -> Log {
    let mut log = Log::default();
    let mut leave_at = if number.is_multiple_of(3) { number % 50 + 2 } else { usize::MAX };
    while !log.has_ended() {
        let mut client = Client::connect(url, token).await;
        let after_seq = log.last_seq();
        client
            .send(json!({"type": "subscribe", "request_id": "shared", "after_seq": after_seq}))
            .await;
        while !log.has_ended() && log.events.len() < leave_at {
            log.push(client.next().await);
        }
        leave_at = usize::MAX;
    }
    log
}

#[tokio::test]
async fn mode_latest_drops_only_progress() {
    let server = Server::start(&[]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    let payload = json!({"steps": 5000, "output_chunks": 10});
    let submit = json!({"id": "l", "action": "echo_async", "payload": payload, "mode": "latest"});
    assert_eq!(client.request(submit).await["type"], "acknowledgment");
    let (mut progress, mut output, mut last_seq) = (0, 0, 1);
    loop {
        let message = client.next().await;
        let seq = message["seq"].as_i64().unwrap();
        assert!(seq > last_seq, "{message}");
        last_seq = seq;
        match message["type"].as_str().unwrap() {
            "progress" => progress += 1,
            "output" => output += 1,
            "complete" => break,
            _ => {}
        }
    }
    assert_eq!((output, last_seq), (10, 5000 + 10 + 3));
    assert!(progress < 2500, "{progress} of 5000 progress events were sent");
}

#[tokio::test]
async fn messages_are_sent_only_to_connected_users_of_the_tenant() {
    use streamer_client::Api;
    use streamer_proto::connections::v1::{BroadcastRequest, SendRequest, send_request::Target};
    use streamer_rpc::json_payload;
    let server = Server::start(&[]);
    let mut ann = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let mut other = Client::connect(&server.url, &server.token("other", "ann", &[])).await;
    let api = Api::new(&server.url, &server.token("acme", "service", &["connections:*"])).unwrap();
    let send = |target| SendRequest {
        target: Some(target),
        topic: "news".into(),
        data: Some(json_payload(r#"{"n":9223372036854775807}"#)),
    };
    let to_ann = api.call(send(Target::UserId("ann".into())));
    assert_eq!(api.connections().send(to_ann).await.unwrap().into_inner().recipients, 1);
    let message = ann.next_text().await;
    assert!(message.contains(r#""topic":"news","data":{"n":9223372036854775807}"#), "{message}");
    let foreign = other.connected["connection_id"].as_str().unwrap().to_owned();
    let rejected = api.connections().send(api.call(send(Target::ConnectionId(foreign)))).await;
    assert_eq!(rejected.unwrap_err().code(), tonic::Code::NotFound);
    let all = BroadcastRequest { topic: "all".into(), data: None };
    api.connections().broadcast(api.call(all)).await.unwrap();
    assert_eq!(ann.next().await["topic"], "all");
    assert_eq!(
        other.request(json!({"type": "ping"})).await["type"],
        "pong",
        "no message before the pong"
    );
    let unpermitted = Api::new(&server.url, &server.token("acme", "x", &[])).unwrap();
    let rejected =
        unpermitted.connections().send(unpermitted.call(send(Target::UserId("ann".into())))).await;
    assert_eq!(rejected.unwrap_err().code(), tonic::Code::PermissionDenied);
}
