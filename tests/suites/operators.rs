//! Permissions of operators, and the audit log.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, Read, Write},
    net::TcpStream,
    time::Duration,
};

use prost::Message;
use prost_types::FileDescriptorSet;
use serde_json::{Value, json};
use streamer_client::Api;
use streamer_proto::{
    common::v1::{Action, Error, ErrorCode},
    connections::v1::{BroadcastRequest, SendRequest, send_request::Target},
    declared_methods,
    longrunning::{DeleteOperationRequest, operations_client::OperationsClient},
    processor::v1::{Task, report::Kind, work_request},
    router::v1::{CancelRequest, GetRequest, ListRequest, SubmitRequest},
};
use streamer_rpc::json_payload;
use streamer_tests::{
    Client, Log, LoopbackAddress, Process, ScriptedWorker, Server, declare, hello, metrics, sum,
    wait_for_workers, within_timeout,
};
use tonic::Code;

/// Starts a server with an audit log in its data folder.
fn audited_server() -> Server {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("audit.jsonl");
    Server::start_in(
        data,
        &[&format!("audit.file={}", file.display()), "server.drain_timeout=500ms"],
    )
}

/// Stops the server; returns the records of its audit log without timestamps.
fn records(mut server: Server) -> Vec<Value> {
    assert_eq!(server.stop(), Some(0));
    let text = fs::read_to_string(server.data().join("audit.jsonl")).unwrap();
    let records = text.lines().map(|line| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        let time = record.as_object_mut().unwrap().remove("time");
        assert!(time.is_some_and(|time| time.as_str().unwrap().ends_with('Z')), "{line}");
        record
    });
    records.collect()
}

fn api(server: &Server, tenant: &str, user: &str, permissions: &[&str]) -> Api {
    Api::new(&server.url, &server.token(tenant, user, permissions)).unwrap()
}

