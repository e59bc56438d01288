//! Clients that submit requests and follow them to the terminal event across failures. The messages that
//! they receive are recorded and checked by `check-history`, a separate program.

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
use streamer_client::{Follower, ReceivedMessage, ServerMessage, Session, Target};
use streamer_core::ErrorCode;
use tokio::{sync::Notify, task::JoinSet};

use crate::{Process, Random, checker};

/// Number of concurrent requests.
const IN_FLIGHT: usize = 12;

/// Records of messages, whose number the test also uses for pacing.
#[derive(Default)]
struct History {
    records: Mutex<Vec<Value>>,
    /// Number of records.
    count: AtomicUsize,
    recorded: Notify,
    stop: AtomicBool,
    /// Whether errors are recorded instead of treated as a lost connection.
    strict: bool,
}

impl History {
    fn record(&self, record: Value) {
        self.records.lock().unwrap().push(record);
        self.count.fetch_add(1, Ordering::SeqCst);
        self.recorded.notify_waiters();
    }

    fn is_acknowledged(&self, id: &str) -> bool {
        let records = self.records.lock().unwrap();
        records.iter().any(|record| record["record"] == "acknowledged" && record["id"] == *id)
    }

    /// Waits until `count` more messages are recorded.
    async fn wait_for_messages(&self, count: usize) {
        let target = self.count.load(Ordering::SeqCst) + count;
        loop {
            let recorded = self.recorded.notified();
            if self.count.load(Ordering::SeqCst) >= target {
                return;
            }
            recorded.await;
        }
    }
}

/// Running clients.
pub struct Load {
    history: Arc<History>,
    clients: JoinSet<()>,
    urls: Vec<String>,
    token: String,
    seed: u64,
}

impl Load {
    /// Starts clients that rotate through the given servers. If `strict` is set, every error that is not the
    /// terminal event of a request is recorded.
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

    /// Waits until the clients have received `count` more messages.
    pub async fn wait_for_messages(&self, count: usize) {
        self.history.wait_for_messages(count).await;
    }

    /// Stops the clients, reads every log and checks the history.
    ///
    /// # Panics
    /// Panics if a guarantee was violated.
    pub async fn verify(mut self, name: &str) {
        self.history.stop.store(true, Ordering::SeqCst);
        while let Some(outcome) = self.clients.join_next().await {
            outcome.unwrap();
        }
        record_logs(&self.urls[0], &self.token, &self.history).await;
        verify(name, self.seed, &self.history);
    }
}

/// Submits requests sequentially, and follows each request to its terminal event.
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
        let watch = |watcher: &str| Watch {
            urls: urls.clone(),
            connects: count,
            token: token.clone(),
            id: id.clone(),
            watcher: format!("{id}/{watcher}"),
            last_seq: None,
            acknowledged: false,
        };
        let submitter = follow(watch("submitter"), Some(message), &history);
        // Every third request has a second watcher, which starts at a random time.
        if random.below(3) == 0 {
            let delay = random.below(10);
            let after_seq = 1 + i64::try_from(random.below(4)).unwrap();
            let watcher = async {
                history.wait_for_messages(delay).await;
                follow(Watch { last_seq: Some(after_seq), ..watch("watcher") }, None, &history)
                    .await;
            };
            tokio::join!(submitter, watcher);
        } else {
            submitter.await;
        }
    }
}

/// Watch of one request up to its terminal event.
struct Watch {
    /// URLs of the servers, which are used in rotation.
    urls: Vec<String>,
    connects: usize,
    token: String,
    id: String,
    watcher: String,
    /// Last received `seq`, or the `after_seq` of the first connection.
    last_seq: Option<i64>,
    acknowledged: bool,
}

/// Reconnects until the terminal event arrives. Records each subscription and every received event, including
/// unexpected events, which the checker detects.
async fn follow(mut watch: Watch, submission: Option<Value>, history: &History) {
    while !follow_once(&mut watch, submission.as_ref(), history).await {
        tokio::task::yield_now().await;
    }
}

