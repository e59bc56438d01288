//! Traces that real processes export to a collector.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    collections::BTreeSet,
    io::{BufRead, Write},
    path::Path,
    process::Stdio,
};

use serde_json::{Value, json};
use streamer_client::Api;
use streamer_core::hex;
use streamer_proto::{processor::v1::report::Kind, router::v1::GetRequest};
use streamer_rpc::json_payload;
use streamer_tests::{
    Client, Cluster, Log, Process, ScriptedWorker, Server,
    collector::{Behavior, Collector, Span, dangling, tree},
    declare,
    dynamodb::{self, Implementation, endpoint},
    dynamodb_settings, hello, metrics, tool, wait_for_action,
};
use tonic::Code;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
/// Text that must appear only in payloads, metadata, results and errors.
const SECRET: &str = "never-exported";

/// Submits a request whose first attempt fails; returns once it has succeeded.
async fn submit(client: &mut Client, id: &str) -> Value {
    let payload = json!({
        "steps": 4, "fail_attempts": 1, "output_chunks": 2, "delay_ms": 1, "result": SECRET,
    });
    let request = json!({
        "id": id, "action": "echo_async", "payload": payload, "metadata": {"note": SECRET},
    });
    let acknowledgment = client.request(request).await;
    assert_eq!(acknowledgment["type"], "acknowledgment", "{acknowledgment}");
    let log = client.follow(Log::after(1)).await;
    assert_eq!((log.count("retrying"), log.last_type()), (1, "complete"));
    acknowledgment
}

/// Returns the spans with the given name, ordered by start time.
fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    let mut found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    found.sort_by_key(|span| span.start);
    found
}

fn has(spans: &[Span], name: &str, count: usize) -> bool {
    named(spans, name).len() >= count
}

/// Checks the spans of one request of [`submit`]: each attempt has a separate trace, which is linked to the
/// submission and to the previous attempt.
fn check_spans(spans: &[Span]) {
    assert_eq!(dangling(spans, &[]), Vec::<String>::new(), "{}", tree(spans));
    let submission = named(spans, "websocket.request")[0];
    assert_eq!(submission.parent_id, "");
    let created = named(spans, "store.create_request")[0];
    assert_eq!(created.trace_id, submission.trace_id);
    let attempts = named(spans, "attempt");
    let [first, second] = attempts[..] else { panic!("{}", tree(spans)) };
    assert_eq!((&*first.attributes["streamer.attempt"], first.failed), ("1", true));
    assert_eq!((&*second.attributes["streamer.attempt"], second.failed), ("2", false));
    assert_eq!(first.attributes["streamer.outcome"], "retrying");
    assert_eq!(second.attributes["streamer.outcome"], "succeeded");
    assert!(first.links.iter().all(|(trace, _)| *trace == submission.trace_id));
    assert_eq!(second.links.len(), 2);
    assert_eq!(second.links[0].0, submission.trace_id);
    assert_eq!(second.links[1], first.context());
    let traces: BTreeSet<_> =
        [submission, first, second].map(|span| span.trace_id.clone()).into_iter().collect();
    assert_eq!(traces.len(), 3);
    let claims = named(spans, "store.claim");
    let waits = named(spans, "queue.wait").into_iter().zip(claims);
    for ((wait, claim), attempt) in waits.zip([first, second]) {
        assert_eq!((&wait.trace_id, &wait.parent_id), (&attempt.trace_id, &attempt.span_id));
        assert_eq!(wait.start, attempt.start, "an attempt starts when it is due");
        assert_eq!(wait.end, claim.start, "the wait ends with the claim");
    }
    let delivery = named(spans, "delivery")[0];
    assert_eq!((&delivery.trace_id, &delivery.parent_id), (&second.trace_id, &second.span_id));
}