/// Returns the status and the body of the response to a plain HTTP request.
fn get(address: &str, path: &str, token: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{token}\r\n");
    let reply = String::from_utf8(exchange(address, &request)).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Sends an HTTP request; returns all bytes until the server closes the connection.
fn exchange(address: &str, request: &str) -> Vec<u8> {
    let mut socket = TcpStream::connect(address.trim_start_matches("http://")).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    let mut reply = Vec::new();
    socket.read_to_end(&mut reply).unwrap();
    reply
}

#[tokio::test]
async fn only_an_operator_can_list_the_requests_of_other_tenants() {
    let server = audited_server();
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.submit("r", "echo_async", json!({})).await;
    let of_acme = || ListRequest { tenant_id: "acme".into(), ..ListRequest::default() };
    for (tenant, permissions) in
        [("acme", vec!["*"]), ("evil", vec!["*"]), ("evil", vec!["operator:*", "requests:*"])]
    {
        let other = api(&server, tenant, "eve", &permissions);
        let rejected = other.router().list(other.call(of_acme())).await.unwrap_err();
        assert_eq!(rejected.code(), Code::PermissionDenied);
        assert_eq!(rejected.message(), "permission operator is required");
    }
    let operator = api(&server, "ops", "olga", &["operator"]);
    let page = operator.router().list(operator.call(of_acme())).await.unwrap().into_inner();
    let [request] = &page.requests[..] else { panic!("{page:?}") };
    assert_eq!(
        (&*request.tenant_id, &*request.user_id, &*request.request_id),
        ("acme", "ann", "r")
    );
    // Other actions are not permitted.
    let cancel = CancelRequest { request_id: request.uid.clone(), reason: String::new() };
    let rejected = operator.router().cancel(operator.call(cancel)).await.unwrap_err();
    assert_eq!(rejected.code(), Code::NotFound);
    let records = records(server);
    let list = "/streamer.router.v1.RouterService/List";
    let rejected = json!({
        "call": list, "outcome": "PERMISSION_DENIED", "reason": "permission operator is required",
        "tenant": "evil", "user": "eve", "from": "127.0.0.1",
    });
    assert_eq!(records[1]["from"].as_str().unwrap().split('.').next(), Some("127"));
    let mut second = records[1].clone();
    second["from"] = json!("127.0.0.1");
    assert_eq!(second, rejected);
    let audited: Vec<_> = records[3..]
        .iter()
        .map(|record| {
            ["call", "outcome", "tenant", "subject"]
                .map(|name| record[name].as_str().unwrap().to_owned())
        })
        .collect();
    assert_eq!(
        audited,
        [
            [list, "OK", "ops", "acme"],
            ["/streamer.router.v1.RouterService/Cancel", "NOT_FOUND", "ops", &request.uid],
        ]
    );
}

#[tokio::test]
async fn the_audit_log_records_caller_action_owner_and_address() {
    let server = audited_server();
    let mut ann = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    ann.submit("r", "echo_async", json!({ "secret": "payload", "delay_ms": 60_000, "steps": 9 }))
        .await;
    let bob = api(&server, "acme", "bob", &["requests:write", "requests:read", "connections:*"]);
    // A user without the permissions to write and to send.
    let eve = api(&server, "acme", "eve", &["requests:read"]);
    let uid = {
        let list = bob.router().list(bob.call(ListRequest::default())).await.unwrap();
        list.into_inner().requests[0].uid.clone()
    };
    let cancel = || CancelRequest { request_id: uid.clone(), reason: "for a secret reason".into() };
    assert!(eve.router().cancel(eve.call(cancel())).await.is_err());
    bob.router().cancel(bob.call(cancel())).await.unwrap();
    ann.send(json!({ "type": "cancel", "request_id": "r" })).await;
    while ann.next().await["type"] != "acknowledgment" {}
    let send = SendRequest {
        target: Some(Target::UserId("ann".into())),
        topic: "t".into(),
        data: Some(json_payload("1")),
    };
    bob.connections().send(bob.call(send)).await.unwrap();
    let broadcast = BroadcastRequest { topic: "t".into(), data: Some(json_payload("1")) };
    assert!(eve.connections().broadcast(eve.call(broadcast)).await.is_err());
    let endpoint = tonic::transport::Endpoint::new(server.url.clone()).unwrap();
    let mut operations = OperationsClient::new(endpoint.connect().await.unwrap());
    let delete = DeleteOperationRequest { name: "operations/missing".into() };
    assert!(operations.delete_operation(bob.call(delete)).await.is_err());
    let unauthenticated = Api::new(&server.url, "no.real.token").unwrap();
    assert!(
        unauthenticated.router().list(unauthenticated.call(ListRequest::default())).await.is_err()
    );
    assert!(Client::try_connect(&server.url, "no.real.token").await.is_err());
    drop(ann);
    let records = records(server);
    let text = format!("{records:?}");
    for hidden in ["payload", "secret", "no.real"] {
        assert!(!text.contains(hidden), "{hidden}: {text}");
    }
    let audited: Vec<_> = records
        .iter()
        .map(|record| {
            assert!(record["from"].as_str().unwrap().starts_with("127."), "{record}");
            let call = record["call"].as_str().unwrap().rsplit('/').next().unwrap();
            let text = |name: &str| record[name].as_str().unwrap_or("-");
            [call, text("outcome"), text("user"), text("subject"), text("owner")].join(" ")
        })
        .collect();
    assert_eq!(
        audited,
        [
            format!("Cancel PERMISSION_DENIED eve {uid} ann"),
            format!("Cancel OK bob {uid} ann"),
            "Cancel OK ann r ann".into(),
            "Send OK bob ann -".into(),
            "Broadcast PERMISSION_DENIED eve - -".into(),
            "DeleteOperation NOT_FOUND bob missing -".into(),
            "List UNAUTHENTICATED - - -".into(),
            "ws UNAUTHENTICATED - - -".into(),
        ]
    );
}

#[tokio::test]
async fn the_server_does_not_start_if_the_audit_log_cannot_be_opened() {
    let data = tempfile::tempdir().unwrap();
    let output = Process::command(streamer_tests::binary())
        .args(["up", "--listen", "127.0.0.1:0", "--set", "audit.file=/does/not/exist", "--data"])
        .arg(data.path())
        .env_clear()
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.starts_with("error: audit.file: cannot open /does/not/exist"), "{error}");
}

