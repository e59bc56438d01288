//! Workers: execution, recovery after a worker or the server stops, and the rules for their messages.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use serde_json::{Value, json};
use streamer_client::Api;
use streamer_proto::{
    common::v1::{Action, Error, ErrorCode, Progress},
    processor::v1::{
        Capacity, Hello, KeepAlive, Release, report::Kind, work_request, work_response::Message,
    },
    router::v1::{SubmitRequest, submit_response::Outcome},
};
use streamer_rpc::json_payload;
use streamer_tests::{
    Client, Log, ScriptedWorker, Server, Signal, WorkerProcess, declare, hello, resume_hello,
    wait_for_workers,
};
use tokio::net::TcpStream;
use tonic::Code;

/// Starts a server that runs `echo_async` only in workers.
fn server(settings: &[&str]) -> Server {
    let settings = [&["execution.builtin_actions=echo"], settings].concat();
    Server::start(&settings)
}

fn worker_token(server: &Server) -> String {
    server.token("acme", "worker", &["worker:*"])
}

async fn client(server: &Server) -> Client {
    Client::connect(&server.url, &server.token("acme", "ann", &[])).await
}

fn progress(message: &str) -> Kind {
    Kind::Progress(Progress { message: message.into(), ..Progress::default() })
}

fn result(json: &'static str) -> Kind {
    Kind::Result(json_payload(json))
}

