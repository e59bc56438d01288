//! What a client or a worker sends costs a bounded amount, and hurts no other tenant.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use serde_json::{Map, Value, json};
use streamer_client::Api;
use streamer_core::{Clock, SystemClock};
use streamer_proto::{
    common::v1::Action,
    processor::v1::{report::Kind, work_request},
    router::v1::{SubmitRequest, submit_response::Outcome},
};
use streamer_rpc::json_payload;
use streamer_store::{DeclaredAction, Engine};
use streamer_tests::{Client, Log, ScriptedWorker, Server, declare, hello, offered};
use tonic::{Code, Status};

/// A chain of references for the same value that ends in its items, and so recurses.
fn chain(length: usize) -> Value {
    let mut definitions = Map::new();
    for step in 0..length {
        let next = json!({ "allOf": [{ "$ref": format!("#/$defs/d{}", step + 1) }] });
        definitions.insert(format!("d{step}"), next);
    }
    definitions.insert(format!("d{length}"), json!({ "items": { "$ref": "#" } }));
    json!({ "$ref": "#/$defs/d0", "$defs": definitions })
}

/// Definitions that each apply the next one twice to the same value.
fn doubling(length: usize) -> Value {
    let mut definitions = Map::new();
    for step in 0..length {
        let next = json!({ "$ref": format!("#/$defs/d{}", step + 1) });
        definitions.insert(format!("d{step}"), json!({ "allOf": [next, next] }));
    }
    definitions.insert(format!("d{length}"), json!({ "type": "object" }));
    json!({ "$ref": "#/$defs/d0", "$defs": definitions })
}

/// Recurses along many ways, in few bytes.
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
async fn schemas_without_a_bound_are_refused_when_they_are_declared() {
    let server = Server::start(&[]);
    let token = server.token("evil", "worker", &["worker:*"]);
    for (schema, rule) in [
        (chain(20), "the recursion through"),
        (doubling(24), "applies too many subschemas to the same value"),
        (branching(), "for one value nested 8 deep"),
        (json!({ "anyOf": [{ "$ref": "#" }] }), "without end"),
        (json!({ "$ref": "http://127.0.0.1:1/schema.json" }), "which is not '#' or '#/…'"),
        (json!({ "$ref": "file:///etc/passwd" }), "which is not '#' or '#/…'"),
        (json!({ "pattern": "(a{1000}){1000}" }), "KiB when compiled"),
        (
            json!({ "pattern": "^(?!a)" }),
            "look-around, including look-ahead and look-behind, is not supported",
        ),
    ] {
        let first = hello("w", 1, vec![declare("good"), with_schema("bomb", &schema)]);
        let first = work_request::Message::Hello(first);
        let refused = ScriptedWorker::open(&server, &token, first).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        let message = refused.message();
        assert!(message.starts_with("hello.actions[1].payload_schema: "), "{message}");
        assert!(message.contains(rule), "{message}");
    }
    // None of it was kept.
    let unknown = submit(&server, "evil", "good", "{}".into()).await.err().unwrap();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
}

#[tokio::test]
async fn the_deepest_payload_is_validated_and_the_dearest_is_refused() {
    let server = Server::start(&[]);
    let token = server.token("acme", "worker", &["worker:*"]);
    let items = json!({ "items": { "$ref": "#" } });
    let actions = vec![
        with_schema("deep", &chain(6)),
        with_schema("wide", &json!({ "anyOf": [items, items, { "type": "null" }] })),
    ];
    let mut worker = ScriptedWorker::come(&server, &token, hello("w", 4, actions)).await;
    offered(&server, &token, "wide", 1).await;
    let refused = submit(&server, "acme", "wide", nested(100)).await.err().unwrap();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let rule = "payload: is too large or nested too deep for the schema of this action";
    assert!(refused.message().starts_with(rule), "{refused}");
    submit(&server, "acme", "wide", nested(8)).await.unwrap();
    submit(&server, "acme", "deep", nested(120)).await.unwrap();
    for task in [worker.task().await, worker.task().await] {
        worker.report(&task, 0, Kind::Result(json_payload("1"))).await;
        worker.ended(&task).await;
    }
}

#[tokio::test]
async fn a_stored_schema_that_is_refused_keeps_payloads_out() {
    let data = tempfile::tempdir().unwrap();
    // As an earlier version accepted it.
    let store = streamer_store::open(&Engine::Embedded { data: data.path().to_owned() }).unwrap();
    let action = with_schema("work", &chain(20));
    let declared = vec![DeclaredAction { tenant: Some("acme".into()), action }];
    store.save_actions(declared, SystemClock.now()).await.unwrap();
    drop(store);
    let server = Server::start_in(data, &[]);
    let refused = submit(&server, "acme", "work", nested(120)).await.err().unwrap();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let rule = "the payload schema of action \"work\" cannot be used, declare a new one: ";
    assert!(refused.message().starts_with(rule), "{refused}");
    // A new declaration repairs it.
    let token = server.token("acme", "worker", &["worker:*"]);
    let action = with_schema("work", &json!({ "type": "array" }));
    let _worker = ScriptedWorker::come(&server, &token, hello("w", 1, vec![action])).await;
    offered(&server, &token, "work", 1).await;
    submit(&server, "acme", "work", nested(120)).await.unwrap();
    let user = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &user).await;
    client.submit("r", "echo_async", json!({ "result": 1 })).await;
    assert_eq!(client.follow(Log::after(1)).await.events.last().unwrap()["result"], json!(1));
}