#[tokio::test]
async fn metrics_can_use_a_separate_address_and_require_an_operator() {
    let claim = LoopbackAddress::claim();
    let separate = claim.next().to_string();
    let server = Server::start(&[
        &format!("server.metrics_listen={separate}"),
        "server.metrics_require_operator=true",
    ]);
    assert_eq!(get(&server.url, "/metrics", "").0, 404);
    assert_eq!(get(&separate, "/healthz", "").0, 404);
    let bearer = |token: String| format!("Authorization: Bearer {token}\r\n");
    let (status, body) = get(&separate, "/metrics", "");
    assert_eq!((status, body.contains("token")), (401, true), "{body}");
    let (status, body) = get(&separate, "/metrics", &bearer(server.token("acme", "ann", &["*"])));
    assert_eq!((status, &*body), (403, "permission operator is required\n"));
    let (status, body) =
        get(&separate, "/metrics", &bearer(server.token("ops", "olga", &["operator"])));
    assert_eq!((status, body.contains("process_cpu_seconds_total")), (200, true));
}

/// Returns type and meaning of each metric in `docs/metrics.md`, by name.
fn documented_metrics() -> BTreeMap<String, (String, String)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let text = fs::read_to_string(path).unwrap();
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let cells = rows.map(|row| row.trim_end_matches(" |").split(" | ").collect::<Vec<_>>());
    let metrics = cells.map(|cells| {
        let name = cells[0].trim_end_matches('`');
        (name.to_owned(), (cells[1].to_owned(), cells[3].to_owned()))
    });
    metrics.collect()
}

#[tokio::test]
async fn the_metrics_of_a_server_are_those_in_the_reference() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.submit("a", "echo_async", json!({ "steps": 1 })).await;
    let (_, text) = get(&server.url, "/metrics", "");
    let documented = documented_metrics();
    let mut types = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            types.insert(name, kind);
        }
    }
    assert!(types.len() > 40, "{text}");
    for line in text.lines() {
        let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|l| l.split_once(' '))
        else {
            continue;
        };
        let (kind, meaning) = documented.get(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!((&**kind, &**meaning), (types[name], help.trim_end_matches('.')), "{name}");
    }
    let open_metrics = "Accept: application/openmetrics-text;version=1.0.0\r\n";
    assert!(get(&server.url, "/metrics", open_metrics).1.ends_with("# EOF\n"));
    // Series with labels of clients would grow without limit.
    assert!(!text.contains("acme"), "{text}");
}

