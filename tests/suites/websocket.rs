//! Tests of the WebSocket protocol, with a real server and real sockets.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use serde_json::{Value, json};
use streamer_client::ClientError;
use streamer_core::CloseCode;
use streamer_tests::{Client, Log, Server};

async fn open() -> (Server, Client) {
    let server = Server::start(&[]);
    let client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    (server, client)
}

fn code(reply: &Value) -> &str {
    reply["error"]["code"].as_str().unwrap_or("")
}

#[tokio::test]
async fn the_first_message_describes_the_connection() {
    let (_server, client) = open().await;
    let connected = &client.connected;
    assert_eq!((&connected["user_id"], &connected["tenant_id"]), (&json!("ann"), &json!("acme")));
    assert_eq!(connected["heartbeat_ms"], 25_000);
    assert!(connected["max_message_bytes"].as_i64().unwrap() > 4 << 20);
    assert_eq!(connected["connection_id"].as_str().unwrap().len(), 26);
}

#[tokio::test]
async fn a_message_needs_neither_type_nor_id_and_may_have_unknown_fields() {
    let (_server, mut client) = open().await;
    let reply =
        client.request(json!({"action": "echo", "payload": {"a": 1}, "x": {"y": []}})).await;
    assert_eq!(reply["type"], "response");
    assert_eq!((&reply["success"], &reply["data"]["echo"]["a"]), (&json!(true), &json!(1)));
    assert_eq!(reply["request_id"], reply["uid"]);
    let reply = client.request(json!({"type": "request", "id": "mine", "action": "echo"})).await;
    assert_eq!((&reply["request_id"], &reply["data"]["echo"]), (&json!("mine"), &json!({})));
}

