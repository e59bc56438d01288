//! Quotas of tenants and users.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{fs, io::BufRead};

use serde_json::{Value, json};
use streamer_client::Api;
use streamer_proto::{
    common::v1::RequestState,
    progress::v1::WatchRequest,
    router::v1::{
        CancelRequest, RedriveManyRequest, RedriveRequest, SubmitRequest, submit_response::Outcome,
    },
};
use streamer_rpc::json_payload;
use streamer_tests::{Client, Server, metrics, within_timeout};
use tempfile::TempDir;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Submits a request that remains queued; returns its uid.
async fn submit_delayed(api: &Api, payload: String) -> Result<String, Status> {
    let request = SubmitRequest {
        action: "echo_async".into(),
        payload: Some(json_payload(payload)),
        delay: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        ..SubmitRequest::default()
    };
    Ok(api.router().submit(api.call(request)).await?.into_inner().uid)
}

fn delayed(id: &str) -> Value {
    json!({"id": id, "action": "echo_async", "delay_ms": 3_600_000})
}

/// Returns the quota that caused a rejection.
fn quota(rejected: &Status) -> String {
    assert_eq!(rejected.code(), Code::ResourceExhausted, "{rejected}");
    let quota = rejected.get_details_quota_failure().unwrap();
    quota.violations[0].subject.clone()
}

#[tokio::test]
async fn queued_requests_are_limited_across_protocols() {
    let server = Server::start(&[
        "limits.queued_requests_per_tenant=5",
        "limits.queued_requests_per_user=3",
    ]);
    let token = |tenant: &str, user: &str| server.token(tenant, user, &[]);
    let api = |tenant: &str, user: &str| Api::new(&server.url, &token(tenant, user)).unwrap();
    let ann = api("acme", "ann");
    let mut client = Client::connect(&server.url, &token("acme", "ann")).await;
    let first = submit_delayed(&ann, "{}".into()).await.unwrap();
    assert_eq!(client.request(delayed("a")).await["type"], "acknowledgment");
    assert_eq!(client.request(delayed("b")).await["type"], "acknowledgment");
    let rejected = client.request(delayed("c")).await;
    assert_eq!(rejected["error"]["code"], "RATE_LIMITED", "{rejected}");
    let option = "limits.queued_requests_per_user";
    assert_eq!(rejected["error"]["details"]["limit"], option);
    assert_eq!(rejected["error"]["details"]["retry_after_ms"], 1000);
    // A repeated submission is acknowledged, not rejected.
    assert_eq!(client.request(delayed("b")).await["type"], "acknowledgment");

    let rejected = submit_delayed(&ann, "{}".into()).await.unwrap_err();
    assert_eq!(quota(&rejected), option);
    assert!(rejected.get_details_retry_info().unwrap().retry_delay.is_some());
    let bob = api("acme", "bob");
    submit_delayed(&bob, "{}".into()).await.unwrap();
    submit_delayed(&bob, "{}".into()).await.unwrap();
    let rejected = submit_delayed(&bob, "{}".into()).await.unwrap_err();
    assert_eq!(quota(&rejected), "limits.queued_requests_per_tenant");
    submit_delayed(&api("globex", "ann"), "{}".into()).await.unwrap();
    let metrics = metrics(&server.url).await;
    let usage_of = |option: &str| {
        let name = format!("streamer_tenant_limit_use_ratio{{limit=\"{option}\"}} ");
        let value = metrics.lines().find_map(|line| line.strip_prefix(&name)).unwrap();
        value.parse::<f64>().unwrap()
    };
    assert!((usage_of(option) - 1.0).abs() < 1e-9, "{metrics}");
    assert!(usage_of("limits.watches_per_user") < 0.01);

    // Requests that leave the queue no longer count, and a redrive also counts.
    let cancel = json!({"type": "cancel", "request_id": first});
    assert_eq!(client.request(cancel).await["type"], "acknowledgment");
    assert_eq!(client.request(delayed("c")).await["type"], "acknowledgment");
    let redrive = RedriveRequest { request_id: first, ..RedriveRequest::default() };
    let rejected = ann.router().redrive(ann.call(redrive)).await.unwrap_err();
    assert_eq!(quota(&rejected), option);
}