/// Follows a request on one connection; returns false if the connection is lost before the terminal event.
async fn follow_once(watch: &mut Watch, submission: Option<&Value>, history: &History) -> bool {
    let url = &watch.urls[watch.connects % watch.urls.len()];
    watch.connects += 1;
    let Ok(mut session) = Session::connect(url, &watch.token).await else { return false };
    let opening = match (watch.last_seq, submission) {
        (None, Some(submission)) => submission.clone(),
        (last_seq, _) => json!({
            "type": "subscribe", "request_id": watch.id, "after_seq": last_seq,
        }),
    };
    // The state is read before the message is sent.
    let acknowledged = watch.acknowledged || history.is_acknowledged(&watch.id);
    if session.send(opening.to_string()).await.is_err() {
        return false;
    }
    let opened = |after_seq: i64| {
        json!({
            "record": "opened", "watcher": watch.watcher, "id": watch.id, "after_seq": after_seq,
        })
    };
    if let Some(last_seq) = watch.last_seq {
        history.record(opened(last_seq));
    }
    loop {
        let Ok(ReceivedMessage { message, text, .. }) = session.next().await else { return false };
        let value: Value = serde_json::from_str(&text).unwrap();
        match (&message, message.seq()) {
            // The acknowledgment replaces the first event; the later events follow.
            (ServerMessage::Acknowledgment(acknowledgment), _) => {
                let (id, uid) = (&acknowledgment.request_id, &acknowledgment.uid);
                history.record(opened(1));
                history.record(json!({"record": "acknowledged", "id": id, "uid": uid}));
                (watch.last_seq, watch.acknowledged) = (Some(1), true);
            }
            (_, Some(seq)) => {
                let record =
                    json!({"record": "received", "watcher": watch.watcher, "event": value});
                history.record(record);
                watch.last_seq = Some(seq);
                if let ServerMessage::Complete(_)
                | ServerMessage::Error(_)
                | ServerMessage::Cancelled(_) = message
                {
                    return true;
                }
            }
            (ServerMessage::Error(rejection), None) => {
                let code = rejection.error.error_code();
                if code == ErrorCode::NotFound && !acknowledged {
                    return false;
                }
                // On a busy machine, no progress service can serve a watch while one is killed and the other cannot
                // reach its store; clients retry.
                let message = &rejection.error.message;
                if code == ErrorCode::Unavailable && message.contains("cannot reach its store") {
                    return false;
                }
                if matches!(code, ErrorCode::NotFound | ErrorCode::InvalidAction) || history.strict
                {
                    let record =
                        json!({"record": "rejected", "watcher": watch.watcher, "error": value});
                    history.record(record);
                    return true;
                }
                return false;
            }
            // A snapshot, or a message about the connection.
            _ => {}
        }
    }
}

/// Records every log from its first event.
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
        while let Some(received) = follower.next().await.unwrap() {
            if received.message.seq().is_some() {
                events.push(serde_json::from_str::<Value>(&received.text).unwrap());
            }
        }
        history.record(json!({"record": "log", "uid": uid, "events": events}));
    }
}

/// Runs `check-history`; keeps the history file if it reports violations.
fn verify(name: &str, seed: u64, history: &History) {
    let path = env::temp_dir().join(format!("streamer-history-{name}-{seed}.jsonl"));
    let mut file = fs::File::create(&path).unwrap();
    for record in history.records.lock().unwrap().iter() {
        writeln!(file, "{record}").unwrap();
    }
    let output = Process::output(Process::command(checker()).arg(&path));
    let report = String::from_utf8_lossy(&output.stdout);
    println!("{report}");
    assert!(output.status.success(), "seed {seed}, history in {}:\n{report}", path.display());
    fs::remove_file(&path).unwrap();
}
