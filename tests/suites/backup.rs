//! Backups of a running server, and their restore.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use streamer_client::Api;
use streamer_proto::{
    admin::v1::{BackupHeader, BackupRequest, BackupResponse, backup_response::Part},
    common::v1::RequestState,
    processor::v1::report::Kind,
    progress::v1::ListEventsRequest,
    router::v1::{GetRequest, ListRequest, SubmitRequest},
};
use streamer_rpc::json_payload;
use streamer_tests::{
    Client, Load, Log, LoopbackAddress, Process, Proxy, ScriptedWorker, Server, Signal, binary,
    declare, hello, resume_hello, wait_for_workers, within_timeout,
};
use tempfile::TempDir;
use tonic::{Code, Status, Streaming};

const SEED: u64 = 20_261_201;
const MIB: usize = 1024 * 1024;
/// Setting with which no request starts during the test.
const QUIET: &str = "execution.poll_interval=60000ms";

fn command(server: &Server, arguments: &[&str], file: &Path) -> Command {
    complete(Process::command(binary()), server, arguments, file)
}

/// Returns a command with an option of `env` that determines which signals are ignored at its start.
fn command_with_signals(option: &str, server: &Server, arguments: &[&str], file: &Path) -> Command {
    let mut command = Process::command("env");
    command.arg(option).arg(binary());
    complete(command, server, arguments, file)
}

fn complete(mut command: Command, server: &Server, arguments: &[&str], file: &Path) -> Command {
    command.args(["store", "backup"]).arg(file).args(arguments).env_clear();
    command.env("STREAMER_SERVER", &server.url).env("STREAMER_DATA", server.data());
    command
}

/// Makes a backup with the token that the command signs itself; returns its output.
fn backup(server: &Server, file: &Path) -> Value {
    let output = Process::output(&mut command(server, &[], file));
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn restore(file: &Path, data: &Path) -> Output {
    let mut command = Process::command(binary());
    command.args(["store", "restore"]).arg(file).arg("--data").arg(data);
    Process::output(command.env_clear())
}

/// Returns the names of the files in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

fn api(server: &Server, permissions: &[&str]) -> Api {
    Api::new(&server.url, &server.token("acme", "ann", permissions)).unwrap()
}

async fn submit_held(api: &Api, id: &str) {
    let submit = SubmitRequest { id: id.into(), action: "held".into(), ..SubmitRequest::default() };
    api.router().submit(api.call(submit)).await.unwrap();
}

/// Returns the `uid`s of all requests in the given states.
async fn list(api: &Api, states: &[RequestState]) -> Vec<String> {
    let mut uids = Vec::new();
    let mut page_token = String::new();
    loop {
        let states = states.iter().map(|state| (*state).into()).collect();
        let list = ListRequest { states, page_size: 500, page_token, ..ListRequest::default() };
        let page = api.router().list(api.call(list)).await.unwrap().into_inner();
        uids.extend(page.requests.into_iter().map(|request| request.uid));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return uids;
        }
    }
}

