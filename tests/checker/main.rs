//! `check-history FILE`: reads a recorded history, one JSON object per line, and reports which
//! guarantees it violates. It shares no code with the servers and clients that it checks.
//!
//! Records:
//!
//! - `{"record":"acknowledged","id":…,"uid":…}`: the request was acknowledged to its submitter.
//! - `{"record":"opened","watcher":…,"id":…,"after_seq":…}`: a watch of the events after `after_seq`.
//! - `{"record":"received","watcher":…,"event":{…}}`: the watcher received this event of the log.
//! - `{"record":"rejected","watcher":…,"error":{…}}`: the watch or the submission was rejected.
//! - `{"record":"log","uid":…,"events":[…]}`: the final log, from its first event.
//!
//! Exit codes: 0 if there are no violations, 1 if there are violations, 2 if the file cannot be read.

mod rules;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    process::ExitCode,
};

use serde_json::Value;

fn main() -> ExitCode {
    let Some(path) = env::args().nth(1) else {
        eprintln!("usage: check-history FILE");
        return ExitCode::from(2);
    };
    let history = match read(&path) {
        Ok(history) => history,
        Err(error) => {
            eprintln!("error: {path}: {error}");
            return ExitCode::from(2);
        }
    };
    let report = rules::check(&history);
    println!("{}", report.summary);
    for violation in report.violations.iter().take(50) {
        println!("VIOLATION {violation}");
    }
    if report.violations.is_empty() {
        println!("no violations");
        return ExitCode::SUCCESS;
    }
    println!("{} violations", report.violations.len());
    ExitCode::FAILURE
}

fn read(path: &str) -> Result<Vec<Value>, String> {
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    let parse = |line: std::io::Result<String>| {
        let line = line.map_err(|error| error.to_string())?;
        serde_json::from_str(&line).map_err(|error| format!("{error} in {line}"))
    };
    BufReader::new(file).lines().map(parse).collect()
}