/// Checks that no data of clients or handlers is exported.
fn check_secrets(collector: &mut Collector, token: &str) {
    for message in collector.exported() {
        for secret in [SECRET, token, "Bearer", "as requested"] {
            let found = message.windows(secret.len()).any(|part| part == secret.as_bytes());
            assert!(!found, "{secret} was exported");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_traces_of_a_retried_request_are_linked() {
    let mut collector = Collector::start(Behavior::Accept);
    let server = Server::start(&[&collector.setting()]);
    let token = server.token("acme", "ann", &[]);
    let mut client = Client::connect(&server.url, &token).await;
    let acknowledgment = submit(&mut client, "r").await;
    let spans = collector.wait_for_spans(|spans| has(spans, "delivery", 1)).await;
    check_spans(&spans);
    let submission = named(&spans, "websocket.request")[0];
    assert_eq!(acknowledgment["trace_id"], *submission.trace_id);
    assert_eq!(submission.attributes["streamer.tenant"], "acme");
    let handlers = named(&spans, "handler");
    assert_eq!([handlers[0].failed, handlers[1].failed], [true, false]);
    let again = client.request(json!({"id": "r", "action": "echo_async"})).await;
    assert_eq!(again["error"]["code"], "CONFLICT", "{again}");
    check_secrets(&mut collector, &token);
    check_independently(&mut collector, spans.len());
}

/// Checks that OpenTelemetry's own decoder reads the same spans.
fn check_independently(collector: &mut Collector, count: usize) {
    let mut command = Process::command(tool("STREAMER_TESTS_PYTHON"));
    command.arg(script("decode.py")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut decoder = Process::spawn(&mut command);
    let mut input = decoder.stdin();
    for message in collector.exported() {
        writeln!(input, "{}", hex(&message)).unwrap();
    }
    drop(input);
    let names = std::io::read_to_string(decoder.stdout()).unwrap();
    assert!(decoder.wait().success());
    let decoded: BTreeSet<_> = names.lines().map(str::to_owned).collect();
    let received = collector.spans().into_iter().map(|span| {
        let parent = if span.parent_id.is_empty() { "-".to_owned() } else { span.parent_id };
        format!("{} {} {parent} {}", span.trace_id, span.span_id, span.name)
    });
    // More spans may have arrived in the meantime.
    let received: BTreeSet<_> = received.collect();
    assert!(decoded.len() >= count && decoded.is_subset(&received), "{decoded:?}\n{received:?}");
}

fn script(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("suites/tracing").join(name)
}

/// Starts a worker of examples/workers in the given language, with OpenTelemetry's SDK.
fn worker(language: &str, url: &str, token: &str, collector: &Collector) -> Process {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/workers");
    let mut command = match language {
        "python" => {
            let mut command = Process::command(tool("STREAMER_TESTS_PYTHON"));
            command.arg(script("worker.py")).arg(examples.join("echo_async.py"));
            command
        }
        _ => {
            let mut command = Process::command(tool("STREAMER_TESTS_NODE"));
            command.arg("--import").arg(script("worker.mjs"));
            command.arg(examples.join("echo_async.js"));
            command.env("STREAMER_TESTS_MODULES", tool("STREAMER_TESTS_MODULES"));
            command
        }
    };
    command
        .env("STREAMER_SERVER", url)
        .env("STREAMER_TOKEN", token)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url())
        .env("OTEL_SERVICE_NAME", language);
    Process::spawn(&mut command)
}

/// Checks that the handler spans of a worker in the given language are in the traces of their attempts.
fn check_handlers(spans: &[Span], language: &str) {
    let handlers: Vec<_> =
        named(spans, "handler").into_iter().filter(|span| span.service == language).collect();
    let attempts = named(spans, "attempt");
    assert_eq!(handlers.len(), 2, "{}", tree(spans));
    for (handler, attempt) in handlers.into_iter().zip(attempts) {
        assert_eq!(handler.trace_id, attempt.trace_id);
        assert_eq!(handler.failed, attempt.failed);
        assert_eq!(handler.attributes["streamer.attempt"], attempt.attributes["streamer.attempt"]);
    }
}

async fn check_worker(language: &str) {
    let mut collector = Collector::start(Behavior::Accept);
    let server = Server::start(&[&collector.setting(), "execution.builtin_actions=echo"]);
    let token = server.token("acme", "ann", &["worker:*"]);
    let _worker = worker(language, &server.url, &token, &collector);
    wait_for_action(&server.url, &token, "echo_async").await;
    let mut client = Client::connect(&server.url, &token).await;
    submit(&mut client, "r").await;
    let spans = collector
        .wait_for_spans(|spans| has(spans, "delivery", 1) && has(spans, "handler", 2))
        .await;
    check_spans(&spans);
    check_handlers(&spans, language);
    check_secrets(&mut collector, &token);
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_of_a_python_worker_are_in_the_trace_of_the_attempt() {
    check_worker("python").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_of_a_javascript_worker_are_in_the_trace_of_the_attempt() {
    check_worker("javascript").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_of_separate_services_and_workers_are_linked() {
    let mut collector = Collector::start(Behavior::Accept);
    let settings = ["execution.builtin_actions=echo", &collector.setting()];
    let dynamodb = endpoint(Implementation::DynamoDbLocal);
    let cluster = Cluster::start(dynamodb, &settings, |_, _, _| Vec::new()).await;
    let token = cluster.token("acme", "ann", &["worker:*"]);
    let url = &cluster.urls[0];
    for language in ["python", "javascript"] {
        let mut worker = worker(language, url, &token, &collector);
        for url in &cluster.urls {
            wait_for_action(url, &token, "echo_async").await;
        }
        let mut client = Client::connect(url, &token).await;
        submit(&mut client, language).await;
        let of_request = |spans: &[Span]| -> Vec<Span> {
            let submissions = named(spans, "websocket.request");
            let mut traces: BTreeSet<String> = submissions
                .into_iter()
                .filter(|span| span.attributes["streamer.request_id"] == language)
                .map(|span| span.trace_id.clone())
                .collect();
            let linked = |span: &&Span| span.links.iter().any(|(trace, _)| traces.contains(trace));
            let attempts: Vec<_> =
                spans.iter().filter(linked).map(|span| span.trace_id.clone()).collect();
            traces.extend(attempts);
            spans.iter().filter(|span| traces.contains(&span.trace_id)).cloned().collect()
        };
        let spans = collector
            .wait_for_spans(|spans| {
                let spans = of_request(spans);
                has(&spans, "delivery", 1)
                    && has(&spans, "handler", 2)
                    && has(&spans, "attempt", 2)
                    && has(&spans, "store.append", 2)
                    && dangling(&spans, &[]).is_empty()
            })
            .await;
        let spans = of_request(&spans);
        check_spans(&spans);
        check_handlers(&spans, language);
        let services: BTreeSet<_> = spans.iter().map(|span| &*span.service).collect();
        for service in ["gateway", "router", "processor", "progress"] {
            let name = format!("streamer-{service}");
            assert!(services.contains(&*name), "{name}:\n{}", tree(&spans));
        }
        assert!(has(&spans, "DynamoDB.TransactWriteItems", 1), "{}", tree(&spans));
        worker.stop();
    }
    check_secrets(&mut collector, &token);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trace_of_a_client_message_is_continued() {
    let mut collector = Collector::start(Behavior::Accept);
    let server = Server::start(&[&collector.setting()]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let request = json!({"action": "echo_async", "traceparent": PARENT, "tracestate": "vendor=1"});
    let acknowledgment = client.request(request).await;
    assert_eq!(acknowledgment["trace_id"], TRACE_ID);
    client.follow(Log::after(1)).await;
    let spans = collector.wait_for_spans(|spans| has(spans, "delivery", 1)).await;
    let submission = named(&spans, "websocket.request")[0];
    assert_eq!(submission.context().0, TRACE_ID);
    assert_eq!(submission.parent_id, "b7ad6b7169203331");
    let caller = (TRACE_ID.to_owned(), "b7ad6b7169203331".to_owned());
    assert_eq!(dangling(&spans, &[caller]), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trace_of_the_handshake_is_continued() {
    let mut collector = Collector::start(Behavior::Accept);
    let server = Server::start(&[&collector.setting()]);
    let mut command = Process::command(tool("STREAMER_TESTS_PYTHON"));
    let url = format!("{}/ws", server.url.replace("http://", "ws://"));
    command.arg(script("handshake.py")).arg(url);
    let output = Process::output(command.args([&server.token("acme", "ann", &[]), PARENT]));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), TRACE_ID, "{output:?}");
    let spans = collector.wait_for_spans(|spans| has(spans, "websocket.request", 1)).await;
    let submission = named(&spans, "websocket.request")[0];
    assert_eq!(submission.context().0, TRACE_ID);
    assert_eq!(submission.parent_id, "b7ad6b7169203331");
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_contain_trace_and_span_ids() {
    for format in ["text", "json"] {
        let mut collector = Collector::start(Behavior::Accept);
        let mut engine = dynamodb::start(Implementation::Dynoxide);
        let objects = tempfile::TempDir::with_prefix("streamer-test-").unwrap();
        let mut settings = dynamodb_settings(engine.endpoint(), objects.path());
        settings.extend([collector.setting(), format!("log.format={format}")]);
        let settings: Vec<_> = settings.iter().map(String::as_str).collect();
        let (server, log) = Server::start_logged(&settings);
        engine.kill();
        let api = Api::new(&server.url, &server.token("acme", "ann", &[])).unwrap();
        let mut call = api.call(GetRequest { request_id: "r".into(), ..GetRequest::default() });
        call.metadata_mut().insert("traceparent", PARENT.parse().unwrap());
        let rejected = api.router().get(call).await.unwrap_err();
        assert_eq!(rejected.code(), Code::Unavailable, "{rejected}");
        let mut lines = log.lines().map(Result::unwrap);
        let line = lines.find(|line| line.contains("store call failed")).unwrap();
        let spans = collector
            .wait_for_spans(|spans| {
                spans.iter().any(|span| span.name.ends_with("RouterService/Get"))
            })
            .await;
        let ids = spans.iter().map(|span| match format {
            "text" => format!("trace_id={TRACE_ID} span_id={}", span.span_id),
            _ => format!(r#""trace_id":"{TRACE_ID}","span_id":"{}""#, span.span_id),
        });
        assert!(ids.into_iter().any(|ids| line.contains(&ids)), "{line}\n{}", tree(&spans));
        // The server is dropped before its log is closed.
        drop(server);
    }
}

/// Submits a request with the given `traceparent`; returns the trace ID in the acknowledgment.
async fn trace_of(client: &mut Client, trace_parent: Value) -> Value {
    let request = json!({"action": "echo_async", "traceparent": trace_parent});
    let acknowledgment = client.request(request).await;
    assert_eq!(acknowledgment["type"], "acknowledgment", "{acknowledgment}");
    client.follow(Log::after(1)).await;
    acknowledgment["trace_id"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_trusted_clients_decide_on_sampling() {
    let mut collector = Collector::start(Behavior::Accept);
    let setting = collector.setting();
    for trusted in [false, true] {
        let trust = format!("trace.trust_callers={trusted}");
        let mut server = Server::start(&[&setting, "trace.sample_ratio=0", &trust]);
        let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
        assert_eq!(trace_of(&mut client, PARENT.into()).await, TRACE_ID);
        let own = trace_of(&mut client, Value::Null).await;
        assert_eq!(own.as_str().unwrap().len(), 32, "an id for logs");
        drop(client);
        assert_eq!(server.stop(), Some(0));
        let traces: BTreeSet<_> = collector.spans().into_iter().map(|span| span.trace_id).collect();
        assert_eq!(traces.contains(TRACE_ID), trusted);
        assert!(!traces.contains(own.as_str().unwrap()));
    }
    // Without a collector, trace contexts are propagated, but not created.
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    assert_eq!(trace_of(&mut client, PARENT.into()).await, TRACE_ID);
    assert_eq!(trace_of(&mut client, "nonsense".into()).await, Value::Null);
    let rejected = client.request(json!({"action": "echo_async", "traceparent": 5})).await;
    assert_eq!(rejected["error"]["details"]["violations"][0]["field"], "traceparent", "{rejected}");
}

/// Returns the value of a counter.
async fn count(server: &Server, name: &str) -> u64 {
    let metrics = metrics(&server.url).await;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_collector_does_not_affect_requests() {
    const CALLS: usize = 9_000;
    let rejecting = Collector::start(Behavior::Reject);
    let hanging = Collector::start(Behavior::Hang);
    // No process listens on the discard port.
    let absent = "trace.endpoint=http://127.0.0.1:9".to_owned();
    for (setting, calls, counter) in [
        (rejecting.setting(), 10, "streamer_trace_spans_failed_total"),
        (absent, 10, "streamer_trace_spans_failed_total"),
        // More spans than the export queue can contain.
        (hanging.setting(), CALLS, "streamer_trace_spans_dropped_total"),
    ] {
        let mut server = Server::start(&[&setting, "server.drain_timeout=1000ms"]);
        let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
        for _ in 0..calls {
            client.send(json!({"action": "echo", "payload": 1})).await;
        }
        for _ in 0..calls {
            assert_eq!(client.next().await["type"], "response");
        }
        while count(&server, counter).await == 0 {
            assert_eq!(client.request(json!({"action": "echo"})).await["type"], "response");
        }
        drop(client);
        assert_eq!(server.stop(), Some(0), "the server does not wait for the collector");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pending_spans_are_exported_when_the_server_stops() {
    let mut collector = Collector::start(Behavior::Accept);
    let mut server = Server::start(&[&collector.setting()]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    submit(&mut client, "last").await;
    drop(client);
    assert_eq!(server.stop(), Some(0));
    check_spans(&collector.spans());
}

#[tokio::test(flavor = "multi_thread")]
async fn export_resumes_when_the_collector_restarts() {
    let mut collector = Collector::start(Behavior::Accept);
    let server = Server::start(&[&collector.setting()]);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    submit(&mut client, "before").await;
    collector.wait_for_spans(|spans| has(spans, "delivery", 1)).await;
    let address = collector.kill();
    while count(&server, "streamer_trace_spans_failed_total").await == 0 {
        assert_eq!(client.request(json!({"action": "echo"})).await["type"], "response");
    }
    let mut collector = Collector::start_at(address, Behavior::Accept);
    collector.wait_for_spans(|spans| !spans.is_empty()).await;
    submit(&mut client, "after").await;
    let spans = collector.wait_for_spans(|spans| has(spans, "delivery", 1)).await;
    let after: Vec<_> = named(&spans, "attempt");
    assert_eq!(after.last().unwrap().attributes["streamer.request_id"], "after");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_receives_the_context_of_its_attempt_and_the_clients_trace_state() {
    let mut collector = Collector::start(Behavior::Accept);
    let server = Server::start(&[&collector.setting()]);
    let token = server.token("acme", "ann", &["worker:*"]);
    let first = hello("w", 1, vec![declare("work")]);
    let mut worker = ScriptedWorker::connect(&server, &token, first).await;
    let mut client = Client::connect(&server.url, &token).await;
    let request = json!({
        "id": "r", "action": "work", "traceparent": PARENT, "tracestate": "vendor=1",
    });
    let first = client.request(request.clone()).await;
    assert_eq!(first["trace_id"], TRACE_ID);
    let task = worker.next_task().await;
    assert_eq!(task.trace_state, "vendor=1");
    assert_ne!(&task.trace_parent[3..35], TRACE_ID, "an attempt has a separate trace");
    client.send(request).await;
    let again = loop {
        let message = client.next().await;
        if message["type"] == "acknowledgment" {
            break message;
        }
    };
    assert_eq!((&again["duplicate"], &again["trace_id"]), (&json!(true), &Value::Null));
    worker.report(&task, 0, Kind::Result(json_payload("1"))).await;
    let spans = collector.wait_for_spans(|spans| has(spans, "attempt", 1)).await;
    let span = named(&spans, "worker.task")[0];
    assert_eq!(task.trace_parent, format!("00-{}-{}-01", span.trace_id, span.span_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_call_continues_the_trace_of_its_metadata() {
    let mut collector = Collector::start(Behavior::Accept);
    let server = Server::start(&[&collector.setting()]);
    let authorization = format!("authorization: Bearer {}", server.token("acme", "ann", &[]));
    let call = |method: &str| {
        let mut command = Process::command(tool("STREAMER_TESTS_GRPCURL"));
        command.args(["-plaintext", "-H", &authorization, "-H", &format!("traceparent: {PARENT}")]);
        command.args(["-d", r#"{"action": "echo"}"#, server.url.trim_start_matches("http://")]);
        Process::output(command.arg(method))
    };
    let output = call("streamer.router.v1.RouterService/Submit");
    assert!(output.status.success(), "{output:?}");
    let spans = collector.wait_for_spans(|spans| has(spans, "handler", 1)).await;
    let submit = named(&spans, "streamer.router.v1.RouterService/Submit")[0];
    assert_eq!((&*submit.trace_id, &*submit.parent_id), (TRACE_ID, "b7ad6b7169203331"));
    assert_eq!(submit.attributes["rpc.response.status_code"], "OK");
    assert!(spans.iter().all(|span| !span.name.contains("reflection")), "{}", tree(&spans));
}
