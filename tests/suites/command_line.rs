//! The `streamer` binary as scripts use it: output, exit codes, invalid flags, unavailable server.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    process::{Output, Stdio},
};

use serde_json::Value;
use streamer_tests::{Process, Server, binary, tool};
use tempfile::TempDir;

fn streamer(server: &Server, arguments: &[&str]) -> Output {
    let mut command = Process::command(binary());
    command.args(arguments).env_clear();
    command.env("STREAMER_SERVER", &server.url).env("STREAMER_DATA", server.data());
    Process::output(&mut command)
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn exit_codes_report_the_outcome() {
    let server = Server::start(&[]);
    let code = |arguments: &[&str]| streamer(&server, arguments).status.code().unwrap();
    assert_eq!(code(&["submit", "echo", "--payload", "{\"a\":1}"]), 0);
    let failing = r#"{"fail_attempts":0,"steps":1,"csv":7}"#;
    assert_eq!(code(&["submit", "process_data", "--payload", failing]), 2);
    assert_eq!(code(&["submit", "process_data", "--payload", r#"{"csv":"a,b\n1\n"}"#]), 2);
    assert_eq!(code(&["submit", "echo", "--nonsense"]), 2);
    assert_eq!(code(&["submit", "echo", "--payload", "{"]), 2);
    assert_eq!(code(&["submit", "echo", "--token", "x.y.z"]), 4);
    assert_eq!(code(&["submit", "echo", "--server", "http://127.0.0.1:1"]), 3);
    assert_eq!(code(&["get", "missing"]), 1);
    assert_eq!(
        code(&["submit", "echo_async", "--id", "d", "--detach", "--delay-ms", "3600000"]),
        0
    );
    assert_eq!(code(&["cancel", "d", "--reason", "enough"]), 0);
    assert_eq!(code(&["watch", "d"]), 5);
}

#[test]
fn a_submission_starts_or_continues_a_trace() {
    let server = Server::start(&[]);
    let submit = |parent: Option<&str>| {
        let mut command = Process::command(binary());
        command.args(["submit", "echo_async", "--trace", "--detach"]).env_clear();
        command.env("STREAMER_SERVER", &server.url).env("STREAMER_DATA", server.data());
        Process::output(command.envs(parent.map(|parent| ("TRACEPARENT", parent))))
    };
    let (first, second) = (submit(None), submit(None));
    let printed = String::from_utf8(first.stderr.clone()).unwrap();
    let id = printed.trim().strip_prefix("trace ").unwrap().to_owned();
    assert_eq!(lines(&first)[0]["trace_id"], *id);
    assert_ne!(first.stderr, second.stderr);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let continued = submit(Some(parent));
    assert_eq!(continued.stderr, b"trace 0af7651916cd43dd8448eb211c80319c\n");
    let rejected = submit(Some("nonsense"));
    assert_eq!(rejected.status.code(), Some(2));
    let reason = String::from_utf8(rejected.stderr).unwrap();
    assert!(reason.contains("TRACEPARENT must be a W3C traceparent"), "{reason}");
}

#[test]
fn a_piped_submission_prints_one_line_per_message() {
    let server = Server::start(&[]);
    let output =
        streamer(&server, &["submit", "echo_async", "--id", "x", "--payload", "{\"steps\":3}"]);
    let messages = lines(&output);
    let kinds: Vec<_> = messages.iter().map(|message| message["type"].as_str().unwrap()).collect();
    assert_eq!(
        kinds,
        ["acknowledgment", "started", "progress", "progress", "progress", "complete"]
    );
    let watched = lines(&streamer(&server, &["watch", "x", "--after-seq", "4"]));
    assert_eq!(watched[1..], messages[4..]);
    let last = lines(&streamer(&server, &["watch", "x", "--after-seq", "6"]));
    assert_eq!(last.len(), 1, "no event follows the terminal event: {last:?}");
    let only = lines(&streamer(&server, &["submit", "echo", "--wait", "--payload", "5"]));
    assert_eq!((only.len(), &only[0]["data"]["echo"]), (1, &Value::from(5)));
    let listed = lines(&streamer(&server, &["list"]));
    assert_eq!(listed[0]["request_id"], "x");
    let actions = lines(&streamer(&server, &["actions"]));
    assert!(actions.iter().any(|action| action["name"] == "process_data"));
}

#[test]
fn the_demo_profiles_a_file_and_writes_a_report() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("my.csv"), "city,size\nUlm,<b>1\nBonn,2\n").unwrap();
    for arguments in [&["demo"][..], &["demo", "my.csv"]] {
        let mut demo = Process::command(binary());
        let demo = Process::output(demo.args(arguments).current_dir(folder.path()).env_clear());
        assert!(demo.status.success(), "{}", String::from_utf8_lossy(&demo.stderr));
        let printed = String::from_utf8_lossy(&demo.stdout).into_owned();
        assert!(printed.contains("100.0 %") && printed.contains("Next steps"), "{printed}");
        let report = fs::read_to_string(folder.path().join("streamer-report.html")).unwrap();
        assert!(report.starts_with("<!DOCTYPE html>"), "{report}");
        let penguins = arguments.len() == 1;
        assert_eq!(report.contains("<svg"), penguins, "numeric columns have histograms");
        assert!(!report.contains("<b>1"), "values of the data are escaped");
    }
    let mut missing = Process::command(binary());
    let missing = Process::output(missing.args(["demo", "nope.csv"]).current_dir(folder.path()));
    assert_eq!(missing.status.code(), Some(1));
}

#[test]
fn logs_have_no_color_codes_unless_they_go_to_a_terminal() {
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("log");
    let mut command = Process::command(binary());
    command.args(["up", "--listen", "127.0.0.1:0", "--set", "log.filter=debug", "--data"]);
    command.arg(folder.path()).env_clear().stdout(Stdio::piped());
    let mut server = Process::spawn(command.stderr(File::create(&log).unwrap()));
    let mut ready = String::new();
    BufReader::new(server.stdout()).read_line(&mut ready).unwrap();
    let url = ready.split_whitespace().find(|word| word.starts_with("http://")).unwrap();
    let mut call = Process::command(binary());
    call.args(["actions", "--server", url, "--data"]).arg(folder.path()).env_clear();
    assert!(Process::output(&mut call).status.success());
    assert_eq!(server.stop(), Some(0));
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains(" DEBUG "), "{log}");
    assert!(!log.contains('\x1b'), "{log}");
}

#[test]
fn all_configuration_errors_are_reported_together() {
    let run = |arguments: &[&str]| {
        Process::output(Process::command(binary()).args(arguments).current_dir("/").env_clear())
    };
    let output = run(&["up", "--set", "gateway.max_connections=0", "--set", "no.such=1"]);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        error.contains("gateway.max_connections: must be 1 to") && error.contains("no.such"),
        "{error}"
    );
    let output = run(&["up", "--listen", "0.0.0.0:0"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("is not a loopback address"), "{error}");
    assert!(run(&["config", "--default"]).status.success());
    assert!(run(&["completions", "bash"]).status.success());
}

/// The client is written from the description of the protocol, without code of Streamer.
#[test]
fn an_independent_python_client_works() {
    const SCRIPT: &str = r#"
import asyncio, json, sys, websockets
async def main(url, token):
    async with websockets.connect(url + "/ws", subprotocols=["streamer.v1.json", "bearer." + token]) as ws:
        assert ws.subprotocol == "streamer.v1.json"
        assert json.loads(await ws.recv())["type"] == "connected"
        await ws.send(json.dumps({"action": "echo_async", "payload": {"steps": 3}, "unknown": 1}))
        kinds = []
        while "complete" not in kinds:
            kinds.append(json.loads(await ws.recv())["type"])
        assert kinds == ["acknowledgment", "started", "progress", "progress", "progress", "complete"], kinds
        await ws.send(b"\x00\x01")
        assert "binary" in json.loads(await ws.recv())["error"]["message"]
        await (await ws.ping())
    async with websockets.connect(url + "/ws?token=" + token) as ws:
        assert json.loads(await ws.recv())["type"] == "connected"
    for origin, is_allowed in (("http://localhost:3000", True), ("https://evil.example", False)):
        async with websockets.connect(url + "/ws?token=" + token, origin=origin) as ws:
            try:
                assert json.loads(await ws.recv())["type"] == "connected" and is_allowed
            except websockets.ConnectionClosed as closed:
                assert closed.rcvd.code == 4403 and not is_allowed
    async with websockets.connect(url + "/ws", subprotocols=["soap"]) as ws:
        try:
            await ws.recv()
            raise AssertionError("the server accepted the connection")
        except websockets.ConnectionClosed as closed:
            assert closed.rcvd.code == 4400
asyncio.run(main(sys.argv[1], sys.argv[2]))
"#;
    let server = Server::start(&[]);
    let mut command = Process::command(tool("STREAMER_TESTS_PYTHON"));
    command.args(["-c", SCRIPT]);
    command.arg(server.url.replace("http://", "ws://")).arg(server.token("acme", "ann", &[]));
    let output = Process::output(&mut command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
