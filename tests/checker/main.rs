//! `check-history FILE`: reads a recorded history, one JSON object a line, and says which promises
//! it breaks. It shares no code with the servers and clients whose history it judges.
//!
//! Records:
//!
//! - `{"record":"acknowledged","id":…,"uid":…}`: a submitter was told that its request is stored.
//! - `{"record":"opened","watcher":…,"id":…,"after_seq":…}`: a watcher asked for what comes after this.
//! - `{"record":"seen","watcher":…,"event":{…}}`: it was sent this message of the log.
//! - `{"record":"refused","watcher":…,"why":{…}}`: it was told that there is no such request, or action.
//! - `{"record":"log","uid":…,"events":[…]}`: the log as it stands at the end, from its first event.
//!
//! Exit codes: 0 nothing is broken, 1 something is, 2 the file cannot be read.

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
    let verdict = rules::check(&history);
    println!("{}", verdict.summary);
    for fault in verdict.faults.iter().take(50) {
        println!("BROKEN {fault}");
    }
    if verdict.faults.is_empty() {
        println!("nothing is broken");
        return ExitCode::SUCCESS;
    }
    println!("{} broken", verdict.faults.len());
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