#[tokio::test]
async fn store_operations_are_measured_and_sampled_traces_are_exemplars() {
    // Spans are recorded, although no collector receives them.
    let server = Server::start(&["trace.endpoint=http://127.0.0.1:9", "trace.sample_ratio=1"]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.submit("a", "echo_async", json!({ "steps": 1 })).await;
    client.follow(Log::after(1)).await;
    // The attempt is measured after its last event was delivered.
    let text = loop {
        let text = metrics(&server.url).await;
        if sum(&text, "streamer_processor_attempts_total{}") == 1 {
            break text;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    for series in [
        "streamer_store_operations_total{operation=\"create_request\",outcome=\"ok\"} 1",
        "streamer_store_operations_total{operation=\"claim\",outcome=\"ok\"} 1",
        "streamer_store_operation_duration_seconds_count{operation=\"create_request\"} 1",
        "streamer_router_submit_duration_seconds_count 1",
    ] {
        assert!(text.lines().any(|line| line == series), "{series} is missing in {text}");
    }
    assert!(!text.contains("trace_id"), "{text}");
    let open_metrics = "Accept: application/openmetrics-text;version=1.0.0\r\n";
    let (_, text) = get(&server.url, "/metrics", open_metrics);
    for histogram in [
        "streamer_router_submit_duration_seconds",
        "streamer_processor_attempt_duration_seconds",
        "streamer_processor_report_duration_seconds",
        "streamer_gateway_delivery_duration_seconds",
        "streamer_rpc_duration_seconds",
    ] {
        let bucket = format!("{histogram}_bucket");
        let mut buckets = text.lines().filter(|line| line.starts_with(&bucket));
        let has_exemplar = buckets.any(|line| line.contains(" # {trace_id=\""));
        assert!(has_exemplar, "{histogram} has no exemplar in {text}");
    }
}

/// Returns the metrics once the sum of the given series has reached `count`: calls end before they are counted.
async fn metrics_with(server: &Server, series: &str, count: usize) -> String {
    let counted = async {
        loop {
            let text = metrics(&server.url).await;
            if sum(&text, series) >= count {
                return text;
            }
        }
    };
    within_timeout(series, counted).await
}

#[track_caller]
fn assert_sums(text: &str, expected: &[(&str, usize)]) {
    for (series, count) in expected {
        assert_eq!(sum(text, series), *count, "{series} in {text}");
    }
}

#[tokio::test]
async fn each_sync_request_is_counted_once() {
    let server = Server::start(&["execution.max_tenant_share_percent=100"]);
    let quick = Action { sync: true, max_concurrency: 1, ..declare("quick") };
    let mut worker = connect_worker(&server, "worker:*@*", quick).await;
    let ann = api(&server, "acme", "ann", &[]);
    let submit = || {
        let request = SubmitRequest { action: "quick".into(), ..SubmitRequest::default() };
        let (mut router, call) = (ann.router(), ann.call(request));
        tokio::spawn(async move { router.submit(call).await })
    };
    let succeeded = submit();
    let task = worker.next_task().await;
    let rejected = submit().await.unwrap().unwrap_err();
    assert_eq!(rejected.code(), Code::ResourceExhausted, "{rejected}");
    worker.report(&task, 0, Kind::Result(json_payload("1"))).await;
    succeeded.await.unwrap().unwrap();
    let failed = submit();
    let task = worker.next_task().await;
    fail(&worker, &task, "no", false).await;
    failed.await.unwrap().unwrap_err();
    let dropped = submit();
    worker.next_task().await;
    dropped.abort();
    let text =
        metrics_with(&server, "streamer_router_requests_total{result=\"cancelled\"}", 1).await;
    assert_sums(
        &text,
        &[
            ("streamer_router_requests_total{mode=\"sync\",result=\"accepted\"}", 2),
            ("streamer_router_requests_total{mode=\"sync\",result=\"cancelled\"}", 1),
            ("streamer_router_requests_total{}", 3),
            ("streamer_router_rejections_total{reason=\"RATE_LIMITED\"}", 1),
            ("streamer_router_rejections_total{}", 1),
            ("streamer_processor_sync_requests_total{outcome=\"succeeded\"}", 1),
            ("streamer_processor_sync_requests_total{outcome=\"failed\"}", 1),
            ("streamer_processor_sync_requests_total{outcome=\"rejected\"}", 1),
            ("streamer_processor_sync_requests_total{outcome=\"cancelled\"}", 1),
            // The rejected call did not run.
            ("streamer_processor_sync_duration_seconds_count{}", 3),
        ],
    );
}

#[tokio::test]
async fn each_submission_is_counted_once() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.submit("a", "echo_async", json!({ "steps": 1 })).await;
    client.follow(Log::after(1)).await;
    let duplicate = client.submit("a", "echo_async", json!({ "steps": 1 })).await;
    assert_eq!(duplicate["duplicate"], true, "{duplicate}");
    // A connection without events.
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    for (id, action, payload, code) in [
        ("a", "echo_async", json!({ "steps": 2 }), "CONFLICT"),
        ("b", "missing", json!({}), "INVALID_ACTION"),
        ("c", "echo_async", json!({ "steps": "x" }), "VALIDATION_ERROR"),
    ] {
        let message = json!({ "id": id, "action": action, "payload": payload });
        let rejected = client.request(message).await;
        assert_eq!(rejected["error"]["code"], code, "{rejected}");
    }
    assert_sums(
        &metrics(&server.url).await,
        &[
            ("streamer_router_requests_total{mode=\"async\",result=\"accepted\"}", 1),
            ("streamer_router_requests_total{mode=\"async\",result=\"duplicate\"}", 1),
            ("streamer_router_requests_total{}", 2),
            ("streamer_router_rejections_total{reason=\"CONFLICT\"}", 1),
            ("streamer_router_rejections_total{reason=\"INVALID_ACTION\"}", 1),
            ("streamer_router_rejections_total{reason=\"VALIDATION_ERROR\"}", 1),
            ("streamer_router_rejections_total{}", 3),
        ],
    );
}

#[tokio::test]
async fn health_checks_and_reflection_are_counted_by_method() {
    let server = Server::start(&[]);
    let endpoint = tonic::transport::Endpoint::new(server.url.clone()).unwrap();
    let channel = endpoint.connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let check = tonic_health::pb::HealthCheckRequest::default;
    health.check(check()).await.unwrap();
    drop(health.watch(check()).await.unwrap());
    let text = metrics(&server.url).await;
    let calls = |method: &str| format!("streamer_rpc_calls_total{{method=\"{method}\"}}");
    assert_sums(
        &text,
        &[
            (&calls("grpc.health.v1.Health/Check"), 1),
            (&calls("grpc.health.v1.Health/Watch"), 1),
            (&calls("_other"), 0),
        ],
    );
}

#[test]
fn methods_of_external_services_are_declared() {
    let declared: BTreeSet<_> = declared_methods().collect();
    for set in [
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ] {
        for file in FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    assert!(declared.contains(&*path), "{path}");
                }
            }
        }
    }
}

