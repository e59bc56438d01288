//! The promises, as rules over a history.

use std::collections::{BTreeMap, HashMap};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// What was found.
pub(crate) struct Verdict {
    pub(crate) summary: String,
    pub(crate) faults: Vec<String>,
}

#[derive(Default)]
struct Found {
    faults: Vec<String>,
}

impl Found {
    fn expect(&mut self, holds: bool, fault: impl FnOnce() -> String) {
        if !holds {
            self.faults.push(fault());
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
pub(crate) fn check(history: &[Value]) -> Verdict {
    let mut found = Found::default();
    let mut uid_of = BTreeMap::new();
    let mut logs: HashMap<&str, &[Value]> = HashMap::new();
    // What a watcher asked for and got, opening by opening.
    let mut views: BTreeMap<&str, Vec<View<'_>>> = BTreeMap::new();
    for record in history {
        match text(record, "record") {
            "acknowledged" => {
                let (id, uid) = (text(record, "id"), text(record, "uid"));
                let known = *uid_of.entry(id).or_insert(uid);
                found.expect(known == uid, || format!("id {id} stands for {known} and for {uid}"));
            }
            "opened" => {
                let view = View {
                    id: text(record, "id"),
                    after: number(record, "after_seq"),
                    events: vec![],
                };
                views.entry(text(record, "watcher")).or_default().push(view);
            }
            "seen" => {
                let watcher = text(record, "watcher");
                match views.get_mut(watcher).and_then(|views| views.last_mut()) {
                    Some(view) => view.events.push(&record["event"]),
                    None => found.faults.push(format!("{watcher} saw what it had not asked for")),
                }
            }
            "refused" => {
                found.faults.push(format!(
                    "{} was refused: {}",
                    text(record, "watcher"),
                    record["why"]
                ));
            }
            "log" => {
                let events = record["events"].as_array().map_or(&[][..], Vec::as_slice);
                logs.insert(text(record, "uid"), events);
            }
            other => found.faults.push(format!("a record of unknown kind {other:?}")),
        }
    }
    for (id, uid) in &uid_of {
        match logs.get(uid) {
            Some(log) => check_log(id, log, &mut found),
            None => found.faults.push(format!("{id} was acknowledged and has no log")),
        }
    }
    for (watcher, views) in &views {
        for view in views {
            match uid_of.get(view.id).and_then(|uid| logs.get(uid)) {
                Some(log) => check_view(watcher, view, log, &mut found),
                None => {
                    found.faults.push(format!("{watcher} watched {}, which is not there", view.id));
                }
            }
        }
        let whole = views.last().and_then(|view| view.events.last());
        found.expect(whole.is_some_and(|event| is_terminal(event)), || {
            format!("{watcher}: did not see the end")
        });
    }
    let events: usize = logs.values().map(|log| log.len()).sum();
    let retried = logs.values().filter(|log| log.iter().any(|e| text(e, "type") == "retrying"));
    let summary = format!(
        "{} acknowledged requests, {} logs with {events} events, {} of them retried, {} views",
        uid_of.len(),
        logs.len(),
        retried.count(),
        views.len()
    );
    Verdict { summary, faults: found.faults }
}

/// A log is gapless, has one terminal event, its attempts follow each other, and the proof of its
/// output holds.
fn check_log(id: &str, log: &[Value], found: &mut Found) {
    for (position, event) in log.iter().enumerate() {
        let seq = number(event, "seq");
        found.expect(usize::try_from(seq).ok() == Some(position + 1), || {
            format!("{id}: event {} of the log has seq {seq}", position + 1)
        });
        found.expect(text(event, "request_id") == id, || {
            format!("{id}: seq {seq} is of {}", text(event, "request_id"))
        });
    }
    let ends = log.iter().filter(|event| is_terminal(event)).count();
    found.expect(ends == 1, || format!("{id}: {ends} terminal events"));
    found.expect(log.last().is_some_and(is_terminal), || format!("{id}: the last event is no end"));
    check_attempts(id, log, found);
    check_output(id, log, found);
    check_outcome(id, log, found);
}

fn check_attempts(id: &str, log: &[Value], found: &mut Found) {
    let (mut attempt, mut started_at, mut running) = (0, 0, false);
    for event in log {
        let (seq, kind) = (number(event, "seq"), text(event, "type"));
        let of = number(event, "attempt");
        match kind {
            _ if (seq == 1) != (kind == "accepted") => {
                found.faults.push(format!("{id}: seq {seq} is {kind}"));
            }
            "accepted" => {}
            "started" => {
                found.expect(!running && of == attempt + 1, || {
                    format!("{id}: seq {seq} starts attempt {of} after attempt {attempt}")
                });
                (attempt, started_at, running) = (of, seq, true);
            }
            _ => {
                found.expect(of == attempt, || {
                    format!("{id}: seq {seq} ({kind}) is of attempt {of}, attempt {attempt} has it")
                });
                let may_come = running || is_terminal(event);
                found.expect(may_come, || format!("{id}: seq {seq} ({kind}) while nothing ran"));
            }
        }
        if kind == "retrying" {
            running = false;
            let rewind = number(event, "rewind_to_seq");
            found.expect(rewind == started_at, || {
                format!("{id}: seq {seq} rewinds to {rewind}, its attempt started at {started_at}")
            });
        }
    }
}

fn check_output(id: &str, log: &[Value], found: &mut Found) {
    let mut chunks: Vec<(i64, Vec<u8>)> = Vec::new();
    for event in log {
        let seq = number(event, "seq");
        if text(event, "type") == "output" {
            let index = number(event, "chunk_index");
            found.expect(usize::try_from(index).ok() == Some(chunks.len()), || {
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
            let sha256: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            let proof = &event["output"];
            let (count, told) = (number(proof, "chunks"), text(proof, "sha256"));
            found.expect(
                usize::try_from(count).ok() == Some(chunks.len()) && told == sha256,
                || {
                    format!(
                        "{id}: the proof tells {count} chunks {told}, the log {} {sha256}",
                        chunks.len()
                    )
                },
            );
        }
    }
}

/// The bytes of a chunk. A JSON chunk of the load is one that its handler wrote without white space,
/// so writing it again gives the same bytes.
fn bytes(event: &Value) -> Vec<u8> {
    let data = text(event, "data");
    match (event.get("content_type"), text(event, "encoding")) {
        (None, _) => event["data"].to_string().into_bytes(),
        (Some(_), "base64") => STANDARD.decode(data).unwrap_or_default(),
        (Some(_), _) => data.as_bytes().to_vec(),
    }
}

/// The requests of the load say in their payload what their result must be: `{"id": <their id>}`.
fn check_outcome(id: &str, log: &[Value], found: &mut Found) {
    let Some(end) = log.last().filter(|event| is_terminal(event)) else { return };
    match text(end, "type") {
        "complete" => found.expect(end["result"]["id"] == id, || {
            format!("{id}: has the result {}", end["result"])
        }),
        "error" => found.expect(number(end, "attempt") >= 10, || {
            format!("{id}: failed though attempts were left: {}", end["error"])
        }),
        other => found.faults.push(format!("{id}: {other}, though nobody asked for it")),
    }
}

/// One opening of a watch.
struct View<'a> {
    id: &'a str,
    after: i64,
    events: Vec<&'a Value>,
}

/// What a watcher was sent is the log, from just after where it asked, without gap or repeat.
fn check_view(watcher: &str, view: &View<'_>, log: &[Value], found: &mut Found) {
    let mut last = view.after;
    for event in &view.events {
        let seq = number(event, "seq");
        found.expect(seq == last + 1, || format!("{watcher}: was sent seq {seq} after {last}"));
        last = seq;
        let stored = usize::try_from(seq - 1).ok().and_then(|position| log.get(position));
        found.expect(stored == Some(*event), || {
            format!("{watcher}: was sent {event}, the log has {stored:?}")
        });
    }
}

#[cfg(test)]
mod tests;
