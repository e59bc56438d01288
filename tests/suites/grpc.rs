//! gRPC from the command line, with grpcurl.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use serde_json::{Value, json};
use streamer_tests::{Process, Server, tool};

struct Grpcurl<'a> {
    server: &'a Server,
    token: Option<String>,
}

impl Grpcurl<'_> {
    fn run(&self, data: Option<&Value>, arguments: &[&str]) -> Result<String, String> {
        let mut command = Process::command(tool("STREAMER_TESTS_GRPCURL"));
        command.arg("-plaintext");
        if let Some(token) = &self.token {
            command.arg("-H").arg(format!("authorization: Bearer {token}"));
        }
        if let Some(data) = data {
            command.arg("-d").arg(data.to_string());
        }
        command.arg(self.server.url.trim_start_matches("http://")).args(arguments);
        let output = Process::output(&mut command);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn call(&self, method: &str, data: &Value) -> Value {
        serde_json::from_str(&self.run(Some(data), &[method]).unwrap()).unwrap()
    }

    fn stream(&self, method: &str, data: &Value) -> Vec<Value> {
        let text = self.run(Some(data), &[method]).unwrap();
        serde_json::Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect()
    }

    fn call_error(&self, method: &str, data: &Value) -> String {
        self.run(Some(data), &[method]).unwrap_err()
    }
}

const SUBMIT: &str = "streamer.router.v1.RouterService/Submit";
const SUBMIT_AND_WATCH: &str = "streamer.router.v1.RouterService/SubmitAndWatch";
const WATCH: &str = "streamer.progress.v1.ProgressService/Watch";

fn seqs(messages: &[Value]) -> Vec<i64> {
    let events =
        messages.iter().flat_map(|message| message["events"].as_array().into_iter().flatten());
    events.map(|event| event["seq"].as_str().unwrap().parse().unwrap()).collect()
}

#[test]
fn all_services_can_be_discovered_and_called() {
    let server = Server::start(&[]);
    let token = Some(server.token("acme", "ann", &[]));
    let grpcurl = Grpcurl { server: &server, token };
    let listed = grpcurl.run(None, &["list"]).unwrap();
    for service in [
        "streamer.router.v1.RouterService",
        "streamer.progress.v1.ProgressService",
        "streamer.connections.v1.ConnectionsService",
        "streamer.admin.v1.AdminService",
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
    ] {
        assert!(listed.contains(service), "{service} is missing in {listed}");
    }
    assert!(!listed.contains("internal"), "{listed}");
    let described = grpcurl.run(None, &["describe", "streamer.router.v1.SubmitRequest"]).unwrap();
    assert!(described.contains("payload_encoding"), "{described}");

    let echoed = grpcurl.call(
        SUBMIT,
        &json!({
            "action": "echo", "payload": {"json": {"a": [1, "é"]}},
            "payload_encoding": "PAYLOAD_ENCODING_JSON_VALUE",
        }),
    );
    assert_eq!(echoed["completed"]["result"]["json"]["echo"], json!({"a": [1, "é"]}));

    let csv = "name,size\na,1\nb,2\nc,3\n";
    let submit = json!({"request": {"id": "p1", "action": "process_data", "payload": {"json": {"csv": csv}}}});
    let watched = grpcurl.stream(SUBMIT_AND_WATCH, &submit);
    let all = seqs(&watched);
    assert_eq!(all, (1..=all.len() as i64).collect::<Vec<_>>());
    assert_eq!(watched[0]["submitted"]["requestId"], "p1");
    let again = grpcurl.stream(WATCH, &json!({"request_id": "p1", "after_seq": 3}));
    assert_eq!(seqs(&again), all[3..]);

    let operation = grpcurl
        .call("google.longrunning.Operations/GetOperation", &json!({"name": "operations/p1"}));
    assert_eq!(operation["done"], true);
    assert_eq!(operation["response"]["result"]["json"]["rows"], 3, "{operation}");
    let slow = json!({"id": "slow", "action": "echo_async",
        "payload": {"json": {"steps": 10, "delay_ms": 3_600_000}}});
    grpcurl.call(SUBMIT, &slow);
    let waited = grpcurl.call(
        "google.longrunning.Operations/WaitOperation",
        &json!({"name": "operations/slow", "timeout": "0.1s"}),
    );
    assert_eq!(waited["done"], Value::Null, "{waited}");
    grpcurl.call(
        "streamer.router.v1.RouterService/Cancel",
        &json!({"request_id": "slow", "reason": "x"}),
    );
    let waited = grpcurl
        .call("google.longrunning.Operations/WaitOperation", &json!({"name": "operations/slow"}));
    assert_eq!((&waited["done"], &waited["error"]["code"]), (&json!(true), &json!(1)), "{waited}");
    let redriven =
        grpcurl.call("streamer.router.v1.RouterService/Redrive", &json!({"request_id": "slow"}));
    assert!(redriven["request"]["redriveOf"].is_string(), "{redriven}");
    grpcurl
        .call("google.longrunning.Operations/DeleteOperation", &json!({"name": "operations/p1"}));
    assert!(grpcurl.call_error(WATCH, &json!({"request_id": "p1"})).contains("NotFound"));
}

#[test]
fn errors_contain_code_and_violations() {
    let server = Server::start(&[]);
    let unauthenticated = Grpcurl { server: &server, token: None };
    assert!(
        unauthenticated.call_error(SUBMIT, &json!({"action": "echo"})).contains("Unauthenticated")
    );
    let health = unauthenticated.call("grpc.health.v1.Health/Check", &json!({}));
    assert_eq!(health["status"], "SERVING");
    let ann = Grpcurl { server: &server, token: Some(server.token("acme", "ann", &[])) };
    ann.call(SUBMIT, &json!({"id": "a1", "action": "echo_async", "wait": "10s", "payload": {"json": {"steps": 1}}}));
    let other = Grpcurl { server: &server, token: Some(server.token("other", "ann", &[])) };
    for method in
        [WATCH, "streamer.router.v1.RouterService/Get", "streamer.router.v1.RouterService/Cancel"]
    {
        assert!(
            other.call_error(method, &json!({"request_id": "a1"})).contains("NotFound"),
            "{method}"
        );
    }
    let error = ann.call_error(SUBMIT, &json!({"id": "a b", "action": "Echo", "priority": 11}));
    for part in [
        "InvalidArgument",
        "id: must consist",
        "action: must match",
        "priority: must be 0 to 9",
        "fieldViolations",
    ] {
        assert!(error.contains(part), "{part} is missing in {error}");
    }
}