#[tokio::test]
async fn payloads_are_returned_byte_for_byte() {
    let (_server, mut client) = open().await;
    let deep = format!("{}{}", "[".repeat(5_000), "]".repeat(5_000));
    let large = format!("\"{}\"", "x".repeat(1_000_000));
    let tricky = r#"{"n":9223372036854775807, "s":"\u0000 é 😀","f":1.10,"e":1e400}"#;
    for payload in [tricky, &deep, &large, "null", "7", " [1 , 2] "] {
        client.send_text(format!(r#"{{"action":"echo","payload":{payload}}}"#)).await;
        let reply = client.next_text().await;
        let expected = format!(r#""data":{{"echo":{}}}}}"#, payload.trim());
        assert!(reply.ends_with(&expected), "{}", &reply[..reply.len().min(300)]);
    }
}

#[tokio::test]
async fn invalid_input_is_reported_precisely_and_the_connection_stays_open() {
    let (_server, mut client) = open().await;
    let long = "x".repeat(129);
    for (text, expected, part) in [
        ("not json", "VALIDATION_ERROR", "message: is not JSON"),
        ("[1]", "VALIDATION_ERROR", "must be a JSON object"),
        (r#"{"type":"dance"}"#, "VALIDATION_ERROR", "type: must be request, subscribe"),
        (r#"{"payload":1}"#, "VALIDATION_ERROR", "action: is required"),
        (r#"{"action":"No Way"}"#, "VALIDATION_ERROR", "action: must match"),
        (r#"{"action":"unknown"}"#, "INVALID_ACTION", "action \"unknown\" not found"),
        (
            &format!(r#"{{"id":"{long}","action":"echo"}}"#),
            "VALIDATION_ERROR",
            "id: must have 1 to 128",
        ),
        (r#"{"type":"get","request_id":"nope"}"#, "NOT_FOUND", "request not found"),
        (r#"{"type":"subscribe","request_id":"nope"}"#, "NOT_FOUND", "request not found"),
        (r#"{"type":"cancel"}"#, "VALIDATION_ERROR", "request_id: is required"),
        (
            r#"{"action":"echo_async","payload":{"steps":-1,"delay_ms":"x","chunk_bytes":0}}"#,
            "VALIDATION_ERROR",
            "payload.steps",
        ),
    ] {
        client.send_text(text).await;
        let reply = client.next().await;
        assert_eq!((&reply["type"], code(&reply)), (&json!("error"), expected), "{reply}");
        let message = reply["error"]["message"].as_str().unwrap();
        assert!(message.contains(part), "{part} is missing in {message}");
    }
    // Every violation of the schema is listed.
    let reply = client
        .request(json!({"action": "echo_async", "payload": {"steps": -1, "chunk_bytes": 0}}))
        .await;
    assert_eq!(reply["error"]["details"]["violations"].as_array().unwrap().len(), 2, "{reply}");
    assert_eq!(client.request(json!({"type": "ping"})).await["type"], "pong");
}

#[tokio::test]
async fn messages_over_the_limit_report_the_option() {
    let server =
        Server::start(&["limits.max_payload_bytes=2048", "limits.max_output_chunk_bytes=2048"]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    let reply = client.request(json!({"action": "echo", "payload": "x".repeat(3000)})).await;
    let message = reply["error"]["message"].as_str().unwrap();
    assert!(message.contains("at most 2048 bytes (limits.max_payload_bytes)"), "{message}");
    client.send(json!({"action": "echo", "payload": "x".repeat(100_000)})).await;
    match client.try_next().await {
        Err(ClientError::Closed { code: CloseCode::MessageTooBig, reason }) => {
            assert!(reason.contains("limits.max_payload_bytes"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_async_request_is_acknowledged_followed_and_replayed() {
    let (_server, mut client) = open().await;
    let payload = json!({"steps": 4, "output_chunks": 2, "result": {"done": true}});
    let acknowledgment = client.submit("job", "echo_async", payload).await;
    assert_eq!(
        (&acknowledgment["status"], &acknowledgment["duplicate"]),
        (&json!("queued"), &json!(false))
    );
    let log = client.follow(Log::after(1)).await;
    assert_eq!(log.last_seq(), 2 + 4 + 2 + 1);
    assert_eq!((log.count("progress"), log.count("output")), (4, 2));
    let complete = log.events.last().unwrap();
    assert_eq!(
        (&complete["result"]["done"], &complete["output"]["chunks"]),
        (&json!(true), &json!(2))
    );

    client.send(json!({"type": "subscribe", "request_id": "job", "after_seq": 0})).await;
    let subscribed = client.next().await;
    assert_eq!(
        (&subscribed["type"], &subscribed["state"]),
        (&json!("subscribed"), &json!("SUCCEEDED"))
    );
    let again = client.follow(Log::default()).await;
    assert_eq!(again.events[0]["type"], "accepted");
    assert_eq!(again.events[1..], log.events);

    // Without after_seq, a late subscriber receives only the terminal event.
    client.send(json!({"type": "subscribe", "request_id": acknowledgment["uid"]})).await;
    assert_eq!(client.next().await["last_seq"], log.last_seq());
    assert_eq!(client.next().await, *complete);

    let request = client.request(json!({"type": "get", "request_id": "job"})).await;
    assert_eq!(
        (&request["state"], &request["result"]["done"]),
        (&json!("SUCCEEDED"), &json!(true))
    );
    let list = client.request(json!({"type": "list", "states": ["SUCCEEDED"], "limit": 5})).await;
    assert_eq!(list["requests"][0]["request_id"], "job");
}

#[tokio::test]
async fn a_submission_with_wait_returns_the_outcome() {
    let (_server, mut client) = open().await;
    let wait = json!({"id": "w", "action": "echo_async", "wait_ms": 20_000,
        "payload": {"steps": 2, "result": 5}});
    for _ in 0..2 {
        let reply = client.request(wait.clone()).await;
        assert_eq!((&reply["type"], &reply["data"]), (&json!("response"), &json!(5)), "{reply}");
    }
    let list = client.request(json!({"type": "list"})).await;
    assert_eq!(list["requests"].as_array().unwrap().len(), 1, "the request ran once");
}

#[tokio::test]
async fn the_same_id_with_a_different_payload_is_a_conflict() {
    let (_server, mut client) = open().await;
    client.submit("k", "echo_async", json!({"steps": 1})).await;
    client.follow(Log::after(1)).await;
    let reply =
        client.request(json!({"id": "k", "action": "echo_async", "payload": {"steps": 2}})).await;
    assert_eq!((code(&reply), &reply["request_id"]), ("CONFLICT", &json!("k")), "{reply}");
}

#[tokio::test]
async fn cancellation_ends_running_and_queued_requests() {
    let (_server, mut client) = open().await;
    client.submit("run", "echo_async", json!({"steps": 1000, "delay_ms": 3_600_000})).await;
    assert_eq!(client.next().await["type"], "started");
    let mut log = Log::after(2);
    client.send(json!({"type": "cancel", "request_id": "run", "reason": "enough"})).await;
    log = client.follow(log).await;
    assert_eq!(log.last_type(), "cancelled");
    assert_eq!(log.events.last().unwrap()["reason"], "enough");

    let later = json!({"id": "later", "action": "echo_async", "delay_ms": 3_600_000});
    assert_eq!(client.request(later).await["type"], "acknowledgment");
    client.send(json!({"type": "cancel", "request_id": "later"})).await;
    let log = client.follow(Log::after(1)).await;
    assert_eq!((log.last_type(), log.last_seq()), ("cancelled", 2));
}

#[tokio::test]
async fn a_failed_attempt_is_retried_and_its_output_rewound() {
    let (_server, mut client) = open().await;
    let payload = json!({"steps": 4, "output_chunks": 4, "fail_attempts": 2});
    client.submit("flaky", "echo_async", payload).await;
    let log = client.follow(Log::after(1)).await;
    assert_eq!((log.count("retrying"), log.count("started"), log.last_type()), (2, 3, "complete"));
    let mut valid: Vec<(i64, String)> = Vec::new();
    for event in &log.events {
        if event["type"] == "retrying" {
            let rewind = event["rewind_to_seq"].as_i64().unwrap();
            valid.retain(|(seq, _)| *seq <= rewind);
        }
        if event["type"] == "output" {
            valid.push((event["seq"].as_i64().unwrap(), event["data"].to_string()));
        }
    }
    let mut digest = streamer_core::OutputDigest::default();
    valid.iter().for_each(|(_, chunk)| digest.push(chunk.as_bytes()));
    let output = &log.events.last().unwrap()["output"];
    assert_eq!(output["chunks"], digest.chunks());
    assert_eq!(output["sha256"], streamer_core::hex(&digest.sha256()));
}

#[tokio::test]
async fn other_users_and_tenants_neither_see_nor_cancel_requests() {
    let (server, mut client) = open().await;
    let acknowledgment = client.submit("mine", "echo_async", json!({"steps": 1})).await;
    client.follow(Log::after(1)).await;
    for (tenant, user) in [("other", "ann"), ("acme", "bob")] {
        let mut other = Client::connect(&server.url, &server.token(tenant, user, &[])).await;
        for name in [json!("mine"), acknowledgment["uid"].clone()] {
            for kind in ["get", "subscribe", "cancel"] {
                let reply = other.request(json!({"type": kind, "request_id": name})).await;
                assert_eq!(code(&reply), "NOT_FOUND", "{reply}");
            }
        }
        let list = other.request(json!({"type": "list"})).await;
        assert_eq!(list["requests"], json!([]));
    }
    let manager = server.token("acme", "boss", &["requests:read"]);
    let mut manager = Client::connect(&server.url, &manager).await;
    let request =
        manager.request(json!({"type": "get", "request_id": acknowledgment["uid"]})).await;
    assert_eq!(request["user_id"], "ann");
    let rejected =
        manager.request(json!({"type": "cancel", "request_id": acknowledgment["uid"]})).await;
    assert_eq!(code(&rejected), "FORBIDDEN");
}

#[tokio::test]
async fn ten_thousand_mutated_messages_do_not_affect_the_server() {
    let (server, mut client) = open().await;
    let seeds = [
        r#"{"type":"request","id":"a","action":"echo","payload":{"a":[1,2,{"b":null}]}}"#,
        r#"{"type":"subscribe","request_id":"a","after_seq":17,"mode":"latest"}"#,
        r#"{"type":"list","states":["RUNNING"],"limit":50,"page_token":""}"#,
        r#"{"type":"cancel","request_id":"a","reason":"x"}"#,
    ];
    // Generator from Numerical Recipes; the fixed seed yields the same messages in every run.
    let mut state = 7_u32;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    for _ in 0..10_000 {
        let mut bytes = seeds[random(seeds.len())].as_bytes().to_vec();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(3) {
                0 => bytes[at] = u8::try_from(random(128)).unwrap(),
                1 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(1)),
            }
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
        let reply = client.request_text(String::from_utf8_lossy(&bytes).into_owned()).await;
        assert!(reply["type"].is_string());
    }
    let mut other = Client::connect(&server.url, &server.token("acme", "bob", &[])).await;
    assert_eq!(other.request(json!({"action": "echo", "payload": 1})).await["data"]["echo"], 1);
}
