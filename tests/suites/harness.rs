//! Tests of the harness: processes end with their test, and each address is used by one test at a time.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    env,
    io::{self, BufRead, BufReader, Read},
    panic::catch_unwind,
    process::Stdio,
    thread,
};

use streamer_tests::{LoopbackAddress, Process, Server};

/// Environment variable of the helper process of [`a_killed_test_process_leaves_no_process_behind`].
const HELPER: &str = "STREAMER_TESTS_HELPER";

/// Reads lines up to `line`.
fn read_up_to(line: &str, from: impl Read) {
    let mut lines = BufReader::new(from).lines();
    assert!(lines.any(|read| read.unwrap() == line), "the output ended before {line:?}");
}

#[test]
fn a_panic_kills_a_process_and_its_group() {
    // The pipe reaches its end once every process that inherited the other side has exited.
    let (mut inherited, pipe) = io::pipe().unwrap();
    let panicked = catch_unwind(|| {
        let mut command = Process::command("sh");
        command.args(["-c", "sleep 1000000 & echo started; wait"]);
        let mut process = Process::spawn(command.stdout(Stdio::piped()).stderr(pipe));
        read_up_to("started", process.stdout());
        panic!("this test panics on purpose");
    });
    assert!(panicked.is_err());
    inherited.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn the_exit_of_a_process_kills_its_group() {
    let (mut inherited, pipe) = io::pipe().unwrap();
    let mut command = Process::command("sh");
    command.args(["-c", "sleep 1000000 & exit 3"]).stderr(pipe);
    assert_eq!(Process::spawn(&mut command).wait().code(), Some(3));
    inherited.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn a_process_outlives_the_thread_that_starts_it() {
    let started = thread::spawn(|| {
        let mut command = Process::command("sh");
        command.args(["-c", "trap 'exit 7' TERM; sleep 1000000 & echo started; wait"]);
        let mut process = Process::spawn(command.stdout(Stdio::piped()));
        read_up_to("started", process.stdout());
        process
    });
    assert_eq!(started.join().unwrap().stop(), Some(7));
}

#[test]
fn a_killed_test_process_leaves_no_process_behind() {
    let (mut inherited, pipe) = io::pipe().unwrap();
    let mut command = Process::command(env::current_exe().unwrap());
    command.args(["--exact", "helper_that_starts_a_server", "--nocapture"]).env(HELPER, "1");
    let mut helper = Process::spawn(command.stdout(Stdio::piped()).stderr(pipe));
    read_up_to("started", helper.stdout());
    // The server is in a separate process group, which this signal does not reach.
    helper.kill();
    inherited.read_to_end(&mut Vec::new()).unwrap();
}

/// Helper process, not a test: starts a server and waits until it is killed.
#[test]
fn helper_that_starts_a_server() {
    if env::var_os(HELPER).is_none() {
        return;
    }
    let mut server = Server::start(&[]);
    println!("\nstarted");
    server.wait();
}

#[test]
fn a_claimed_address_has_one_owner() {
    let (one, other) = (LoopbackAddress::claim(), LoopbackAddress::claim());
    let (first, second) = (one.next(), one.next());
    assert_eq!(first.ip(), second.ip());
    assert_ne!(first.port(), second.port());
    assert_ne!(first.ip(), other.next().ip());
}