#[tokio::test]
async fn a_page_of_redriven_requests_ends_where_the_queue_is_full() {
    let server = Server::start(&[
        "limits.queued_requests_per_user=3",
        "execution.max_concurrent_attempts=1",
    ]);
    // This request occupies the only slot, so that redriven requests remain queued.
    let mut other = Client::connect(&server.url, &server.token("globex", "ann", &[])).await;
    other.submit("long", "echo_async", json!({"steps": 1, "delay_ms": 3_600_000})).await;
    assert_eq!(other.next().await["type"], "started");
    let api = Api::new(&server.url, &server.token("acme", "ann", &[])).unwrap();
    let cancel = async |name: String| {
        let cancel = CancelRequest { request_id: name, ..CancelRequest::default() };
        api.router().cancel(api.call(cancel)).await.unwrap();
    };
    let mut cancelled = Vec::new();
    for _ in 0..5 {
        let uid = submit_delayed(&api, "{}".into()).await.unwrap();
        cancel(uid.clone()).await;
        cancelled.push(uid);
    }
    let mut queued = Vec::new();
    for _ in 0..3 {
        queued.push(submit_delayed(&api, "{}".into()).await.unwrap());
    }
    let mut redrive = RedriveManyRequest {
        states: vec![RequestState::Cancelled.into()],
        ..RedriveManyRequest::default()
    };
    let rejected = api.router().redrive_many(api.call(redrive.clone())).await.unwrap_err();
    assert_eq!(quota(&rejected), "limits.queued_requests_per_user");
    cancel(queued.remove(0)).await;
    let page = api.router().redrive_many(api.call(redrive.clone())).await.unwrap().into_inner();
    assert_eq!(page.redriven.len(), 1);
    assert!(page.redriven[0].error.is_none(), "{page:?}");
    // The next page starts with the request that exceeded the quota.
    redrive.page_token = page.next_page_token;
    cancel(queued.remove(0)).await;
    let page = api.router().redrive_many(api.call(redrive)).await.unwrap().into_inner();
    assert_eq!(page.redriven[0].uid, cancelled[4], "{page:?}");
}

#[tokio::test]
async fn queued_requests_count_after_a_restart() {
    let mut server = Server::start(&["limits.queued_requests_per_user=3"]);
    let token = server.token("acme", "ann", &[]);
    let api = Api::new(&server.url, &token).unwrap();
    for _ in 0..3 {
        submit_delayed(&api, "{}".into()).await.unwrap();
    }
    server.kill_and_restart();
    let api = Api::new(&server.url, &token).unwrap();
    let rejected = submit_delayed(&api, "{}".into()).await.unwrap_err();
    assert_eq!(quota(&rejected), "limits.queued_requests_per_user");
}

#[tokio::test]
async fn stored_bytes_are_limited_by_the_option() {
    let server = Server::start(&["limits.stored_bytes_per_tenant=100000"]);
    let api = |tenant: &str| Api::new(&server.url, &server.token(tenant, "ann", &[])).unwrap();
    let (acme, globex) = (api("acme"), api("globex"));
    let large = || json!({"result": "x".repeat(40_000)}).to_string();
    submit_delayed(&acme, large()).await.unwrap();
    submit_delayed(&acme, large()).await.unwrap();
    let rejected = submit_delayed(&acme, large()).await.unwrap_err();
    assert_eq!(quota(&rejected), "limits.stored_bytes_per_tenant");
    assert!(rejected.get_details_retry_info().is_none(), "a retry cannot succeed");
    submit_delayed(&globex, large()).await.unwrap();
}

