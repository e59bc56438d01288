//! The store file after a simulated crash or disk failure.
//!
//! SQLite's write-ahead log (<https://www.sqlite.org/fileformat2.html#the_write_ahead_log>): a header
//! of 32 bytes, then frames of 24 bytes and a page. After a crash, the data that follows the last fsync may
//! be complete, partial or missing; a page of the main file may be half written only while the log still
//! contains the whole page.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions, Permissions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use serde_json::json;
use streamer_tests::{Client, Process, Random, Server, binary, start_error, within_timeout};
use tempfile::TempDir;

const PAGE: usize = 4096;
const WAL_HEADER: usize = 32;
const FRAME: usize = 24 + PAGE;
/// Setting that disables polling, so that the server writes only because of requests.
const QUIET: [&str; 1] = ["execution.poll_interval=60000ms"];

/// Submits requests that remain queued; returns their names.
async fn submit(server: &Server, names: impl Iterator<Item = String>) -> Vec<String> {
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let mut acknowledged = Vec::new();
    for name in names {
        let payload = json!({"steps": 1, "result": name});
        let message = json!({
            "id": name, "action": "echo_async", "payload": payload, "delay_ms": 3_600_000,
        });
        let reply = client.request(message).await;
        assert_eq!(reply["type"], "acknowledgment", "{reply}");
        acknowledged.push(name);
    }
    acknowledged
}

/// Checks that each acknowledged request exists unchanged.
async fn check(server: &Server, acknowledged: &[String]) {
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    for name in acknowledged {
        let request = client.request(json!({"type": "get", "request_id": name})).await;
        assert_eq!(request["payload"]["result"], **name, "{request}");
        assert_eq!((&request["state"], &request["last_seq"]), (&json!("QUEUED"), &json!(1)));
    }
}

fn copy(from: &Path) -> TempDir {
    let to = TempDir::with_prefix("streamer-torn-").unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        // SQLite rebuilds the shared-memory index from the log after a crash.
        if !entry.file_name().to_string_lossy().ends_with("-shm") {
            fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
        }
    }
    to
}

fn size(path: &Path) -> usize {
    usize::try_from(path.metadata().unwrap().len()).unwrap()
}

fn overwrite(path: &Path, at: usize, bytes: &[u8]) {
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at as u64)).unwrap();
    file.write_all(bytes).unwrap();
}

#[tokio::test]
async fn a_torn_log_loses_no_acknowledged_request() {
    let mut server = Server::start(&QUIET);
    let acknowledged = submit(&server, (0..20).map(|n| format!("kept-{n}"))).await;
    let log = server.data().join("streamer.db-wal");
    let synced = size(&log);
    submit(&server, (0..10).map(|n| format!("later-{n}"))).await;
    server.kill();
    let end = size(&log);
    assert!(end > synced + 2 * FRAME, "the log has grown: {synced} {end}");
    let mut random = Random::new(7);
    for round in 0..24 {
        let torn = copy(server.data());
        let log = torn.path().join("streamer.db-wal");
        let at = synced + random.below(end - synced);
        match round % 3 {
            // The file is truncated, as if it had not grown yet.
            0 => OpenOptions::new().write(true).open(&log).unwrap().set_len(at as u64).unwrap(),
            // The file contains zeros, as if it had grown before the data was written.
            1 => overwrite(&log, at, &vec![0; end - at]),
            // The data is partially written.
            _ => {
                let noise: Vec<u8> = (0..512).map(|_| random.below(256) as u8).collect();
                overwrite(&log, at, &noise[..512.min(end - at)]);
            }
        }
        let restarted = Server::start_in(torn, &QUIET);
        check(&restarted, &acknowledged).await;
    }
}

#[tokio::test]
async fn pages_half_written_by_a_checkpoint_are_recovered_from_the_log() {
    let mut server = Server::start(&QUIET);
    let mut acknowledged = submit(&server, (0..30).map(|n| format!("early-{n}"))).await;
    // Opening the store writes pages from the log to the file: from now on, both contain pages.
    server.kill_and_restart();
    acknowledged.extend(submit(&server, (0..30).map(|n| format!("kept-{n}"))).await);
    server.kill();
    let mut log = Vec::new();
    let path = server.data().join("streamer.db-wal");
    fs::File::open(path).unwrap().read_to_end(&mut log).unwrap();
    let frames = log[WAL_HEADER..].chunks_exact(FRAME);
    let pages: BTreeSet<usize> = frames
        .map(|frame| u32::from_be_bytes(frame[..4].try_into().unwrap()) as usize)
        .filter(|page| page * PAGE <= size(&server.data().join("streamer.db")))
        .collect();
    assert!(pages.len() > 3, "{pages:?}");
    let mut random = Random::new(11);
    for _ in 0..8 {
        let torn = copy(server.data());
        for page in &pages {
            if random.below(2) == 0 {
                let at = (page - 1) * PAGE + random.below(PAGE);
                let noise = vec![0xa5; page * PAGE - at];
                // SQLite never changes the start of the file, which identifies its format.
                overwrite(
                    &torn.path().join("streamer.db"),
                    at.max(100),
                    &noise[..noise.len().min(page * PAGE - at.max(100))],
                );
            }
        }
        let restarted = Server::start_in(torn, &QUIET);
        check(&restarted, &acknowledged).await;
    }
}

