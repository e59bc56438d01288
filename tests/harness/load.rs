//! Clients that submit requests and follow them to their end, whatever dies; what they were told is
//! recorded and judged by `check-history`, a program of its own.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    env, fs,
    io::Write,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use serde_json::{Value, json};
use streamer_client::{Follower, Session, Target};
use tokio::{sync::Notify, task::JoinSet};

use crate::{Process, Random, checker};

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
    /// No error is taken for a lost connection.
    strict: bool,
}

impl History {
    fn record(&self, record: Value) {
        self.records.lock().unwrap().push(record);
        self.seen.fetch_add(1, Ordering::SeqCst);
        self.heard.notify_waiters();
    }

    fn is_acknowledged(&self, id: &str) -> bool {
        let records = self.records.lock().unwrap();
        records.iter().any(|record| record["record"] == "acknowledged" && record["id"] == *id)
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

/// Clients under way.
pub struct Load {
    history: Arc<History>,
    clients: JoinSet<()>,
    urls: Vec<String>,
    token: String,
    seed: u64,
}

impl Load {
    /// Starts clients that connect to these servers, one after the other. Where they may see no error
    /// but that of a request, `strict` records any other.
    #[must_use]
    pub fn start(urls: &[String], token: &str, seed: u64, strict: bool) -> Self {
        let history = Arc::new(History { strict, ..History::default() });
        let mut clients = JoinSet::new();
        for position in 0..IN_FLIGHT {
            let mut urls = urls.to_vec();
            let count = urls.len();
            urls.rotate_left(position % count);
            let (token, history) = (token.to_owned(), history.clone());
            let random = Random::new(seed + 1 + position as u64);
            clients.spawn(submit_on(urls, token, format!("c{position}"), random, history));
        }
        Self { history, clients, urls: urls.to_vec(), token: token.to_owned(), seed }
    }

    /// Returns once clients have seen so many messages more.
    pub async fn more(&self, count: usize) {
        self.history.more(count).await;
    }

    /// Lets the clients end, reads every log, and has all of it judged.
    ///
    /// # Panics
    /// When a promise was broken.
    pub async fn judge(mut self, name: &str) {
        self.history.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = self.clients.join_next().await {
            ended.unwrap();
        }
        record_logs(&self.urls[0], &self.token, &self.history).await;
        judge(name, self.seed, &self.history);
    }
}

/// Submits one request after the other and follows each to its end, whatever dies.
async fn submit_on(
    urls: Vec<String>,
    token: String,
    name: String,
    mut random: Random,
    history: Arc<History>,
) {
    for count in 0_usize.. {
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
        let view = |watcher: &str| View {
            urls: urls.clone(),
            tries: count,
            token: token.clone(),
            id: id.clone(),
            watcher: format!("{id}/{watcher}"),
            last_seq: None,
            acknowledged: false,
        };
        let submitter = follow(view("submitter"), Some(message), &history);
        // Every third is watched by somebody else too, who comes when he likes.
        if random.below(3) == 0 {
            let late = random.below(10);
            let after_seq = 1 + i64::try_from(random.below(4)).unwrap();
            let watcher = async {
                history.more(late).await;
                follow(View { last_seq: Some(after_seq), ..view("watcher") }, None, &history).await;
            };
            tokio::join!(submitter, watcher);
        } else {
            submitter.await;
        }
    }
}

/// Somebody who wants to see a request to its end.
struct View {
    /// Gone through, one after the other.
    urls: Vec<String>,
    tries: usize,
    token: String,
    id: String,
    watcher: String,
    /// What was seen last, or what is asked for first.
    last_seq: Option<i64>,
    acknowledged: bool,
}

/// Connects again and again until the end was seen. Records what it asked for and every event that
/// it was sent, also those that nobody asked for: the checker knows what should have come.
async fn follow(mut view: View, submission: Option<Value>, history: &History) {
    while !follow_once(&mut view, submission.as_ref(), history).await {
        tokio::task::yield_now().await;
    }
}

/// Says whether the end was seen; not so when the connection was lost.
async fn follow_once(view: &mut View, submission: Option<&Value>, history: &History) -> bool {
    let url = &view.urls[view.tries % view.urls.len()];
    view.tries += 1;
    let Ok(mut session) = Session::connect(url, &view.token).await else { return false };
    let opening = match (view.last_seq, submission) {
        (None, Some(submission)) => submission.clone(),
        (last_seq, _) => json!({
            "type": "subscribe", "request_id": view.id, "after_seq": last_seq,
        }),
    };
    // As of before it is asked for.
    let acknowledged = view.acknowledged || history.is_acknowledged(&view.id);
    if session.send(opening.to_string()).await.is_err() {
        return false;
    }
    let opened = |after_seq: i64| {
        json!({
            "record": "opened", "watcher": view.watcher, "id": view.id, "after_seq": after_seq,
        })
    };
    if let Some(last_seq) = view.last_seq {
        history.record(opened(last_seq));
    }
    loop {
        let Ok(message) = session.next().await else { return false };
        let value: Value = serde_json::from_str(&message.text).unwrap();
        match (message.kind.as_str(), message.seq) {
            // It stands for the first event; those after it follow.
            ("acknowledgment", _) => {
                let (id, uid) = (&value["request_id"], &value["uid"]);
                history.record(opened(1));
                history.record(json!({"record": "acknowledged", "id": id, "uid": uid}));
                (view.last_seq, view.acknowledged) = (Some(1), true);
            }
            (kind, Some(seq)) => {
                let record = json!({"record": "seen", "watcher": view.watcher, "event": value});
                history.record(record);
                view.last_seq = Some(seq);
                if matches!(kind, "complete" | "error" | "cancelled") {
                    return true;
                }
            }
            ("error", None) => {
                let code = value["error"]["code"].as_str().unwrap().to_owned();
                if code == "NOT_FOUND" && !acknowledged {
                    return false;
                }
                // While the other progress service is killed and a busy machine keeps this one from its
                // store, no one can serve a watch; clients come again.
                let message = value["error"]["message"].as_str().unwrap_or_default();
                if code == "UNAVAILABLE" && message.contains("cannot reach its store") {
                    return false;
                }
                if matches!(code.as_str(), "NOT_FOUND" | "INVALID_ACTION") || history.strict {
                    let record =
                        json!({"record": "refused", "watcher": view.watcher, "why": value});
                    history.record(record);
                    return true;
                }
                return false;
            }
            // A snapshot, or of the connection.
            _ => {}
        }
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
        let mut follower = Follower::new(url, token.to_owned(), target);
        let mut events = Vec::new();
        while let Some(message) = follower.next().await.unwrap() {
            if message.seq.is_some() {
                events.push(serde_json::from_str::<Value>(&message.text).unwrap());
            }
        }
        history.record(json!({"record": "log", "uid": uid, "events": events}));
    }
}

fn judge(name: &str, seed: u64, history: &History) {
    let path = env::temp_dir().join(format!("streamer-history-{name}-{seed}.jsonl"));
    let mut file = fs::File::create(&path).unwrap();
    for record in history.records.lock().unwrap().iter() {
        writeln!(file, "{record}").unwrap();
    }
    let judged = Process::output(Process::command(checker()).arg(&path));
    let told = String::from_utf8_lossy(&judged.stdout);
    println!("{told}");
    assert!(judged.status.success(), "seed {seed}, history in {}:\n{told}", path.display());
    fs::remove_file(&path).unwrap();
}
