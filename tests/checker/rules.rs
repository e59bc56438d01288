//! Checks the guarantees, which are expressed as rules about a history.

use std::collections::{BTreeMap, HashMap};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;
use sha2::{Digest, Sha256};
use streamer_core::hex;

/// Result of a check.
pub(crate) struct Report {
    pub(crate) summary: String,
    pub(crate) violations: Vec<String>,
}

/// Violations found so far.
#[derive(Default)]
struct Violations(Vec<String>);

impl Violations {
    fn push(&mut self, violation: String) {
        self.0.push(violation);
    }

    /// Adds a violation unless `holds` is true.
    fn expect(&mut self, holds: bool, violation: impl FnOnce() -> String) {
        if !holds {
            self.push(violation());
        }
    }
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("")
}

fn number(value: &Value, name: &str) -> i64 {
    value[name].as_i64().unwrap_or(-1)
}

fn is_terminal(event: &Value) -> bool {
    matches!(text(event, "type"), "complete" | "error" | "cancelled")
}

/// Checks every rule.
pub(crate) fn check(history: &[Value]) -> Report {
    let mut violations = Violations::default();
    let mut uid_of = BTreeMap::new();
    let mut logs: HashMap<&str, &[Value]> = HashMap::new();
    // Watches by watcher, in the order in which they were opened.
    let mut watches: BTreeMap<&str, Vec<Watch<'_>>> = BTreeMap::new();
    for record in history {
        match text(record, "record") {
            "acknowledged" => {
                let (id, uid) = (text(record, "id"), text(record, "uid"));
                let known = *uid_of.entry(id).or_insert(uid);
                violations.expect(known == uid, || {
                    format!("id {id} has two requests, {known} and {uid}")
                });
            }
            "opened" => {
                let watch = Watch {
                    id: text(record, "id"),
                    after: number(record, "after_seq"),
                    events: vec![],
                };
                watches.entry(text(record, "watcher")).or_default().push(watch);
            }
            "received" => {
                let watcher = text(record, "watcher");
                match watches.get_mut(watcher).and_then(|watches| watches.last_mut()) {
                    Some(watch) => watch.events.push(&record["event"]),
                    None => violations.push(format!("{watcher} received an event without a watch")),
                }
            }
            "rejected" => {
                violations.push(format!(
                    "{} was rejected: {}",
                    text(record, "watcher"),
                    record["error"]
                ));
            }
            "log" => {
                let events = record["events"].as_array().map_or(&[][..], Vec::as_slice);
                logs.insert(text(record, "uid"), events);
            }
            other => violations.push(format!("unknown record {other:?}")),
        }
    }
    for (id, uid) in &uid_of {
        match logs.get(uid) {
            Some(log) => check_log(id, log, &mut violations),
            None => violations.push(format!("{id} was acknowledged and has no log")),
        }
    }
    for (watcher, watches) in &watches {
        for watch in watches {
            match uid_of.get(watch.id).and_then(|uid| logs.get(uid)) {
                Some(log) => check_watch(watcher, watch, log, &mut violations),
                None => {
                    violations.push(format!("{watcher} watched {}, which has no log", watch.id));
                }
            }
        }
        let last = watches.last().and_then(|watch| watch.events.last());
        violations.expect(last.is_some_and(|event| is_terminal(event)), || {
            format!("{watcher}: did not receive the terminal event")
        });
    }
    let events: usize = logs.values().map(|log| log.len()).sum();
    let retried = logs.values().filter(|log| log.iter().any(|e| text(e, "type") == "retrying"));
    let summary = format!(
        "{} acknowledged requests, {} logs with {events} events, {} of them retried, {} watchers",
        uid_of.len(),
        logs.len(),
        retried.count(),
        watches.len()
    );
    Report { summary, violations: violations.0 }
}

/// Checks that a log has no gaps and exactly one terminal event, that its attempts do not overlap, and that its
/// output digest and result are correct.
fn check_log(id: &str, log: &[Value], violations: &mut Violations) {
    for (position, event) in log.iter().enumerate() {
        let seq = number(event, "seq");
        violations.expect(usize::try_from(seq).ok() == Some(position + 1), || {
            format!("{id}: event {} of the log has seq {seq}", position + 1)
        });
        violations.expect(text(event, "request_id") == id, || {
            format!("{id}: seq {seq} belongs to {}", text(event, "request_id"))
        });
    }
    let ends = log.iter().filter(|event| is_terminal(event)).count();
    violations.expect(ends == 1, || format!("{id}: {ends} terminal events"));
    violations.expect(log.last().is_some_and(is_terminal), || {
        format!("{id}: the last event is not terminal")
    });
    check_attempts(id, log, violations);
    check_output(id, log, violations);
    check_outcome(id, log, violations);
}