#[tokio::test]
async fn watches_of_a_user_are_limited_across_connections() {
    let server = Server::start(&["limits.watches_per_user=3"]);
    let token = server.token("acme", "ann", &[]);
    let api = Api::new(&server.url, &token).unwrap();
    let mut first = Client::connect(&server.url, &token).await;
    let mut second = Client::connect(&server.url, &token).await;
    first.request(delayed("a")).await;
    second.request(delayed("b")).await;
    let watch = |name: &str| {
        let watch = WatchRequest { request_id: name.into(), ..WatchRequest::default() };
        let (mut progress, call) = (api.progress(), api.call(watch));
        async move { progress.watch(call).await }
    };
    let mut open = watch("a").await.unwrap().into_inner();
    open.message().await.unwrap().unwrap();
    let option = "limits.watches_per_user";
    assert_eq!(quota(&watch("b").await.unwrap_err()), option);
    let rejected = first.request(json!({"type": "subscribe", "request_id": "b"})).await;
    assert_eq!(rejected["error"]["details"]["limit"], option, "{rejected}");
    assert_eq!(rejected["error"]["details"]["retry_after_ms"], 1000);
    // Headers that services use are ignored in calls of clients.
    for header in ["streamer-watch-counted", "streamer-forwarded"] {
        let watch = WatchRequest { request_id: "b".into(), ..WatchRequest::default() };
        let mut call = api.call(watch);
        call.metadata_mut().insert(header, "1".parse().unwrap());
        assert_eq!(quota(&api.progress().watch(call).await.unwrap_err()), option);
    }
    // A submission is acknowledged even if its `wait` would exceed the limit of watches.
    let submit = SubmitRequest {
        action: "echo_async".into(),
        payload: Some(json_payload("{}")),
        wait: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        ..SubmitRequest::default()
    };
    let reply = api.router().submit(api.call(submit)).await.unwrap().into_inner();
    assert!(matches!(reply.outcome, Some(Outcome::Acknowledgment(_))), "{reply:?}");
    let rejected = second.request(delayed("c")).await;
    assert_eq!(rejected["error"]["details"]["limit"], option, "{rejected}");

    // Watches that have ended no longer count.
    second.request(json!({"type": "unsubscribe", "request_id": "b"})).await;
    assert_eq!(second.request(delayed("c")).await["type"], "acknowledgment");
    drop(open);
    within_timeout("a watch within the limit", async { while watch("a").await.is_err() {} }).await;
    drop(second);
    let subscribe = json!({"type": "subscribe", "request_id": "b"});
    within_timeout("a subscription within the limit", async {
        while first.request(subscribe.clone()).await["type"] != "subscribed" {}
    })
    .await;
}

#[tokio::test]
async fn tenant_limits_are_reloaded_on_sighup() {
    let data = TempDir::with_prefix("streamer-test-").unwrap();
    let file = data.path().join("streamer.toml");
    let write = |text: &str| fs::write(&file, text).unwrap();
    write("[limits]\nqueued_requests_per_user = 1\n");
    let (server, log) =
        Server::start_logged_with(data, &[("STREAMER_CONFIG", file.to_str().unwrap())]);
    let mut log = log.lines();
    let mut reload = || {
        server.reload();
        log.next().unwrap().unwrap()
    };
    let api = |tenant: &str| Api::new(&server.url, &server.token(tenant, "ann", &[])).unwrap();
    let (acme, globex) = (api("acme"), api("globex"));
    submit_delayed(&acme, "{}".into()).await.unwrap();
    submit_delayed(&globex, "{}".into()).await.unwrap();
    submit_delayed(&acme, "{}".into()).await.unwrap_err();

    let limits = "[limits]\nqueued_requests_per_user = 1\n[tenants.acme]\n";
    write(&format!("{limits}queued_requests_per_user = 2\n"));
    let line = reload();
    assert!(line.contains("Tenant limits reloaded"), "{line}");
    submit_delayed(&acme, "{}".into()).await.unwrap();
    submit_delayed(&acme, "{}".into()).await.unwrap_err();
    submit_delayed(&globex, "{}".into()).await.unwrap_err();

    // An invalid file changes no limit.
    write(&format!("{limits}queued_requests_per_user = -1\n"));
    let line = reload();
    assert!(line.contains("tenant limits not changed"), "{line}");
    submit_delayed(&acme, "{}".into()).await.unwrap_err();

    // Closes standard error of the server.
    drop(log);
    write(&format!("{limits}queued_requests_per_user = 3\n"));
    server.reload();
    within_timeout("the new limit", async {
        while submit_delayed(&acme, "{}".into()).await.is_err() {}
    })
    .await;
}
