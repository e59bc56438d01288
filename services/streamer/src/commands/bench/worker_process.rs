//! Workers in separate processes.

use std::{
    env,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use streamer_client::Api;
use streamer_proto::router::v1::ListActionsRequest;
use tokio::time::{Instant, sleep};

use super::load_target::LoadTarget;

/// Timeout for all workers to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A worker process, which is killed on drop.
pub(super) struct WorkerProcess(Child);

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        // The process may have exited already.
        if self.0.kill().is_ok() {
            drop(self.0.wait());
        }
    }
}

/// Starts `count` workers of `action` and waits until all of them have connected.
pub(super) async fn start(
    target: &LoadTarget,
    action: &str,
    count: usize,
    slots: usize,
    command: Option<&str>,
) -> anyhow::Result<Vec<WorkerProcess>> {
    let mut workers = Vec::with_capacity(count);
    for _ in 0..count {
        workers.push(spawn(target, action, slots, command)?);
    }
    if count == 0 {
        return Ok(workers);
    }
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let api = Api::new(&target.url, &target.token)?;
    loop {
        let call = api.call(ListActionsRequest {});
        let listed = api.router().list_actions(call).await.map_err(|status| api.error(&status))?;
        let mut actions = listed.into_inner().actions.into_iter();
        let connected =
            actions.find(|listed| listed.name == action).map_or(0, |action| action.workers);
        if usize::try_from(connected).is_ok_and(|connected| connected >= count) {
            return Ok(workers);
        }
        if Instant::now() > deadline {
            bail!(
                "only {connected} of {count} workers of {action} connected within {} s",
                CONNECT_TIMEOUT.as_secs()
            );
        }
        sleep(POLL_INTERVAL).await;
    }
}

fn spawn(
    target: &LoadTarget,
    action: &str,
    slots: usize,
    command: Option<&str>,
) -> anyhow::Result<WorkerProcess> {
    let mut process = match command {
        Some(command) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("exec {command}")]);
            shell
        }
        None => {
            let mut worker =
                Command::new(env::current_exe().context("failed to find this program")?);
            worker.args(["worker", "--actions", action, "--slots", &slots.to_string()]);
            worker
        }
    };
    let child = process
        .env("STREAMER_SERVER", &target.url)
        .env("STREAMER_TOKEN", &target.token)
        .env("STREAMER_SLOTS", slots.to_string())
        .env("STREAMER_LOG", "warn")
        .stdin(Stdio::null())
        .spawn()
        .context("failed to start a worker")?;
    Ok(WorkerProcess(child))
}