fn check_attempts(id: &str, log: &[Value], violations: &mut Violations) {
    let (mut current, mut started_at, mut running) = (0, 0, false);
    for event in log {
        let (seq, kind) = (number(event, "seq"), text(event, "type"));
        let attempt = number(event, "attempt");
        match kind {
            _ if (seq == 1) != (kind == "accepted") => {
                violations.push(format!("{id}: seq {seq} is {kind}"));
            }
            "accepted" => {}
            "started" => {
                violations.expect(!running && attempt == current + 1, || {
                    format!("{id}: seq {seq} starts attempt {attempt} after attempt {current}")
                });
                (current, started_at, running) = (attempt, seq, true);
            }
            _ => {
                violations.expect(attempt == current, || {
                    format!(
                        "{id}: seq {seq} ({kind}) is of attempt {attempt}, current is {current}"
                    )
                });
                let is_allowed = running || is_terminal(event);
                violations.expect(is_allowed, || {
                    format!("{id}: seq {seq} ({kind}) while no attempt was running")
                });
            }
        }
        if kind == "retrying" {
            running = false;
            let rewind = number(event, "rewind_to_seq");
            violations.expect(rewind == started_at, || {
                format!("{id}: seq {seq} rewinds to {rewind}, its attempt started at {started_at}")
            });
        }
    }
}

fn check_output(id: &str, log: &[Value], violations: &mut Violations) {
    let mut chunks: Vec<(i64, Vec<u8>)> = Vec::new();
    for event in log {
        let seq = number(event, "seq");
        if text(event, "type") == "output" {
            let index = number(event, "chunk_index");
            violations.expect(usize::try_from(index).ok() == Some(chunks.len()), || {
                format!("{id}: seq {seq} has chunk {index} after {} chunks", chunks.len())
            });
            chunks.push((seq, bytes(event)));
        }
        if let Some(rewind) = event["rewind_to_seq"].as_i64() {
            chunks.retain(|(seq, _)| *seq <= rewind);
        }
        if is_terminal(event) {
            let mut hash = Sha256::new();
            chunks.iter().for_each(|(_, chunk)| hash.update(chunk));
            let sha256 = hex(&hash.finalize());
            let output = &event["output"];
            let (count, reported) = (number(output, "chunks"), text(output, "sha256"));
            violations.expect(
                usize::try_from(count).ok() == Some(chunks.len()) && reported == sha256,
                || {
                    format!(
                        "{id}: reported output {count} chunks {reported}, the log has {} {sha256}",
                        chunks.len()
                    )
                },
            );
        }
    }
}

/// Returns the bytes of a chunk. The handler of the load writes JSON chunks without white space, so
/// serializing them again gives the same bytes.
fn bytes(event: &Value) -> Vec<u8> {
    let data = text(event, "data");
    match (event.get("content_type"), text(event, "encoding")) {
        (None, _) => event["data"].to_string().into_bytes(),
        (Some(_), "base64") => STANDARD.decode(data).unwrap_or_default(),
        (Some(_), _) => data.as_bytes().to_vec(),
    }
}

/// Checks the result, which must be `{"id": <id of the request>}` for requests of the load.
fn check_outcome(id: &str, log: &[Value], violations: &mut Violations) {
    let Some(terminal) = log.last().filter(|event| is_terminal(event)) else { return };
    match text(terminal, "type") {
        "complete" => violations.expect(terminal["result"]["id"] == id, || {
            format!("{id}: has the result {}", terminal["result"])
        }),
        // The retry policy of the load's action allows 10 failed attempts; the last one has no event `retrying`.
        "error" => {
            let is_failure = |event: &&Value| {
                text(event, "type") == "retrying" && event["released"] != Value::Bool(true)
            };
            violations.expect(log.iter().filter(is_failure).count() == 9, || {
                format!("{id}: failed before its last attempt: {}", terminal["error"])
            });
        }
        other => violations.push(format!("{id}: {other} without a cancel request")),
    }
}

/// Watch of a request.
struct Watch<'a> {
    id: &'a str,
    after: i64,
    events: Vec<&'a Value>,
}

/// Checks that a watcher received the log after the position of the watch, without gaps or repetitions.
fn check_watch(watcher: &str, watch: &Watch<'_>, log: &[Value], violations: &mut Violations) {
    let mut last = watch.after;
    for event in &watch.events {
        let seq = number(event, "seq");
        violations
            .expect(seq == last + 1, || format!("{watcher}: received seq {seq} after {last}"));
        last = seq;
        let stored = usize::try_from(seq - 1).ok().and_then(|position| log.get(position));
        violations.expect(stored == Some(*event), || {
            format!("{watcher}: received {event}, the log has {stored:?}")
        });
    }
}

#[cfg(test)]
mod tests;
