//! Checks rules of the repository.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{collections::BTreeSet, path::PathBuf};

use regex::bytes::Regex;
use serde_json::Value;
use streamer_tests::Process;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Services call each other only through generated clients over a channel.
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
fn source_files_have_module_docs_and_at_most_500_lines() {
    let files = sources("*.rs");
    assert!(files.len() > 50, "the sources were not found");
    for file in files {
        let text = std::fs::read_to_string(root().join(&file)).unwrap();
        let is_test = file.ends_with("tests.rs") || file.starts_with("tests/");
        assert!(is_test || text.starts_with("//!"), "{file} does not start with //!");
        assert!(is_test || text.lines().count() <= 500, "{file} has over 500 lines");
    }
}

/// Processes that are started in a different way outlive a test that panics or is killed.
#[test]
fn tests_start_processes_through_the_harness() {
    for file in sources("tests/*.rs") {
        let text = std::fs::read_to_string(root().join(&file)).unwrap();
        let exempt = file.ends_with("harness/process.rs") || file.ends_with("suites/tidy.rs");
        assert!(exempt || !text.contains("Command::new("), "{file} does not use Process::command");
    }
}

/// Returns the backquoted names in the first column of the tables below `heading`.
fn documented(text: &str, heading: &str) -> BTreeSet<String> {
    let part = text.split_once(heading).unwrap().1.split("\n## ").next().unwrap();
    let rows = part.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| row.split('`').next().unwrap().to_owned()).collect()
}

/// Returns the word after each occurrence of `before`; `is_part` accepts its characters.
fn words_after(text: &str, before: &str, is_part: impl Fn(char) -> bool) -> Vec<String> {
    let rest = text.split(before).skip(1);
    rest.map(|rest| rest.trim_start().trim_start_matches('"'))
        .map(|rest| rest.split(|c| !is_part(c)).next().unwrap().to_owned())
        .collect()
}

#[test]
fn spans_and_their_attributes_are_documented() {
    let (mut spans, mut attributes) = (BTreeSet::new(), BTreeSet::new());
    let is_part = |c: char| c.is_ascii_lowercase() || c == '.' || c == '_';
    for file in [sources("crates/*.rs"), sources("gateway/*.rs"), sources("services/*.rs")].concat()
    {
        let text = std::fs::read_to_string(root().join(&file)).unwrap();
        if file.ends_with("tests.rs")
            || !text.contains("trace_span!(") && !text.contains("KeyValue")
        {
            continue;
        }
        for opening in ["trace_span!(", "rpc_span!(", ".span_builder(", "self.record("] {
            spans.extend(words_after(&text, opening, is_part));
        }
        for prefix in ["streamer.", "rpc.", "db.", "http.request.", "error.type"] {
            let names = words_after(&text, &format!(" {prefix}"), is_part);
            let recorded = words_after(&text, &format!("\"{prefix}"), is_part);
            let names = names.into_iter().chain(recorded).map(|name| format!("{prefix}{name}"));
            attributes.extend(names.filter(|name| !spans.contains(name) && !name.ends_with('.')));
        }
    }
    spans.retain(|name| !name.is_empty() && name != "name");
    let text = std::fs::read_to_string(root().join("docs/tracing.md")).unwrap();
    assert_eq!(documented(&text, "## Spans"), spans);
    assert_eq!(documented(&text, "## Attributes"), attributes);
}

/// Returns whether the text of a file is not prose, or not from this project.
fn is_exempt_from_phrases(file: &str) -> bool {
    let extension = file.rsplit_once('.').map_or("", |(_, extension)| extension);
    file.starts_with("proto/google/")
        || matches!(extension, "lock" | "csv" | "css")
        || ["LICENSE", "tests/phrases.txt"].contains(&file)
        || file.ends_with("package-lock.json")
}

#[test]
fn texts_are_plain_technical_english() {
    let list = std::fs::read_to_string(root().join("tests/phrases.txt")).unwrap();
    let lines = list.lines().filter(|line| !line.starts_with('#'));
    let (exceptions, phrases): (Vec<_>, Vec<_>) = lines.partition(|line| line.starts_with('!'));
    let exceptions: Vec<_> =
        exceptions.iter().map(|line| line[1..].split('\t').collect::<Vec<_>>()).collect();
    let phrases: Vec<_> =
        phrases.iter().map(|line| line.split_once('\t').unwrap().0).map(str::to_owned).collect();
    // The first character excludes methods, such as `queue.front()`. Phrases may span two lines.
    let phrases = phrases.join("|").replace(' ', r"\s+(?:[/#*!]+\s*)?");
    let regex = Regex::new(&format!(r"(?i-u)(?:^|[^.\w])((?:{phrases})\b)")).unwrap();
    let (mut found, mut used) = (String::new(), BTreeSet::new());
    for file in sources("*").into_iter().filter(|file| !is_exempt_from_phrases(file)) {
        let text = std::fs::read(root().join(&file)).unwrap();
        for phrase in regex.captures_iter(&text).filter_map(|captures| captures.get(1)) {
            let start = text[..phrase.start()].iter().rposition(|byte| *byte == b'\n');
            let rest = &text[start.map_or(0, |at| at + 1)..];
            let line = rest.split(|byte| *byte == b'\n').next().unwrap();
            let line = String::from_utf8_lossy(line);
            let is_exception = |entry: &&Vec<&str>| {
                entry[0] == file && line.contains(entry[1]) && !entry[2].is_empty()
            };
            if let Some(exception) = exceptions.iter().find(is_exception) {
                used.insert(exception);
                continue;
            }
            let number = text[..phrase.start()].iter().filter(|byte| **byte == b'\n').count() + 1;
            let phrase = String::from_utf8_lossy(phrase.as_bytes());
            found.push_str(&format!("{file}:{number}: {phrase:?} in {:?}\n", line.trim()));
        }
    }
    assert!(found.is_empty(), "tests/phrases.txt names the terms to use instead of:\n{found}");
    assert_eq!(used.len(), exceptions.len(), "an exception is unused");
}

/// Decisions and the changelog may name files that no longer exist.
#[test]
fn documents_and_comments_name_existing_files() {
    let path = Regex::new(r"`((?:[\w.-]+/)*[\w.-]+\.(?:rs|proto|py|js|toml|md))`").unwrap();
    let all = sources("*");
    let mut missing = String::new();
    let is_exempt = |file: &str| file.starts_with("docs/adr/") || file == "CHANGELOG.md";
    for file in [sources("*.md"), sources("*.rs"), sources("*.proto")].concat() {
        let text = std::fs::read_to_string(root().join(&file)).unwrap();
        let is_markdown = file.ends_with(".md");
        let lines = text.lines().filter(|line| is_markdown || line.trim().starts_with("//"));
        for line in lines.filter(|_| !is_exempt(&file)) {
            for captures in path.captures_iter(line.as_bytes()) {
                let named = String::from_utf8_lossy(&captures[1]).into_owned();
                let named = named.trim_start_matches("../");
                let exists = all.iter().any(|path| {
                    path.strip_suffix(named)
                        .is_some_and(|before| before.is_empty() || before.ends_with('/'))
                });
                // A file of the user.
                if !exists && named != "streamer.toml" {
                    missing.push_str(&format!("{file}: {named}\n"));
                }
            }
        }
    }
    assert!(missing.is_empty(), "these files do not exist:\n{missing}");
}
