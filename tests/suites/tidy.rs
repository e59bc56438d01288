//! The rules of the house that a program can check.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{path::PathBuf, process::Command};

use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A service never depends on another: they meet as generated clients over a channel.
#[test]
fn services_do_not_depend_on_each_other() {
    const SERVICES: [&str; 4] =
        ["streamer-router", "streamer-processor", "streamer-progress", "streamer-gateway"];
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
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

#[test]
fn source_files_explain_themselves_and_stay_readable() {
    let listed =
        Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.lines().count() > 50, "the sources were not found");
    for file in listed.lines() {
        let text = std::fs::read_to_string(root().join(file)).unwrap();
        let is_test = file.ends_with("tests.rs") || file.starts_with("tests/");
        assert!(is_test || text.starts_with("//!"), "{file} does not open with //!");
        assert!(is_test || text.lines().count() <= 500, "{file} has over 500 lines");
    }
}