/// Returns a request with its payload and result, and its log.
async fn read(api: &Api, uid: &str) -> String {
    let get = GetRequest { request_id: uid.into(), ..GetRequest::default() };
    let request = api.router().get(api.call(get)).await.unwrap().into_inner();
    let list = ListEventsRequest { request_id: uid.into(), page_size: 1000, ..Default::default() };
    let events = api.progress().list_events(api.call(list)).await.unwrap().into_inner();
    format!("{request:?} {events:?}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_contains_every_request_that_existed() {
    let settings = ["execution.lease_duration=120000ms", "server.drain_timeout=500ms"];
    let mut server = Server::start(&settings);
    // A worker that never reports runs one request and keeps one queued.
    let token = server.token("acme", "worker", &["worker:held"]);
    let first = hello("w", 1, vec![declare("held")]);
    let mut worker = ScriptedWorker::connect(&server, &token, first.clone()).await;
    let user = server.token("acme", "ann", &[]);
    wait_for_workers(&server, &user, "held", 1).await;
    let before_backup = api(&server, &[]);
    submit_held(&before_backup, "running").await;
    let task = worker.next_task().await;
    submit_held(&before_backup, "queued").await;

    let load = Load::start(std::slice::from_ref(&server.url), &user, SEED, false);
    load.wait_for_messages(400).await;
    let ended = [RequestState::Succeeded, RequestState::Failed, RequestState::Cancelled];
    let mut expected = BTreeMap::new();
    for uid in list(&before_backup, &ended).await {
        expected.insert(uid.clone(), read(&before_backup, &uid).await);
    }
    let existing = list(&before_backup, &[]).await;
    assert!(expected.len() > 5, "{} requests have ended", expected.len());
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("backup");
    let saved = backup(&server, &file);
    assert_eq!(saved["size_bytes"], fs::metadata(&file).unwrap().len());
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    load.wait_for_messages(100).await;
    submit_held(&before_backup, "later").await;
    drop(load);
    assert_eq!(server.stop(), Some(0));

    let data = TempDir::new().unwrap();
    let output = restore(&file, data.path());
    assert!(output.status.success(), "{output:?}");
    let restored = Server::start_in(data, &settings);
    let after = api(&restored, &[]);
    for (uid, expected) in &expected {
        assert_eq!(read(&after, uid).await, *expected);
    }
    let all = list(&after, &[]).await;
    assert!(existing.iter().all(|uid| all.contains(uid)), "a request is missing");
    // The worker cannot resume its attempt: the reports that were acknowledged after the backup are lost.
    let token = restored.token("acme", "worker", &["worker:held"]);
    let again = resume_hello(&first, &worker.welcome, &[&task]);
    let mut worker = ScriptedWorker::connect(&restored, &token, again).await;
    assert_eq!(worker.welcome.resumed, []);
    for _ in 0..2 {
        let task = worker.next_task().await;
        worker.report(&task, 0, Kind::Result(json_payload("true"))).await;
        worker.wait_for_end(&task).await;
    }
    let mut client = Client::connect(&restored.url, &restored.token("acme", "ann", &[])).await;
    for uid in all {
        client.send(json!({"type": "subscribe", "request_id": uid, "after_seq": 0})).await;
        // The log has no gaps and one terminal event, which is the last one.
        let log = within_timeout("the end", client.follow(Log::after(0))).await;
        let ended = log.count("complete") + log.count("error") + log.count("cancelled");
        assert_eq!(ended, 1, "{log:?}");
    }
    let attempts = |id: &str| {
        let (after, id) = (after.clone(), id.to_owned());
        async move {
            let get = GetRequest { request_id: id, ..GetRequest::default() };
            let found = after.router().get(after.call(get)).await;
            found.map(|found| found.into_inner().request.unwrap().attempt)
        }
    };
    assert_eq!(attempts("running").await.unwrap(), 2);
    assert_eq!(attempts("queued").await.unwrap(), 1);
    assert_eq!(attempts("later").await.unwrap_err().code(), Code::NotFound);
}

#[test]
fn only_an_operator_can_make_a_backup_and_a_file_is_replaced_only_on_request() {
    let data = TempDir::new().unwrap();
    let audit = data.path().join("audit.jsonl");
    let mut server = Server::start_in(data, &[&format!("audit.file={}", audit.display())]);
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("backup");
    let code = |arguments: &[&str]| {
        Process::output(&mut command(&server, arguments, &file)).status.code().unwrap()
    };
    let token = server.token("acme", "ann", &["*", "operator:*"]);
    assert_eq!(code(&["--token", &token]), 4);
    assert_eq!(code(&["--server", "http://127.0.0.1:1"]), 3);
    assert_eq!(names(folder.path()), [""; 0]);
    let token = server.token("acme", "olga", &["operator"]);
    assert_eq!(code(&["--token", &token]), 0);
    assert_eq!(names(folder.path()), ["backup"]);
    fs::write(&file, "other").unwrap();
    assert_eq!(code(&[]), 2);
    assert_eq!(fs::read(&file).unwrap(), b"other");
    assert_eq!(code(&["--force"]), 0);
    assert!(fs::read(&file).unwrap().starts_with(b"SQLite format 3\0"));
    assert_eq!(server.stop(), Some(0));
    let records = fs::read_to_string(audit).unwrap();
    let records = records.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let records: Vec<_> = records
        .map(|record| {
            assert_eq!(record["call"], "/streamer.admin.v1.AdminService/Backup");
            format!("{} {}", record["outcome"].as_str().unwrap(), record["user"].as_str().unwrap())
        })
        .collect();
    assert_eq!(records, ["PERMISSION_DENIED ann", "OK olga", "OK dev"]);
}

/// Submits requests that remain queued, with payloads of 64 KiB each.
async fn submit(server: &Server, count: usize) {
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    for number in 0..count {
        let result = format!("marker-{number}-{}", "x".repeat(65_536));
        let payload = json!({"steps": 1, "result": result});
        let message = json!({"id": format!("r{number}"), "action": "echo_async",
            "payload": payload, "delay_ms": 3_600_000});
        assert_eq!(client.request(message).await["type"], "acknowledgment");
    }
}

#[tokio::test]
async fn an_invalid_backup_leaves_the_folder_unchanged() {
    let server = Server::start(&[QUIET]);
    submit(&server, 8).await;
    let folder = TempDir::new().unwrap();
    let good = folder.path().join("good");
    backup(&server, &good);
    let bytes = fs::read(&good).unwrap();
    let file = folder.path().join("bad");
    let existing = folder.path().join("existing");
    fs::create_dir(&existing).unwrap();
    fs::write(existing.join("dev-key.pem"), "key").unwrap();
    let new = folder.path().join("new");
    let check = |bytes: &[u8], reason: &str| {
        fs::write(&file, bytes).unwrap();
        for data in [&existing, &new] {
            let output = restore(&file, data);
            assert_eq!(output.status.code(), Some(1));
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(error.contains(reason), "{error}");
        }
        assert_eq!(names(&existing), ["dev-key.pem"]);
        assert!(!new.exists());
    };
    check(&bytes[..bytes.len() / 2], "expected");
    check(&bytes[..50], "is not an SQLite database");
    check(&[&bytes[..], &[0; 4096]].concat(), "expected");
    let mut in_value = bytes.clone();
    let marker = in_value.windows(9).position(|window| window == b"marker-3-").unwrap();
    in_value[marker + 100] ^= 1;
    check(&in_value, "table payloads");
    let mut in_structure = bytes.clone();
    in_structure[4096..8192].fill(0xa5);
    check(&in_structure, "is not a valid backup");
    // The copy of a file of a running store is incomplete.
    check(&fs::read(server.data().join("streamer.db")).unwrap(), "streamer store backup");

    let output = restore(&good, &existing);
    assert!(output.status.success(), "{output:?}");
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["size_bytes"], bytes.len());
    let database = fs::read(existing.join("streamer.db")).unwrap();
    assert_eq!(restore(&good, &existing).status.code(), Some(2));
    assert_eq!(fs::read(existing.join("streamer.db")).unwrap(), database);
    assert_eq!(names(&existing), ["dev-key.pem", "lock", "streamer.db"]);
}