/// Connects a worker of the tenant `acme` that has one action.
async fn connect_worker(server: &Server, permission: &str, action: Action) -> ScriptedWorker {
    let token = server.token("acme", "worker", &[permission]);
    let name = action.name.clone();
    let worker = ScriptedWorker::connect(server, &token, hello("w", 4, vec![action])).await;
    wait_for_workers(server, &token, &name, 1).await;
    worker
}

async fn fail(worker: &ScriptedWorker, task: &Task, message: &str, retryable: bool) {
    let code = ErrorCode::ProcessingFailed.into();
    let error = Error { code, message: message.into(), retryable, details: None };
    worker.report(task, 0, Kind::Error(error)).await;
}

#[tokio::test]
async fn actions_of_one_tenant_have_a_label_only_if_the_operator_allows_it() {
    for (settings, permission, label) in [
        (&[][..], "worker:*", "_other"),
        (&["server.metrics_tenant_actions=true"][..], "worker:*", "project_x"),
        (&[][..], "worker:*@*", "project_x"),
    ] {
        let server = Server::start(settings);
        let mut worker = connect_worker(&server, permission, declare("project_x")).await;
        let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
        client.submit("a", "project_x", json!({})).await;
        let task = worker.next_task().await;
        worker.report(&task, 0, Kind::Result(json_payload("1"))).await;
        client.follow(Log::after(1)).await;
        client.submit("b", "echo_async", json!({ "steps": 1 })).await;
        let text = metrics_with(&server, "streamer_processor_attempts_total{}", 2).await;
        for label in [label, "echo_async"] {
            for series in [
                "streamer_router_requests_total",
                "streamer_processor_attempts_total",
                "streamer_processor_attempt_duration_seconds_count",
                "streamer_processor_queue_wait_seconds_count",
            ] {
                assert_sums(&text, &[(&format!("{series}{{action=\"{label}\"}}"), 1)]);
            }
        }
        assert_eq!(text.contains("project_x"), label == "project_x", "{text}");
    }
}

#[tokio::test]
async fn text_of_handlers_and_workers_is_logged_at_level_debug_and_bounded() {
    for (level, expected) in [("info", 0..=0), ("debug", 1..=256)] {
        let filter = format!("log.filter=streamer_processor={level}");
        let settings = [&filter, "log.format=json", "server.drain_timeout=500ms"];
        let (mut server, log) = Server::start_logged(&settings);
        let mut worker = connect_worker(&server, "worker:*", declare("work")).await;
        let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
        client.submit("a", "work", json!({})).await;
        let task = worker.next_task().await;
        fail(&worker, &task, &"é".repeat(2000), false).await;
        worker.wait_for_end(&task).await;
        worker.send(work_request::Message::Hello(hello("w", 1, Vec::new()))).await;
        while worker.next().await.is_ok() {}
        assert_eq!(server.stop(), Some(0));
        let records: Vec<Value> =
            log.lines().filter_map(|line| serde_json::from_str(&line.unwrap()).ok()).collect();
        let find = |message: &str| {
            let found = records.iter().find(|record| record["message"] == message);
            found.unwrap_or_else(|| panic!("no line {message} in {records:#?}"))
        };
        let lengths = records.iter().map(|record| record.to_string().matches('é').count() * 2);
        let longest = lengths.max().unwrap();
        assert!(expected.contains(&longest), "{longest} bytes at level {level}");
        let failed = find("request failed");
        assert_eq!(failed["code"], "PROCESSING_FAILED", "{failed}");
        assert!(failed["duration_ms"].is_number(), "{failed}");
        let disconnected = find("worker disconnected");
        assert_eq!(disconnected["code"], "INVALID_ARGUMENT", "{disconnected}");
    }
}

