use serde_json::json;

use super::*;

fn event(seq: i64, attempt: i64, kind: &str, more: Value) -> Value {
    let mut event = json!({
        "type": kind, "request_id": "r", "uid": "U", "seq": seq, "attempt": attempt,
    });
    let Value::Object(more) = more else { panic!("{more}") };
    event.as_object_mut().unwrap().extend(more);
    event
}

fn output(seq: i64, attempt: i64, index: i64, data: &str) -> Value {
    let more = json!({"chunk_index": index, "data": data, "content_type": "text/plain"});
    event(seq, attempt, "output", more)
}

/// Returns a valid history with two attempts, of which the first is retried and its output discarded.
fn valid_history() -> Vec<Value> {
    let sha256 = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"; // SHA-256 of "ab"
    let log = vec![
        event(1, 0, "accepted", json!({})),
        event(2, 1, "started", json!({})),
        output(3, 1, 0, "x"),
        event(4, 1, "retrying", json!({"rewind_to_seq": 2})),
        event(5, 2, "started", json!({})),
        event(6, 2, "progress", json!({})),
        output(7, 2, 0, "a"),
        output(8, 2, 1, "b"),
        event(
            9,
            2,
            "complete",
            json!({"result": {"id": "r"}, "output": {"chunks": 2, "sha256": sha256}}),
        ),
    ];
    let mut history = vec![
        json!({"record": "acknowledged", "id": "r", "uid": "U"}),
        json!({"record": "opened", "watcher": "w", "id": "r", "after_seq": 1}),
    ];
    history.extend(
        log.iter().skip(1).map(|e| json!({"record": "received", "watcher": "w", "event": e})),
    );
    history.push(json!({"record": "log", "uid": "U", "events": log}));
    history
}

fn log(history: &mut [Value]) -> &mut Vec<Value> {
    history.last_mut().unwrap()["events"].as_array_mut().unwrap()
}

/// Returns the violations that a change of the valid history causes.
fn violations(change: impl FnOnce(&mut Vec<Value>)) -> String {
    let mut history = valid_history();
    change(&mut history);
    check(&history).violations.join("\n")
}

#[test]
fn a_valid_history_has_no_violations() {
    assert_eq!(violations(|_| {}), "");
}

#[test]
fn lost_events_are_detected() {
    assert!(violations(|history| drop(history.pop())).contains("acknowledged and has no log"));
    assert!(violations(|history| drop(log(history).remove(5))).contains("has seq 7"));
    assert!(violations(|history| drop(log(history).pop())).contains("0 terminal events"));
    assert!(violations(|history| drop(history.remove(4))).contains("received seq 5 after 3"));
    assert!(
        violations(|history| drop(history.remove(9)))
            .contains("did not receive the terminal event")
    );
}

#[test]
fn missing_first_and_repeated_events_are_detected() {
    assert!(violations(|history| drop(history.remove(2))).contains("received seq 3 after 1"));
    let twice = violations(|history| history.insert(4, history[3].clone()));
    assert!(twice.contains("received seq 3 after 3"), "{twice}");
    let rejected = json!({"record": "rejected", "watcher": "w", "error": "NOT_FOUND"});
    assert!(violations(|history| history.insert(2, rejected)).contains("was rejected"));
    let first = violations(|history| log(history)[0]["type"] = "progress".into());
    assert!(first.contains("seq 1 is progress"), "{first}");
}

#[test]
fn duplicates_and_reordered_events_are_detected() {
    let again = json!({"record": "acknowledged", "id": "r", "uid": "V"});
    assert!(violations(|history| history.insert(1, again)).contains("two requests, U and V"));
    assert!(violations(|history| history.swap(3, 4)).contains("received seq 4 after 2"));
    let duplicated = violations(|history| {
        let terminal = log(history)[8].clone();
        log(history).push(terminal);
    });
    assert!(duplicated.contains("2 terminal events"), "{duplicated}");
}

#[test]
fn changed_events_are_detected() {
    let changed = violations(|history| history[6]["event"]["percentage"] = 7.into());
    assert!(changed.contains("the log has"), "{changed}");
}

#[test]
fn writes_of_a_stale_attempt_are_detected() {
    let stale = violations(|history| log(history)[5]["attempt"] = 1.into());
    assert!(stale.contains("is of attempt 1, current is 2"), "{stale}");
    let skipped = violations(|history| {
        for event in log(history).iter_mut().skip(4) {
            event["attempt"] = 3.into();
        }
    });
    assert!(skipped.contains("starts attempt 3 after attempt 1"), "{skipped}");
}

#[test]
fn a_wrong_digest_rewind_or_result_is_detected() {
    let digest = violations(|history| log(history)[8]["output"]["chunks"] = 3.into());
    assert!(digest.contains("reported output 3 chunks"), "{digest}");
    let rewind = violations(|history| log(history)[3]["rewind_to_seq"] = 3.into());
    assert!(rewind.contains("rewinds to 3"), "{rewind}");
    let result = violations(|history| log(history)[8]["result"]["id"] = "s".into());
    assert!(result.contains("has the result"), "{result}");
}
