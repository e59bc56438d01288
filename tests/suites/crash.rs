//! `kill -9` at random moments of the server and of its workers, under load. What everybody was told
//! is recorded and judged by `check-history`, a program of its own.
//!
//! `STREAMER_TESTS_KILLS` sets how many kills (200), `STREAMER_TESTS_SEED` the moments; a failed run
//! says its seed and leaves its history.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    env, fs,
    io::Write,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use serde_json::{Value, json};
use streamer_client::{Follower, Message, Target};
use streamer_tests::{Random, Server, WorkerProcess, checker, offered};
use tokio::{sync::Notify, task::JoinSet};

/// Requests that are underway at once.
const IN_FLIGHT: usize = 12;

/// What is recorded, and what the killer waits for.
#[derive(Default)]
struct History {
    records: Mutex<Vec<Value>>,
    /// Messages that clients have seen.
    seen: AtomicUsize,
    heard: Notify,
    stop: AtomicBool,
}

impl History {
    fn record(&self, record: Value) {
        self.records.lock().unwrap().push(record);
        self.seen.fetch_add(1, Ordering::SeqCst);
        self.heard.notify_waiters();
    }

    /// Returns once clients have seen so many messages more.
    async fn more(&self, count: usize) {
        let enough = self.seen.load(Ordering::SeqCst) + count;
        loop {
            let heard = self.heard.notified();
            if self.seen.load(Ordering::SeqCst) >= enough {
                return;
            }
            heard.await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_promise_is_broken_by_kills_of_the_server() {
    let server = server("*");
    run("server", server, 0, number("STREAMER_TESTS_KILLS", 200) / 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_promise_is_broken_by_kills_of_server_and_workers() {
    let server = server("echo");
    run("workers", server, 2, number("STREAMER_TESTS_KILLS", 200).div_ceil(2)).await;
}

fn server(local_actions: &str) -> Server {
    Server::start(&[
        &format!("execution.local_actions={local_actions}"),
        "execution.lease_ms=500",
        "execution.poll_interval_ms=50",
        "execution.tenant_share_percent=100",
    ])
}

fn number(variable: &str, default: usize) -> usize {
    env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

async fn run(name: &str, mut server: Server, workers: usize, kills: usize) {
    let seed = number("STREAMER_TESTS_SEED", 20_261_125);
    let mut random = Random::new(seed as u64);
    let token = server.token("acme", "ann", &["worker:*"]);
    let mut workers: Vec<_> = (0..workers).map(|_| worker(&server, &token)).collect();
    let all = i32::try_from(workers.len()).unwrap();
    offered(&server, &token, "echo_async", all).await;
    let history = Arc::new(History::default());
    let mut clients = JoinSet::new();
    for position in 0..IN_FLIGHT {
        let (url, token, history) = (server.url.clone(), token.clone(), history.clone());
        let random = Random::new(seed as u64 + 1 + position as u64);
        clients.spawn(submit_on(url, token, format!("c{position}"), random, history));
    }
    let mut killed = 0;
    while killed < kills {
        history.more(random.below(60)).await;
        let victim = random.below(workers.len() * 2 + 1);
        if victim < workers.len() {
            workers[victim] = worker(&server, &token);
        } else {
            server.kill_and_restart();
        }
        killed += 1;
    }
    history.stop.store(true, Ordering::SeqCst);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    record_logs(&server.url, &token, &history).await;
    println!("{name}: {killed} kills, seed {seed}");
    judge(name, seed, &history);
}

/// A new worker; the one that it takes the place of is killed when dropped.
fn worker(server: &Server, token: &str) -> WorkerProcess {
    WorkerProcess::spawn(server, token, "echo_async", &["--slots", "8"])
}

/// Submits one request after the other and follows each to its end, whatever dies.
async fn submit_on(
    url: String,
    token: String,
    name: String,
    mut random: Random,
    history: Arc<History>,
) {
    for count in 0.. {
        if history.stop.load(Ordering::SeqCst) {
            return;
        }
        let id = format!("{name}-{count}");
        let payload = json!({
            "steps": random.below(20), "delay_ms": random.below(8),
            "output_chunks": random.below(10), "chunk_bytes": 1 + random.below(40),
            "fail_attempts": random.below(8) / 7, "result": {"id": id},
        });
        let message =
            json!({"type": "request", "id": id, "action": "echo_async", "payload": payload});
        let target = Target::Submit { id: id.clone(), message: message.to_string() };
        let submitter = follow(&url, &token, target, format!("{id}/submitter"), &history);
        // Every third is watched by somebody else too, who comes when he likes.
        if random.below(3) == 0 {
            let after_seq = 1 + i64::try_from(random.below(4)).unwrap();
            let target = Target::Watch { request_id: id.clone(), after_seq };
            let watcher = async {
                history.more(random.below(10)).await;
                follow(&url, &token, target, format!("{id}/watcher"), &history).await;
            };
            tokio::join!(submitter, watcher);
        } else {
            submitter.await;
        }
    }
}

/// Sees a request to its end and records what is seen.
async fn follow(url: &str, token: &str, target: Target, watcher: String, history: &History) {
    let mut target = target;
    loop {
        let mut follower = Follower::new(url, token, target.clone());
        let failed = loop {
            match follower.next().await {
                Ok(Some(message)) => record(&message, &watcher, history),
                Ok(None) => return,
                Err(error) => break error,
            }
        };
        // The server is killed again and again: patience may end in the middle. A watcher may also
        // come before the request is there.
        let seen = follower.last_seq();
        let may_go_on = failed.is_transient() || failed.to_string().starts_with("NOT_FOUND");
        assert!(may_go_on, "{watcher}: {failed}");
        if seen > 0 {
            let request_id = follower.request_id().to_owned();
            target = Target::Watch { request_id, after_seq: seen };
        }
        tokio::task::yield_now().await;
    }
}

fn record(message: &Message, watcher: &str, history: &History) {
    let value: Value = serde_json::from_str(&message.text).unwrap();
    if message.kind == "acknowledgment" {
        let record = json!({
            "record": "acknowledged", "id": value["request_id"], "uid": value["uid"],
        });
        history.record(record);
    } else if message.seq.is_some() {
        history.record(json!({"record": "seen", "watcher": watcher, "event": value}));
    }
}

/// Reads every log from its beginning.
async fn record_logs(url: &str, token: &str, history: &History) {
    let mut uids: Vec<String> = {
        let records = history.records.lock().unwrap();
        let acknowledged = records.iter().filter(|record| record["record"] == "acknowledged");
        acknowledged.map(|record| record["uid"].as_str().unwrap().to_owned()).collect()
    };
    uids.sort_unstable();
    uids.dedup();
    for uid in uids {
        let target = Target::Watch { request_id: uid.clone(), after_seq: 0 };
        let mut follower = Follower::new(url, token, target);
        let mut events = Vec::new();
        while let Some(message) = follower.next().await.unwrap() {
            if message.seq.is_some() {
                events.push(serde_json::from_str::<Value>(&message.text).unwrap());
            }
        }
        history.record(json!({"record": "log", "uid": uid, "events": events}));
    }
}

fn judge(name: &str, seed: usize, history: &History) {
    let path = env::temp_dir().join(format!("streamer-history-{name}-{seed}.jsonl"));
    let mut file = fs::File::create(&path).unwrap();
    for record in history.records.lock().unwrap().iter() {
        writeln!(file, "{record}").unwrap();
    }
    let judged = Command::new(checker()).arg(&path).output().unwrap();
    let told = String::from_utf8_lossy(&judged.stdout);
    println!("{told}");
    assert!(judged.status.success(), "seed {seed}, history in {}:\n{told}", path.display());
    fs::remove_file(&path).unwrap();
}