#[tokio::test]
async fn metrics_are_written_for_cloudwatch() {
    let (mut server, lines) = Server::start_printing(&["cloudwatch.interval=1s"]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.submit("a", "echo_async", json!({ "steps": 1, "fail_attempts": 1 })).await;
    client.follow(Log::after(1)).await;
    client.send_text("not JSON").await;
    assert_eq!(client.next().await["type"], "error");
    drop(client);
    assert_eq!(server.stop(), Some(0));
    let mut totals = BTreeMap::new();
    let lines = lines.lines().map(Result::unwrap);
    for line in lines.filter(|line| line.starts_with('{')) {
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["Service"], "streamer");
        let directive = &line["_aws"]["CloudWatchMetrics"][0];
        assert_eq!(directive["Namespace"], "Streamer");
        for metric in directive["Metrics"].as_array().unwrap() {
            let name = metric["Name"].as_str().unwrap();
            let value = &line[name];
            let count = value["Count"].as_f64().or_else(|| value.as_f64()).unwrap();
            *totals.entry(name.to_owned()).or_insert(0.0) += count;
        }
    }
    // Throttles are a metric of engine `dynamodb`.
    for (name, count) in [
        ("FailedAttempts", 1.0),
        ("FailedMessages", 1.0),
        ("SubmitLatency", 1.0),
        ("StoreErrors", 0.0),
    ] {
        assert_eq!(totals.get(name), Some(&count), "{name} in {totals:?}");
    }
    for name in ["AuthenticationFailures", "DeliveryLatency", "QueueAge"] {
        assert!(totals.contains_key(name), "{name} in {totals:?}");
    }
}