fn kinds(log: &Log) -> Vec<&str> {
    log.events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_worker_runs_its_declared_actions() {
    let server = server(&[]);
    let token = worker_token(&server);
    let _worker = WorkerProcess::start(&server, &token, "echo_async", &[]);
    wait_for_workers(&server, &token, "echo_async", 1).await;
    let mut client = client(&server).await;
    let payload = json!({"steps": 4, "output_chunks": 2, "result": {"n": 1}});
    client.submit("r", "echo_async", payload).await;
    let log = client.follow(Log::after(1)).await;
    assert_eq!((log.count("progress"), log.count("output")), (4, 2));
    let started = log.events[0]["worker"].as_str().unwrap();
    assert!(!started.starts_with("processor"), "{started}");
    let end = log.events.last().unwrap();
    assert_eq!((&end["result"], &end["output"]["chunks"]), (&json!({"n": 1}), &json!(2)));
}

#[tokio::test]
async fn a_suspended_worker_loses_its_lease_and_its_later_reports_are_rejected() {
    let server = server(&["execution.lease_duration=600ms", "execution.poll_interval=50ms"]);
    let token = worker_token(&server);
    let mut suspended = WorkerProcess::start(&server, &token, "echo_async", &["--slots", "1"]);
    wait_for_workers(&server, &token, "echo_async", 1).await;
    let mut client = client(&server).await;
    client.submit("r", "echo_async", json!({"steps": 30, "delay_ms": 20, "result": 1})).await;
    let mut log = Log::after(1);
    while log.count("progress") < 3 {
        log.push(client.next().await);
    }
    suspended.signal(Signal::STOP);
    let _other = WorkerProcess::start(&server, &token, "echo_async", &["--slots", "1"]);
    while log.count("started") < 2 {
        log.push(client.next().await);
    }
    suspended.signal(Signal::CONT);
    suspended.wait_for_log("attempt revoked");
    let log = client.follow(log).await;
    assert_eq!((log.count("retrying"), log.count("started")), (1, 2));
    assert_eq!(log.last_type(), "complete");
    let retrying = log.events.iter().position(|event| event["type"] == "retrying").unwrap();
    let message = log.events[retrying]["error"]["message"].as_str().unwrap();
    assert!(message.contains("was silent for"), "{message}");
    assert!(log.events[..=retrying].iter().all(|event| event["attempt"] == 1));
    assert!(log.events[retrying + 1..].iter().all(|event| event["attempt"] == 2));
    assert_eq!(log.events[retrying + 1..].iter().filter(|e| e["type"] == "progress").count(), 30);
}

#[tokio::test]
async fn an_attempt_continues_when_the_server_is_killed() {
    let mut server = server(&["execution.lease_duration=120000ms"]);
    let token = worker_token(&server);
    let _worker = WorkerProcess::start(&server, &token, "echo_async", &[]);
    wait_for_workers(&server, &token, "echo_async", 1).await;
    let mut before = client(&server).await;
    let payload = json!({"steps": 60, "delay_ms": 20, "output_chunks": 60, "result": 1});
    before.submit("r", "echo_async", payload).await;
    let mut log = Log::after(1);
    while log.count("progress") < 3 {
        log.push(before.next().await);
    }
    server.kill_and_restart();
    let mut after = client(&server).await;
    let seen = log.last_seq();
    after.send(json!({"type": "subscribe", "request_id": "r", "after_seq": seen})).await;
    let log = after.follow(log).await;
    assert_eq!((log.count("started"), log.count("retrying")), (1, 0), "{:?}", kinds(&log));
    assert_eq!((log.count("progress"), log.count("output")), (60, 60));
    assert_eq!(log.last_type(), "complete");
}

#[tokio::test]
async fn a_stopping_worker_releases_its_attempts() {
    let server = server(&[]);
    let token = worker_token(&server);
    let mut first = WorkerProcess::start(&server, &token, "echo_async", &["--drain-timeout", "1s"]);
    wait_for_workers(&server, &token, "echo_async", 1).await;
    let mut client = client(&server).await;
    client.submit("long", "echo_async", json!({"steps": 600, "delay_ms": 100})).await;
    let mut log = Log::after(1);
    while log.count("progress") < 1 {
        log.push(client.next().await);
    }
    assert_eq!(first.stop(), Some(0));
    while log.last_type() != "retrying" {
        log.push(client.next().await);
    }
    let retrying = log.events.last().unwrap();
    assert_eq!(retrying["error"]["message"], "the worker is shutting down");
    let _second = WorkerProcess::start(&server, &token, "echo_async", &[]);
    while log.last_type() != "started" {
        log.push(client.next().await);
    }
    assert_eq!(log.events.last().unwrap()["attempt"], 2);
}

#[tokio::test]
async fn a_second_signal_stops_a_draining_worker() {
    let server = server(&[]);
    let token = worker_token(&server);
    let mut worker =
        WorkerProcess::start(&server, &token, "echo_async", &["--drain-timeout", "1h"]);
    wait_for_workers(&server, &token, "echo_async", 1).await;
    let mut client = client(&server).await;
    client.submit("long", "echo_async", json!({"steps": 2, "delay_ms": 3_600_000})).await;
    while client.next().await["type"] != "started" {}
    worker.signal(Signal::TERM);
    worker.wait_for_log("draining");
    assert_eq!(worker.stop(), Some(0));
}

#[tokio::test]
async fn cancellation_reaches_the_handler() {
    let server = server(&[]);
    let token = worker_token(&server);
    let _worker = WorkerProcess::start(&server, &token, "echo_async", &[]);
    wait_for_workers(&server, &token, "echo_async", 1).await;
    let mut client = client(&server).await;
    let payload = json!({"steps": 100, "delay_ms": 3_600_000});
    client.submit("r", "echo_async", payload).await;
    let mut log = Log::after(1);
    while log.last_type() != "started" {
        log.push(client.next().await);
    }
    client.send(json!({"type": "cancel", "request_id": "r", "reason": "enough"})).await;
    let log = client.follow(log).await;
    assert_eq!(log.events.last().unwrap()["reason"], "enough");
}

#[tokio::test]
async fn a_handler_that_ignores_cancellation_is_revoked() {
    let server = server(&["execution.cancellation_grace_period=100ms"]);
    let token = worker_token(&server);
    let mut worker =
        ScriptedWorker::connect(&server, &token, hello("w", 1, vec![declare("stubborn")])).await;
    wait_for_workers(&server, &token, "stubborn", 1).await;
    let mut client = client(&server).await;
    client.submit("r", "stubborn", json!({})).await;
    let task = worker.next_task().await;
    client.send(json!({"type": "cancel", "request_id": "r", "reason": "enough"})).await;
    let Ok(Message::Cancel(cancel)) = worker.next().await else { panic!("no cancel") };
    assert_eq!((cancel.reason.as_str(), cancel.grace_ms), ("enough", 100));
    worker.wait_for_end(&task).await;
    let log = client.follow(Log::after(1)).await;
    assert_eq!(log.last_type(), "cancelled");
    worker.report(&task, 0, result("1")).await;
    let Ok(Message::Revoke(revoke)) = worker.next().await else { panic!("no revoke") };
    assert!(revoke.reason.contains("has ended"), "{}", revoke.reason);
}

#[tokio::test]
async fn a_stopping_server_waits_for_sync_calls_in_workers() {
    let mut server = server(&[]);
    let token = worker_token(&server);
    let quick = Action { estimated_duration_ms: 1, ..declare("quick") };
    let mut worker = ScriptedWorker::connect(&server, &token, hello("w", 1, vec![quick])).await;
    wait_for_workers(&server, &token, "quick", 1).await;
    let api = Api::new(&server.url, &server.token("acme", "ann", &[])).unwrap();
    let calling = tokio::spawn(async move {
        let submit = SubmitRequest { action: "quick".into(), ..SubmitRequest::default() };
        api.router().submit(api.call(submit)).await
    });
    let task = worker.next_task().await;
    server.terminate();
    // The server is shutting down once it rejects new connections.
    let address = server.url.trim_start_matches("http://").to_owned();
    while TcpStream::connect(&address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    worker.report(&task, 0, result("1")).await;
    let reply = calling.await.unwrap().unwrap().into_inner();
    let Some(Outcome::Completed(completed)) = reply.outcome else { panic!("{reply:?}") };
    assert_eq!(completed.result, Some(json_payload("1")));
    assert_eq!(server.wait(), Some(0));
}

#[tokio::test]
async fn reports_resent_after_a_reconnect_are_stored_once() {
    let server = server(&[]);
    let token = worker_token(&server);
    let first = hello("w", 1, vec![declare("work")]);
    let mut worker = ScriptedWorker::connect(&server, &token, first.clone()).await;
    wait_for_workers(&server, &token, "work", 1).await;
    let mut client = client(&server).await;
    client.submit("r", "work", json!({})).await;
    let task = worker.next_task().await;
    worker.report(&task, 1, progress("one")).await;
    worker.report(&task, 2, progress("two")).await;
    loop {
        match worker.next().await.unwrap() {
            Message::Acknowledgment(reply) if reply.number == 2 => break,
            _ => {}
        }
    }
    let again = resume_hello(&first, &worker.welcome, &[&task]);
    drop(worker);
    let mut worker = ScriptedWorker::connect(&server, &token, again).await;
    assert_eq!(worker.welcome.resumed.len(), 1);
    assert_eq!((&worker.welcome.resumed[0].uid, worker.welcome.resumed[0].number), (&task.uid, 2));
    for (number, message) in [(1, "one"), (2, "two"), (3, "three")] {
        worker.report(&task, number, progress(message)).await;
    }
    worker.report(&task, 3, result("1")).await;
    assert_eq!(worker.wait_for_end(&task).await.number, 3);
    let log = client.follow(Log::after(1)).await;
    assert_eq!(kinds(&log), ["started", "progress", "progress", "progress", "complete"]);
}

#[tokio::test]
async fn an_attempt_that_a_reconnected_worker_does_not_resume_is_retried() {
    let server = server(&[]);
    let token = worker_token(&server);
    let first = hello("w", 1, vec![declare("work")]);
    let mut worker = ScriptedWorker::connect(&server, &token, first.clone()).await;
    wait_for_workers(&server, &token, "work", 1).await;
    let mut client = client(&server).await;
    client.submit("r", "work", json!({})).await;
    worker.next_task().await;
    drop(worker);
    let mut worker = ScriptedWorker::connect(&server, &token, first).await;
    let task = worker.next_task().await;
    assert_eq!(task.attempt, 2);
}

#[tokio::test]
async fn tasks_are_assigned_only_to_free_slots() {
    let server = server(&["execution.max_tenant_share_percent=100"]);
    let token = worker_token(&server);
    let mut worker =
        ScriptedWorker::connect(&server, &token, hello("w", 2, vec![declare("work")])).await;
    wait_for_workers(&server, &token, "work", 1).await;
    let mut client = client(&server).await;
    for id in ["a", "b", "c"] {
        let mut reply = client.request(json!({"id": id, "action": "work"})).await;
        while reply["type"] != "acknowledgment" {
            reply = client.next().await;
        }
    }
    let first = worker.next_task().await;
    let second = worker.next_task().await;
    worker.report(&first, 1, progress("x")).await;
    // The next message is the acknowledgment, not a third task.
    let Ok(Message::Acknowledgment(_)) = worker.next().await else { panic!("more than two tasks") };
    worker.report(&first, 1, result("1")).await;
    worker.wait_for_end(&first).await;
    let third = worker.next_task().await;
    // The first two tasks can start in either order.
    let mut names = [&*first.request_id, &*second.request_id];
    names.sort_unstable();
    assert_eq!((names, &*third.request_id), (["a", "b"], "c"));
    worker.send(work_request::Message::Capacity(Capacity { slots: 0 })).await;
    for task in [&second, &third] {
        worker.report(task, 0, result("1")).await;
        worker.wait_for_end(task).await;
    }
}

#[tokio::test]
async fn the_next_attempt_starts_from_the_checkpoint_and_a_released_attempt_does_not_count() {
    let server = server(&[]);
    let token = worker_token(&server);
    let action = Action { max_attempts: 2, initial_backoff_ms: 1, ..declare("work") };
    let mut worker = ScriptedWorker::connect(&server, &token, hello("w", 1, vec![action])).await;
    wait_for_workers(&server, &token, "work", 1).await;
    let mut client = client(&server).await;
    client.submit("r", "work", json!({})).await;
    let task = worker.next_task().await;
    assert_eq!(task.checkpoint, None);
    worker.report(&task, 0, Kind::Checkpoint("half".into())).await;
    let error = Error {
        code: ErrorCode::ProcessingFailed.into(),
        message: "failed".into(),
        retryable: true,
        details: None,
    };
    worker.report(&task, 0, Kind::Error(error)).await;
    let task = worker.next_task().await;
    assert_eq!((task.attempt, task.checkpoint.as_deref()), (2, Some(b"half".as_slice())));
    let release = Kind::Release(Release { reason: "moving".into() });
    worker.report(&task, 0, release).await;
    let task = worker.next_task().await;
    assert_eq!((task.attempt, task.checkpoint.as_deref()), (3, Some(b"half".as_slice())));
    worker.report(&task, 0, result("{\"n\":9223372036854775807}")).await;
    let log = client.follow(Log::after(1)).await;
    assert_eq!(log.count("retrying"), 2);
    assert_eq!(log.events.last().unwrap()["result"]["n"], 9_223_372_036_854_775_807_i64);
}

#[tokio::test]
async fn a_silent_handler_times_out_while_its_worker_is_alive() {
    let server = server(&[]);
    let token = worker_token(&server);
    let action = Action { heartbeat_timeout_ms: 300, max_attempts: 1, ..declare("work") };
    let mut worker = ScriptedWorker::connect(&server, &token, hello("w", 1, vec![action])).await;
    wait_for_workers(&server, &token, "work", 1).await;
    let mut client = client(&server).await;
    client.submit("r", "work", json!({})).await;
    let task = worker.next_task().await;
    worker.report(&task, 0, Kind::KeepAlive(KeepAlive {})).await;
    worker.wait_for_end(&task).await;
    let log = client.follow(Log::after(1)).await;
    let error = &log.events.last().unwrap()["error"];
    assert_eq!(error["code"], "TIMEOUT");
    assert!(error["message"].as_str().unwrap().contains("heartbeat timeout"), "{error}");
}

#[tokio::test]
async fn a_sync_action_runs_in_a_worker_and_fails_when_its_stream_ends() {
    let server = server(&[]);
    let token = worker_token(&server);
    let action = Action { sync: true, ..declare("quick") };
    let mut worker = ScriptedWorker::connect(&server, &token, hello("w", 4, vec![action])).await;
    wait_for_workers(&server, &token, "quick", 1).await;
    let mut client = client(&server).await;
    client.send(json!({"id": "r", "action": "quick", "payload": [1]})).await;
    let task = worker.next_task().await;
    assert!(task.sync);
    worker.report(&task, 0, result("\"done\"")).await;
    let reply = client.next().await;
    assert_eq!((&reply["type"], &reply["data"]), (&json!("response"), &json!("done")));
    worker.wait_for_end(&task).await;
    client.send(json!({"id": "s", "action": "quick"})).await;
    worker.next_task().await;
    drop(worker);
    let reply = client.next().await;
    assert_eq!((&reply["type"], &reply["request_id"]), (&json!("error"), &json!("s")));
    wait_for_workers(&server, &token, "quick", 0).await;
    let reply = client.request(json!({"id": "t", "action": "quick"})).await;
    assert_eq!(reply["error"]["code"], "UNAVAILABLE", "{reply}");
}

#[tokio::test]
async fn requests_are_queued_while_no_worker_is_connected() {
    let mut server = server(&[]);
    let token = worker_token(&server);
    let first = hello("w", 1, vec![Action { permission: "work:run".into(), ..declare("work") }]);
    drop(ScriptedWorker::connect(&server, &token, first.clone()).await);
    wait_for_workers(&server, &token, "work", 0).await;
    server.kill_and_restart();
    let mut forbidden = client(&server).await;
    let reply = forbidden.request(json!({"id": "x", "action": "work"})).await;
    assert_eq!(reply["error"]["code"], "FORBIDDEN", "the declaration is stored: {reply}");
    let permitted = server.token("acme", "ann", &["work:run"]);
    let mut client = Client::connect(&server.url, &permitted).await;
    let reply = client.submit("r", "work", json!({})).await;
    assert_eq!(reply["status"], "queued");
    assert_eq!(reply["queue_position"]["earliest"], 1);
    let mut worker = ScriptedWorker::connect(&server, &token, first).await;
    let task = worker.next_task().await;
    worker.report(&task, 0, result("1")).await;
    assert_eq!(client.follow(Log::after(1)).await.last_type(), "complete");
}

#[tokio::test]
async fn workers_of_a_tenant_do_not_affect_other_tenants() {
    let server = server(&[]);
    let other_token = server.token("other", "worker", &["worker:*"]);
    let declared = |permission: &str| Action { permission: permission.into(), ..declare("work") };
    let own_token = worker_token(&server);
    let mut own =
        ScriptedWorker::connect(&server, &own_token, hello("own", 1, vec![declared("work:run")]))
            .await;
    let _other =
        ScriptedWorker::connect(&server, &other_token, hello("other", 8, vec![declared("")])).await;
    wait_for_workers(&server, &other_token, "work", 1).await;
    wait_for_workers(&server, &own_token, "work", 1).await;
    let mut client = client(&server).await;
    let reply = client.request(json!({"id": "x", "action": "work"})).await;
    assert_eq!(reply["error"]["code"], "FORBIDDEN", "by the declaration of the tenant: {reply}");
    let permitted = server.token("acme", "ann", &["work:run"]);
    let mut client = Client::connect(&server.url, &permitted).await;
    client.submit("r", "work", json!({})).await;
    assert_eq!(own.next_task().await.tenant_id, "acme");
    let third = server.token("third", "cat", &[]);
    let mut client = Client::connect(&server.url, &third).await;
    let reply = client.request(json!({"id": "x", "action": "work"})).await;
    assert_eq!(reply["error"]["code"], "INVALID_ACTION", "{reply}");
}

#[tokio::test]
async fn a_worker_token_is_limited_to_its_permissions() {
    let server = server(&[]);
    for (permissions, code) in [
        (vec![], Code::PermissionDenied),
        (vec!["worker:other"], Code::PermissionDenied),
        (vec!["requests:read"], Code::PermissionDenied),
    ] {
        let token = server.token("acme", "worker", &permissions);
        let first = work_request::Message::Hello(hello("w", 1, vec![declare("work")]));
        let rejected = ScriptedWorker::try_connect(&server, &token, first).await.err().unwrap();
        assert_eq!(rejected.code(), code, "{permissions:?}");
        assert!(rejected.message().contains("worker:work"), "{}", rejected.message());
    }
    let first = work_request::Message::Hello(hello("w", 1, vec![declare("work")]));
    let rejected = ScriptedWorker::try_connect(&server, "", first).await.err().unwrap();
    assert_eq!(rejected.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn violations_in_the_first_message_are_reported() {
    let server = server(&[]);
    let token = worker_token(&server);
    let good = hello("w", 1, vec![declare("work")]);
    let with = |change: fn(&mut Hello)| {
        let mut hello = good.clone();
        change(&mut hello);
        work_request::Message::Hello(hello)
    };
    for (first, field) in [
        (work_request::Message::Capacity(Capacity { slots: 1 }), "message"),
        (with(|hello| hello.worker_id = "a b".into()), "hello.worker_id"),
        (with(|hello| hello.slots = -1), "hello.slots"),
        (with(|hello| hello.slots = 10_001), "hello.slots"),
        (with(|hello| hello.actions.clear()), "hello.actions"),
        (with(|hello| hello.actions.push(declare("work"))), "hello.actions[1].name"),
        (with(|hello| hello.actions[0].name = "Work".into()), "hello.actions[0].name"),
        (with(|hello| hello.actions[0].name = "echo".into()), "hello.actions[0].name"),
        (
            with(|hello| hello.actions[0].payload_schema = "{\"type\":7}".into()),
            "hello.actions[0].payload_schema",
        ),
        (with(|hello| hello.actions[0].max_attempts = -1), "hello.actions[0].max_attempts"),
        (with(|hello| hello.version = "x".repeat(129)), "hello.version"),
    ] {
        let rejected = ScriptedWorker::try_connect(&server, &token, first).await.err().unwrap();
        assert_eq!(rejected.code(), Code::InvalidArgument, "{field}: {}", rejected.message());
        assert!(rejected.message().starts_with(&format!("{field}:")), "{}", rejected.message());
    }
}

#[tokio::test]
async fn an_invalid_report_ends_the_stream_but_not_the_attempt() {
    let server = server(&["limits.max_output_chunk_bytes=1024"]);
    let token = worker_token(&server);
    let first = hello("w", 1, vec![declare("work")]);
    let mut worker = ScriptedWorker::connect(&server, &token, first.clone()).await;
    wait_for_workers(&server, &token, "work", 1).await;
    let mut client = client(&server).await;
    client.submit("r", "work", json!({})).await;
    let task = worker.next_task().await;
    let large = streamer_proto::common::v1::Payload {
        content_type: "text/plain".into(),
        body: Some(streamer_proto::common::v1::payload::Body::Data("x".repeat(1025).into())),
    };
    for (number, kind, field) in [
        (2, progress("gap"), "report.number"),
        (1, result("1"), "report.number"),
        (1, Kind::Output(large), "report.output"),
    ] {
        worker.report(&task, number, kind).await;
        let ended = loop {
            if let Err(status) = worker.next().await {
                break status;
            }
        };
        assert_eq!(ended.code(), Code::InvalidArgument, "{}", ended.message());
        assert!(ended.message().starts_with(field), "{}", ended.message());
        let again = resume_hello(&first, &worker.welcome, &[&task]);
        worker = ScriptedWorker::connect(&server, &token, again).await;
        assert_eq!(worker.welcome.resumed.len(), 1, "the attempt continues");
    }
    worker.report(&task, 0, result("not JSON")).await;
    worker.wait_for_end(&task).await;
    let log = client.follow(Log::after(1)).await;
    let error = &log.events.last().unwrap()["error"];
    assert!(error["message"].as_str().unwrap().starts_with("result: is not JSON"), "{error}");
}

#[tokio::test]
async fn a_newer_stream_of_a_worker_replaces_the_older_one() {
    let server = server(&[]);
    let token = worker_token(&server);
    let first = hello("w", 1, vec![declare("work")]);
    let mut old = ScriptedWorker::connect(&server, &token, first.clone()).await;
    let _new = ScriptedWorker::connect(&server, &token, first).await;
    let ended = old.next().await.err().unwrap();
    assert_eq!(ended.code(), Code::AlreadyExists, "{ended:?}");
}

#[tokio::test]
async fn an_attempt_continues_when_the_server_drains_and_restarts() {
    // The lease does not expire before the worker reconnects.
    let mut server = server(&["execution.lease_duration=120000ms"]);
    let token = worker_token(&server);
    let _worker = WorkerProcess::start(&server, &token, "echo_async", &[]);
    wait_for_workers(&server, &token, "echo_async", 1).await;
    let mut before = client(&server).await;
    before.submit("r", "echo_async", json!({"steps": 60, "delay_ms": 20})).await;
    let mut log = Log::after(1);
    while log.count("progress") < 3 {
        log.push(before.next().await);
    }
    drop(before);
    assert_eq!(server.stop(), Some(0));
    server.restart();
    let mut after = client(&server).await;
    let seen = log.last_seq();
    after.send(json!({"type": "subscribe", "request_id": "r", "after_seq": seen})).await;
    let log = after.follow(log).await;
    assert_eq!((log.count("started"), log.count("progress")), (1, 60), "{:?}", kinds(&log));
    let value: &Value = log.events.last().unwrap();
    assert_eq!(value["type"], "complete");
}

#[tokio::test]
async fn declarations_of_one_tenant_are_bounded_and_do_not_affect_others() {
    let mut server =
        server(&["limits.max_payload_bytes=1024", "limits.max_output_chunk_bytes=1024"]);
    let token = worker_token(&server);
    let _own =
        ScriptedWorker::connect(&server, &token, hello("own", 1, vec![declare("work")])).await;
    let other_token = server.token("other", "worker", &["worker:*"]);
    let schema = format!("{{\"description\":\"{}\"}}", "x".repeat(200 * 1024));
    let large = |name: String| Action { payload_schema: schema.clone(), ..declare(&name) };
    let mut rejected = None;
    for number in 0..8 {
        let actions = vec![large(format!("large-{number}"))];
        let first = work_request::Message::Hello(hello(&format!("w{number}"), 1, actions));
        if let Err(status) = ScriptedWorker::try_connect(&server, &other_token, first).await {
            rejected = Some(status);
            break;
        }
    }
    let rejected = rejected.expect("1 MiB is the limit");
    assert_eq!(rejected.code(), Code::ResourceExhausted);
    assert!(rejected.message().contains("\"other\""), "{}", rejected.message());
    // The list exceeds the payload limit, and is also available after a restart.
    wait_for_workers(&server, &other_token, "large-0", 0).await;
    wait_for_workers(&server, &token, "work", 1).await;
    server.kill_and_restart();
    let mut client = client(&server).await;
    client.submit("r", "work", json!({})).await;
}

#[tokio::test]
async fn a_task_can_contain_the_largest_payload_and_the_largest_checkpoint() {
    let server = server(&["limits.max_payload_bytes=65536"]);
    let token = worker_token(&server);
    let action = Action { initial_backoff_ms: 1, max_attempts: 2, ..declare("work") };
    let mut worker = ScriptedWorker::connect(&server, &token, hello("w", 1, vec![action])).await;
    wait_for_workers(&server, &token, "work", 1).await;
    let mut client = client(&server).await;
    client.submit("r", "work", json!({"text": "x".repeat(65_000)})).await;
    let task = worker.next_task().await;
    worker.report(&task, 0, Kind::Checkpoint(vec![b'c'; 256 * 1024].into())).await;
    let error = Error { retryable: true, code: ErrorCode::Timeout.into(), ..Error::default() };
    worker.report(&task, 0, Kind::Error(error)).await;
    let task = worker.next_task().await;
    assert_eq!((task.attempt, task.checkpoint.map(|data| data.len())), (2, Some(256 * 1024)));
}
