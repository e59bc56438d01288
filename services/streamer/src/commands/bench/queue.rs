//! Latency of small requests beside many tenants whose requests cannot start.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;
use streamer_client::{Api, json};
use streamer_proto::router::v1::SubmitRequest;
use tokio::task::JoinSet;

use super::{
    load_target::LoadTarget,
    report::Report,
    small_requests::{add_figures, measure},
    worker_process,
};

/// Maximum number of concurrent submissions.
const CONCURRENT_TENANTS: usize = 64;
/// Delay of delayed requests.
const DELAY: Duration = Duration::from_secs(24 * 3600);
/// Timeout for the end of each finished request.
const WAIT: Duration = Duration::from_secs(60);

/// Kind of the other tenants' requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Waiting {
    /// Queued with a delay of a day.
    Delayed,
    /// Queued for an action that no worker runs.
    Unavailable,
    /// Finished.
    Finished,
}

#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) tenants: usize,
    pub(super) requests: usize,
    pub(super) waiting: Waiting,
    pub(super) rate: u64,
    pub(super) duration: Duration,
}

/// Returns the setting for the actions that the server runs itself.
pub(super) fn local_actions() -> String {
    "execution.builtin_actions=echo,health,echo_async".to_owned()
}

pub(super) async fn run(target: &LoadTarget, load: Load) -> anyhow::Result<Report> {
    let process = target.process.as_ref().context("bench queue does not support --server")?;
    let token = process.token("small")?;
    let alone = measure(target, &token, load.rate, load.duration, "alone").await?;
    if load.waiting == Waiting::Unavailable {
        // The action stays declared for all tenants after its only worker has stopped.
        let token = process.token_with("bench", "worker:process_data@*")?;
        let workers = LoadTarget { url: target.url.clone(), token, process: None };
        drop(worker_process::start(&workers, "process_data", 1, 1, None).await?);
    }
    let mut submitting = JoinSet::new();
    for number in 0..load.tenants {
        if submitting.len() >= CONCURRENT_TENANTS
            && let Some(submitted) = submitting.join_next().await
        {
            submitted??;
        }
        let api = Api::new(&target.url, &process.token(&format!("tenant-{number}"))?)?;
        submitting.spawn(submit(api, load));
    }
    while let Some(submitted) = submitting.join_next().await {
        submitted??;
    }
    let beside = measure(target, &token, load.rate, load.duration, "beside").await?;
    let mut report = Report::new("queue");
    report.figure("tenants", load.tenants, "");
    report.figure("requests of each", load.requests, "");
    add_figures(&mut report, &alone, &beside);
    report.figure("resident", process.resident_bytes()? / 1024, "KiB");
    Ok(report)
}

/// Submits the requests of one tenant.
async fn submit(api: Api, load: Load) -> anyhow::Result<()> {
    for _ in 0..load.requests {
        let echo = || SubmitRequest {
            action: "echo_async".into(),
            payload: Some(json(r#"{"steps":1}"#)),
            ..SubmitRequest::default()
        };
        let request = match load.waiting {
            Waiting::Delayed => SubmitRequest { delay: Some(DELAY.try_into()?), ..echo() },
            Waiting::Finished => SubmitRequest { wait: Some(WAIT.try_into()?), ..echo() },
            Waiting::Unavailable => SubmitRequest {
                action: "process_data".into(),
                payload: Some(json(r#"{"csv":"a\n1"}"#)),
                ..SubmitRequest::default()
            },
        };
        if let Err(error) = api.submit(request).await {
            bail!("a submission of another tenant failed: {error}");
        }
    }
    Ok(())
}