/// Returns a cleanly closed store with one request whose ID and payload contain `marker`.
async fn closed_store_with(marker: &str) -> TempDir {
    let mut server = Server::start(&QUIET);
    submit(&server, std::iter::once(marker.to_owned())).await;
    submit(&server, (0..200).map(|n| format!("other-{n}"))).await;
    assert_eq!(server.stop(), Some(0));
    copy(server.data())
}

/// Returns the offsets of `marker` in the file. In the row of the request, returns the offset of the action
/// instead, because SQLite reads the ID from the index.
fn offsets(data: &TempDir, marker: &str) -> Vec<usize> {
    const ACTION: &[u8] = b"echo_async";
    let file = fs::read(data.path().join("streamer.db")).unwrap();
    let windows = file.windows(marker.len()).enumerate();
    let offsets = windows.filter(|(_, window)| *window == marker.as_bytes());
    offsets
        .map(|(at, _)| {
            let after = at + marker.len();
            let rest = &file[after..file.len().min(after + 32)];
            rest.windows(ACTION.len()).position(|w| w == ACTION).map_or(at, |at| after + at)
        })
        .collect()
}

#[tokio::test]
async fn a_value_corrupted_on_disk_is_reported_and_not_served() {
    const MARKER: &str = "a-marker-that-is-unique-in-a-file";
    let data = closed_store_with(MARKER).await;
    let offsets = offsets(&data, MARKER);
    assert!(offsets.len() >= 3, "row, index and payload contain the marker: {offsets:?}");
    let mut reported = 0;
    for at in offsets {
        let corrupt = copy(data.path());
        overwrite(&corrupt.path().join("streamer.db"), at, b"A");
        let server = Server::start_in(corrupt, &QUIET);
        let token = server.token("acme", "ann", &["requests:read"]);
        let mut client = Client::connect(&server.url, &token).await;
        let reply = client.request(json!({"type": "get", "request_id": MARKER})).await;
        // A request with a corrupt index entry is not found; served values are intact.
        match reply["type"].as_str().unwrap() {
            "error" if reply["error"]["code"] == "INTERNAL_ERROR" => reported += 1,
            "error" => assert_eq!(reply["error"]["code"], "NOT_FOUND", "{reply}"),
            _ => assert_eq!(reply["payload"]["result"], MARKER, "{reply}"),
        }
    }
    assert!(reported >= 2, "row and payload are checked: {reported}");
}

#[tokio::test]
async fn the_server_does_not_start_with_a_corrupt_store() {
    let data = closed_store_with("x").await;
    let file = data.path().join("streamer.db");
    let half = size(&file) / 2 / PAGE * PAGE;
    let truncated = copy(data.path());
    let path = truncated.path().join("streamer.db");
    OpenOptions::new().write(true).open(path).unwrap().set_len(half as u64).unwrap();
    let error = start_error(truncated.path());
    assert!(error.contains("corrupt"), "{error}");
    let foreign = copy(data.path());
    overwrite(&foreign.path().join("streamer.db"), 0, &[b'x'; 4096]);
    let error = start_error(foreign.path());
    assert!(error.contains("corrupt"), "{error}");
}

#[tokio::test]
async fn submissions_are_rejected_when_store_files_are_missing() {
    type Loss = fn(&Path);
    let losses: [Loss; 4] = [
        |data| fs::remove_file(data.join("streamer.db")).unwrap(),
        |data| fs::remove_file(data.join("streamer.db-wal")).unwrap(),
        |data| fs::rename(data, data.with_extension("moved")).unwrap(),
        |data| {
            let copied = data.join("copied.db");
            fs::copy(data.join("streamer.db"), &copied).unwrap();
            fs::rename(copied, data.join("streamer.db")).unwrap();
        },
    ];
    for lose in losses {
        let server = Server::start(&QUIET);
        let moved = server.data().with_extension("moved");
        let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
        let request = json!({"action": "echo_async", "delay_ms": 3_600_000});
        assert_eq!(client.request(request.clone()).await["type"], "acknowledgment");
        lose(server.data());
        let rejected = client.request(request).await;
        assert_eq!(rejected["error"]["code"], "UNAVAILABLE", "{rejected}");
        let not_ready = async {
            while is_ready(&server.url) {
                tokio::task::yield_now().await;
            }
        };
        within_timeout("the readiness check to fail", not_ready).await;
        drop(server);
        if moved.exists() {
            fs::remove_dir_all(moved).unwrap();
        }
    }
}

/// Returns whether `streamer health` succeeds.
fn is_ready(url: &str) -> bool {
    let mut command = Process::command(binary());
    Process::output(command.args(["health", "--server", url]).env_clear()).status.success()
}

#[tokio::test]
async fn store_files_are_accessible_only_to_their_owner() {
    let data = TempDir::with_prefix("streamer-test-").unwrap();
    // Earlier versions created the file with this mode.
    let database = data.path().join("streamer.db");
    fs::write(&database, "").unwrap();
    fs::set_permissions(&database, Permissions::from_mode(0o644)).unwrap();
    let server = Server::start_in(data, &QUIET);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for entry in fs::read_dir(server.data()).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}
