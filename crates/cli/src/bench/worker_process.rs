//! Workers in processes of their own.

use std::{
    env,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use streamer_client::Api;
use streamer_proto::router::v1::ListActionsRequest;
use tokio::time::{Instant, sleep};

use super::Subject;

/// How long they may take to connect.
const PATIENCE: Duration = Duration::from_secs(30);
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// A worker that ends when this is dropped.
pub(super) struct WorkerProcess(Child);

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        if self.0.kill().is_ok() {
            drop(self.0.wait());
        }
    }
}

/// Starts so many workers of `echo_async`, and waits until the server has seen them all.
pub(super) async fn start(
    subject: &Subject,
    count: usize,
    slots: usize,
    command: Option<&str>,
) -> anyhow::Result<Vec<WorkerProcess>> {
    let mut workers = Vec::with_capacity(count);
    for _ in 0..count {
        workers.push(spawn(subject, slots, command)?);
    }
    if count == 0 {
        return Ok(workers);
    }
    let deadline = Instant::now() + PATIENCE;
    let api = Api::new(&subject.url, &subject.token)?;
    loop {
        let call = api.call(ListActionsRequest {});
        let listed = api.router().list_actions(call).await.map_err(|status| api.error(&status))?;
        let mut actions = listed.into_inner().actions.into_iter();
        let seen = actions.find(|action| action.name == "echo_async").map_or(0, |a| a.workers);
        if usize::try_from(seen).is_ok_and(|seen| seen >= count) {
            return Ok(workers);
        }
        if Instant::now() > deadline {
            bail!("only {seen} of {count} workers of echo_async have connected");
        }
        sleep(ASK_AGAIN).await;
    }
}

fn spawn(subject: &Subject, slots: usize, command: Option<&str>) -> anyhow::Result<WorkerProcess> {
    let mut process = match command {
        Some(command) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("exec {command}")]);
            shell
        }
        None => {
            let mut own = Command::new(env::current_exe().context("finding this program")?);
            own.args(["worker", "--actions", "echo_async", "--slots", &slots.to_string()]);
            own
        }
    };
    let child = process
        .env("STREAMER_SERVER", &subject.url)
        .env("STREAMER_TOKEN", &subject.token)
        .env("STREAMER_SLOTS", slots.to_string())
        .env("STREAMER_LOG", "warn")
        .stdin(Stdio::null())
        .spawn()
        .context("starting a worker")?;
    Ok(WorkerProcess(child))
}
