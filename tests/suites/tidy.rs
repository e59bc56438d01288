//! The rules of the house that a program can check.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::path::PathBuf;

use serde_json::Value;
use streamer_tests::Process;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A service never depends on another: they meet as generated clients over a channel.
#[test]
fn services_do_not_depend_on_each_other() {
    const SERVICES: [&str; 4] =
        ["streamer-router", "streamer-processor", "streamer-progress", "streamer-gateway"];
    let mut command = Process::command(env!("CARGO"));
    command.args(["metadata", "--format-version=1", "--no-deps", "--offline"]);
    let output = Process::output(command.current_dir(root()));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let mut checked = 0;
    for package in packages {
        let name = package["name"].as_str().unwrap();
        if !SERVICES.contains(&name) {
            continue;
        }
        checked += 1;
        for dependency in package["dependencies"].as_array().unwrap() {
            let other = dependency["name"].as_str().unwrap();
            assert!(!SERVICES.contains(&other), "{name} depends on {other}");
        }
    }
    assert_eq!(checked, SERVICES.len());
}

/// Returns the paths of the source files that match a pattern.
fn sources(pattern: &str) -> Vec<String> {
    let mut command = Process::command("git");
    let listed = Process::output(command.args(["ls-files", pattern]).current_dir(root()));
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(!listed.is_empty(), "no source file matches {pattern}");
    listed.lines().map(str::to_owned).collect()
}

#[test]
fn source_files_explain_themselves_and_stay_readable() {
    let files = sources("*.rs");
    assert!(files.len() > 50, "the sources were not found");
    for file in files {
        let text = std::fs::read_to_string(root().join(&file)).unwrap();
        let is_test = file.ends_with("tests.rs") || file.starts_with("tests/");
        assert!(is_test || text.starts_with("//!"), "{file} does not open with //!");
        assert!(is_test || text.lines().count() <= 500, "{file} has over 500 lines");
    }
}

/// A process that is started in a different way outlives a test that panics or is killed.
#[test]
fn tests_start_processes_through_the_harness() {
    for file in sources("tests/*.rs") {
        let text = std::fs::read_to_string(root().join(&file)).unwrap();
        let exempt = file.ends_with("harness/process.rs") || file.ends_with("suites/tidy.rs");
        assert!(exempt || !text.contains("Command::new("), "{file} does not use Process::command");
    }
}