#[tokio::test]
async fn the_access_log_has_requests_and_connections_without_tokens() {
    let settings = ["gateway.access_log=true", "log.format=json", "server.drain_timeout=500ms"];
    let (mut server, log) = Server::start_logged(&settings);
    let token = server.token("acme", "ann", &[]);
    let client = Client::connect(&server.url, &token).await;
    drop(client);
    assert_eq!(get(&server.url, &format!("/healthz?token={token}"), "").0, 200);
    let long = "X".repeat(3000);
    exchange(
        &server.url,
        &format!("{long} /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    );
    let upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13";
    let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    let request = format!(
        "GET /ws HTTP/1.1\r\nHost: a\r\n{upgrade}\r\n{key}\r\nOrigin: https://{long}\r\n\r\n"
    );
    exchange(&server.url, &request);
    let ann = api(&server, "acme", "ann", &[]);
    let missing = ann.call(GetRequest { request_id: "missing".into(), ..GetRequest::default() });
    assert_eq!(ann.router().get(missing).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(server.stop(), Some(0));
    let lines: Vec<String> = log.lines().map(Result::unwrap).collect();
    let records: Vec<Value> =
        lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert!(lines.iter().all(|line| !line.contains(&token)), "{lines:?}");
    let find = |message: &str, field: &str, value: Value| {
        let found = records.iter().find(|record| {
            record["target"] == "streamer::access"
                && record["message"] == message
                && record[field] == value
        });
        found.unwrap_or_else(|| panic!("no line {message} with {field} {value} in {records:#?}"))
    };
    let opened = find("connection opened", "user_id", json!("ann"));
    assert_eq!(opened["tenant_id"], "acme");
    let closed = find("connection closed", "connection_id", opened["connection_id"].clone());
    assert!(closed["duration_ms"].is_number(), "{closed}");
    let rejected = find("connection rejected", "code", json!(4403));
    for text in [&rejected["reason"], &find("request", "status", json!(405))["method"]] {
        let length = text.as_str().unwrap().len();
        assert!((200..=256).contains(&length), "{length} bytes");
    }
    let health = find("request", "path", json!("/healthz"));
    assert_eq!((&health["status"], &health["method"]), (&json!(200), &json!("GET")));
    let call = find("request", "path", json!("/streamer.router.v1.RouterService/Get"));
    assert_eq!((&call["status"], &call["code"]), (&json!(200), &json!("NOT_FOUND")));
    assert!(call["client"].as_str().unwrap().starts_with("127."), "{call}");
}

#[tokio::test]
async fn promtool_accepts_the_metrics_of_a_server() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.submit("a", "echo_async", json!({ "steps": 1 })).await;
    let (_, text) = get(&server.url, "/metrics", "");
    let promtool = std::env::var("STREAMER_TESTS_PROMTOOL").expect("set by tests/run");
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let mut command = Process::command("sh");
    command.args(["-c", "exec \"$0\" check metrics <\"$1\"", &promtool]).arg(file.path());
    let checked = Process::output(&mut command);
    let findings = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(checked.status.success() && findings.is_empty(), "{findings}");
}

#[test]
fn alerts_and_dashboard_use_documented_metrics_and_alerts_have_a_runbook() {
    let read = |file: &str| {
        fs::read_to_string(format!(concat!(env!("CARGO_MANIFEST_DIR"), "/../{}"), file)).unwrap()
    };
    let documented = documented_metrics();
    let name = regex::Regex::new(r"\b(?:streamer|process)_[a-z_]+").unwrap();
    let alerts = read("deploy/prometheus/alerts.yaml");
    let cloudwatch =
        read("services/streamer/src/server/cloudwatch.rs").replace("use streamer_", "");
    let dashboard = read("deploy/grafana/streamer.json");
    for text in [&alerts, &dashboard, &read("docs/operations.md"), &cloudwatch] {
        let names: BTreeSet<_> = name.find_iter(text).map(|found| found.as_str()).collect();
        assert!(names.len() > 5, "{names:?}");
        for name in names {
            let family = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(documented.contains_key(family), "{name} is not in docs/metrics.md");
        }
    }
    let operations = read("docs/operations.md");
    let alerts: Vec<_> = alerts.lines().filter_map(|line| line.split_once("alert: ")).collect();
    assert!(alerts.len() > 10);
    for (_, alert) in alerts {
        assert!(operations.contains(&format!("\n### {alert}\n")), "{alert} has no runbook");
    }
}

/// Metrics that a server registers only with other settings, or exports only after an event, are found in the sources.
#[test]
fn metrics_in_the_sources_are_those_in_the_reference() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let mut command = Process::command("git");
    command.args(["ls-files", "gateway/src/*.rs", "services/*.rs", "crates/*.rs"]);
    let listed = Process::output(command.current_dir(root));
    let name = regex::Regex::new(r#""((?:streamer|process)_[a-z_]+)"[,;)]?\s"#).unwrap();
    let mut found = BTreeSet::new();
    for file in String::from_utf8(listed.stdout).unwrap().lines() {
        let text = fs::read_to_string(format!("{root}/{file}")).unwrap();
        if text.contains("Metrics") && !file.contains("/bench/") && !file.contains("/cloudwatch") {
            found.extend(name.captures_iter(&text).map(|captures| captures[1].to_owned()));
        }
    }
    found.remove("process_data");
    let documented = documented_metrics().into_iter().map(|(name, (kind, _))| {
        // The registry adds the suffix.
        if kind == "counter" { name.trim_end_matches("_total").to_owned() } else { name }
    });
    assert_eq!(found, documented.collect::<BTreeSet<_>>());
}

#[tokio::test]
async fn a_service_token_is_rejected_with_an_explanation_by_a_single_process() {
    let server = Server::start(&[]);
    let api = api(&server, "acme", "ann", &[]);
    let mut call = api.call(ListRequest::default());
    call.metadata_mut().insert("streamer-service-token", "0".repeat(64).parse().unwrap());
    let rejected = api.router().list(call).await.unwrap_err();
    assert_eq!(rejected.code(), Code::Unauthenticated);
    assert!(rejected.message().contains("all services in one process"), "{rejected}");
}