async fn open(api: &Api) -> Result<(BackupHeader, Streaming<BackupResponse>), Status> {
    let mut stream = api.admin().backup(api.call(BackupRequest {})).await?.into_inner();
    let first = stream.message().await?.and_then(|first| first.part);
    let Some(Part::Header(header)) = first else { panic!("no header: {first:?}") };
    Ok((header, stream))
}

/// Repeats a backup until the server has detected that the client of the previous one is gone.
async fn open_after_previous(api: &Api) {
    let opened = async {
        loop {
            match open(api).await {
                Ok(_) => return,
                Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
            }
            tokio::task::yield_now().await;
        }
    };
    within_timeout("the end of the previous backup", opened).await;
}

fn temporary_files(server: &Server) -> Vec<String> {
    names(server.data()).into_iter().filter(|name| name.contains("backup")).collect()
}

/// Waits until a command has received data.
async fn wait_for_incomplete_file(folder: &Path) {
    let has_received = || {
        let name = names(folder).pop();
        name.is_some_and(|name| fs::metadata(folder.join(name)).unwrap().len() > 0)
    };
    while !has_received() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_or_is_killed_leaves_no_file() {
    let server = Server::start(&[QUIET]);
    // More than the client and the server buffer.
    submit(&server, 128).await;
    let api = api(&server, &["operator"]);
    let reader = self::api(&server, &["operator"]);
    let (header, mut unread) = open(&reader).await.unwrap();
    assert!(header.size_bytes > 8 * MIB as i64, "{header:?}");
    assert_eq!(temporary_files(&server), [""; 0]);
    let rejected = open(&api).await.unwrap_err();
    assert_eq!(rejected.code(), Code::ResourceExhausted);
    assert!(rejected.message().contains("a different backup is in progress"), "{rejected}");
    // The store works while a backup is open.
    submit(&server, 1).await;
    // Messages have the announced size.
    let mut received = 0;
    while received < MIB {
        let Some(Part::Data(data)) = unread.message().await.unwrap().unwrap().part else {
            panic!()
        };
        assert!(data.len() <= 256 * 1024);
        received += data.len();
    }
    drop((unread, reader));
    open_after_previous(&api).await;

    // The proxy runs in this thread, so that the client cannot receive the whole backup before a signal.
    let loopback = LoopbackAddress::claim();
    let target = server.url.trim_start_matches("http://").parse().unwrap();
    let proxy = Proxy::start(loopback.next(), target).await;
    let url = format!("http://{}", proxy.address);
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("backup");
    for signal in [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let arguments = ["--server", &url];
        let mut command = command_with_signals("--default-signal", &server, &arguments, &file);
        let mut client = Process::spawn(command.stderr(Stdio::piped()));
        // Like a terminal that is closed.
        drop(client.stderr());
        wait_for_incomplete_file(folder.path()).await;
        proxy.pause();
        client.signal(signal);
        let code = client.wait().code();
        proxy.resume();
        if signal == Signal::KILL {
            // Only its owner can read the incomplete file.
            let [name] = &names(folder.path())[..] else { panic!("one file is left") };
            let left = folder.path().join(name);
            assert_eq!(fs::metadata(&left).unwrap().permissions().mode() & 0o777, 0o600);
            fs::remove_file(left).unwrap();
        } else {
            assert_eq!(code, Some(130));
        }
        assert_eq!(names(folder.path()), [""; 0]);
        open_after_previous(&api).await;
        assert_eq!(temporary_files(&server), [""; 0]);
    }
}

#[tokio::test]
async fn a_hangup_that_is_ignored_does_not_end_a_backup() {
    let server = Server::start(&[QUIET]);
    submit(&server, 128).await;
    let loopback = LoopbackAddress::claim();
    let target = server.url.trim_start_matches("http://").parse().unwrap();
    let proxy = Proxy::start(loopback.next(), target).await;
    let url = format!("http://{}", proxy.address);
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("backup");
    // As `nohup` starts it.
    let arguments = ["--server", &url];
    let mut command = command_with_signals("--ignore-signal=HUP", &server, &arguments, &file);
    command.stdout(Stdio::null());
    let mut client = Process::spawn(&mut command);
    wait_for_incomplete_file(folder.path()).await;
    proxy.pause();
    client.signal(Signal::HUP);
    proxy.resume();
    let code = tokio::task::spawn_blocking(move || client.wait().code()).await.unwrap();
    assert_eq!(code, Some(0));
    assert_eq!(names(folder.path()), ["backup"]);
}

#[tokio::test]
async fn a_client_that_stops_reading_loses_the_backup_when_its_token_expires() {
    let server = Server::start(&[QUIET, "auth.leeway=0ms"]);
    submit(&server, 128).await;
    let token = server.token_for("acme", "olga", &["operator"], Duration::from_secs(5));
    let reader = Api::new(&server.url, &token).unwrap();
    let (_, mut unread) = open(&reader).await.unwrap();
    // The client answers the pings of the server, but does not read.
    open_after_previous(&api(&server, &["operator"])).await;
    let status = loop {
        match unread.message().await {
            Ok(part) => assert!(matches!(part.unwrap().part, Some(Part::Data(_)))),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
}
