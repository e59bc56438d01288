//! Kills the server and its workers with `kill -9` at random times under load. `check-history`, a separate
//! program, checks the messages that clients receive.
//!
//! `STREAMER_TESTS_KILLS` sets the number of kills (default 200), `STREAMER_TESTS_SEED` the seed of their times.
//! A failed run prints its seed and keeps its history.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::env;

use streamer_tests::{Load, Random, Server, WorkerProcess, wait_for_workers};

#[tokio::test(flavor = "multi_thread")]
async fn guarantees_hold_when_the_server_is_killed() {
    let server = server("*");
    run("server", server, 0, number("STREAMER_TESTS_KILLS", 200) / 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guarantees_hold_when_server_and_workers_are_killed() {
    let server = server("echo");
    run("workers", server, 2, number("STREAMER_TESTS_KILLS", 200).div_ceil(2)).await;
}

fn server(local_actions: &str) -> Server {
    Server::start(&[
        &format!("execution.builtin_actions={local_actions}"),
        "execution.lease_duration=500ms",
        "execution.poll_interval=50ms",
        "execution.max_tenant_share_percent=100",
    ])
}

fn number(variable: &str, default: usize) -> usize {
    env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

async fn run(name: &str, mut server: Server, workers: usize, kills: usize) {
    let seed = number("STREAMER_TESTS_SEED", 20_261_125) as u64;
    let mut random = Random::new(seed);
    let token = server.token("acme", "ann", &["worker:*"]);
    let mut workers: Vec<_> = (0..workers).map(|_| worker(&server, &token)).collect();
    let all = i32::try_from(workers.len()).unwrap();
    wait_for_workers(&server, &token, "echo_async", all).await;
    let load = Load::start(std::slice::from_ref(&server.url), &token, seed, false);
    let mut killed = 0;
    while killed < kills {
        load.wait_for_messages(random.below(60)).await;
        let victim = random.below(workers.len() * 2 + 1);
        if victim < workers.len() {
            let replacement = worker(&server, &token);
            workers[victim].kill();
            workers[victim] = replacement;
        } else {
            server.kill_and_restart();
        }
        killed += 1;
    }
    println!("{name}: {killed} kills, seed {seed}");
    load.verify(name).await;
}

fn worker(server: &Server, token: &str) -> WorkerProcess {
    WorkerProcess::spawn(server, token, "echo_async", &["--slots", "8"])
}
