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

/// Two attempts; the output of the first is void.
fn good() -> Vec<Value> {
    let sha256 = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"; // of "ab"
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
    history
        .extend(log.iter().skip(1).map(|e| json!({"record": "seen", "watcher": "w", "event": e})));
    history.push(json!({"record": "log", "uid": "U", "events": log}));
    history
}

fn log(history: &mut [Value]) -> &mut Vec<Value> {
    history.last_mut().unwrap()["events"].as_array_mut().unwrap()
}

/// The faults of the good history with this changed.
fn faults(change: impl FnOnce(&mut Vec<Value>)) -> String {
    let mut history = good();
    change(&mut history);
    check(&history).faults.join("\n")
}

#[test]
fn a_good_history_breaks_nothing() {
    assert_eq!(faults(|_| {}), "");
}

#[test]
fn what_is_lost_is_noticed() {
    assert!(faults(|history| drop(history.pop())).contains("acknowledged and has no log"));
    assert!(faults(|history| drop(log(history).remove(5))).contains("has seq 7"));
    assert!(faults(|history| drop(log(history).pop())).contains("0 terminal events"));
    assert!(faults(|history| drop(history.remove(4))).contains("was sent seq 5 after 3"));
    assert!(faults(|history| drop(history.remove(9))).contains("did not see the end"));
}

#[test]
fn what_is_missing_at_the_beginning_or_sent_twice_is_noticed() {
    assert!(faults(|history| drop(history.remove(2))).contains("was sent seq 3 after 1"));
    let twice = faults(|history| history.insert(4, history[3].clone()));
    assert!(twice.contains("was sent seq 3 after 3"), "{twice}");
    let refused = json!({"record": "refused", "watcher": "w", "why": "NOT_FOUND"});
    assert!(faults(|history| history.insert(2, refused)).contains("was refused"));
    let first = faults(|history| log(history)[0]["type"] = "progress".into());
    assert!(first.contains("seq 1 is progress"), "{first}");
}

#[test]
fn what_is_doubled_or_reordered_is_noticed() {
    let again = json!({"record": "acknowledged", "id": "r", "uid": "V"});
    assert!(faults(|history| history.insert(1, again)).contains("stands for U and for V"));
    assert!(faults(|history| history.swap(3, 4)).contains("was sent seq 4 after 2"));
    let doubled = faults(|history| {
        let end = log(history)[8].clone();
        log(history).push(end);
    });
    assert!(doubled.contains("2 terminal events"), "{doubled}");
}

#[test]
fn what_is_taken_back_or_changed_is_noticed() {
    let changed = faults(|history| history[6]["event"]["percentage"] = 7.into());
    assert!(changed.contains("the log has"), "{changed}");
}

#[test]
fn a_stale_attempt_that_writes_is_noticed() {
    let stale = faults(|history| log(history)[5]["attempt"] = 1.into());
    assert!(stale.contains("is of attempt 1, attempt 2 has it"), "{stale}");
    let skipped = faults(|history| {
        for event in log(history).iter_mut().skip(4) {
            event["attempt"] = 3.into();
        }
    });
    assert!(skipped.contains("starts attempt 3 after attempt 1"), "{skipped}");
}

#[test]
fn a_wrong_proof_rewind_or_result_is_noticed() {
    let proof = faults(|history| log(history)[8]["output"]["chunks"] = 3.into());
    assert!(proof.contains("the proof tells 3 chunks"), "{proof}");
    let rewind = faults(|history| log(history)[3]["rewind_to_seq"] = 3.into());
    assert!(rewind.contains("rewinds to 3"), "{rewind}");
    let result = faults(|history| log(history)[8]["result"]["id"] = "s".into());
    assert!(result.contains("has the result"), "{result}");
}
