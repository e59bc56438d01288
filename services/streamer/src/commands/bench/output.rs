//! Latency of small requests while the output of a second tenant floods the store, and without the flood.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use streamer_client::{Api, json};
use streamer_proto::router::v1::SubmitRequest;
use tokio::{task::JoinSet, time::sleep};

use super::{
    load_target::LoadTarget,
    report::Report,
    small_requests::{add_figures, measure},
};

/// Timeout for each request of the flooding tenant.
const FLOOD_TIMEOUT: Duration = Duration::from_secs(300);
/// Time allowed for the server to free memory after the flood.
const SETTLE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) attempts: usize,
    pub(super) output_chunks: u32,
    pub(super) chunk_bytes: u32,
    pub(super) rate: u64,
    pub(super) duration: Duration,
}

pub(super) async fn run(target: &LoadTarget, load: Load) -> anyhow::Result<Report> {
    let process = target.process.as_ref().context("bench output does not support --server")?;
    let token = process.token("small")?;
    let alone = measure(target, &token, load.rate, load.duration, "alone").await?;
    let before = process.resident_bytes()?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut flooding = JoinSet::new();
    for _ in 0..load.attempts {
        let api = Api::new(&target.url, &process.token("flooder")?)?;
        flooding.spawn(flood(api, load, stop.clone()));
    }
    let beside = measure(target, &token, load.rate, load.duration, "beside").await;
    stop.store(true, Ordering::Relaxed);
    let mut flooded = 0;
    while let Some(driven) = flooding.join_next().await {
        flooded += driven??;
    }
    let beside = beside?;
    let peak = process.peak_resident_bytes()?;
    sleep(SETTLE).await;
    let mut report = Report::new("output");
    report.figure("attempts at once", load.attempts, "");
    report.figure("attempts in all", flooded, "");
    report.figure("bytes of each", u64::from(load.output_chunks) * u64::from(load.chunk_bytes), "");
    add_figures(&mut report, &alone, &beside);
    report.figure("resident before", before / 1024, "KiB");
    report.figure("resident at the peak", peak / 1024, "KiB");
    report.figure("resident after", process.resident_bytes()? / 1024, "KiB");
    Ok(report)
}

/// Submits requests with large outputs, each after the previous one has ended, and returns their number.
async fn flood(api: Api, load: Load, stop: Arc<AtomicBool>) -> anyhow::Result<usize> {
    let payload = format!(
        r#"{{"steps":1,"output_chunks":{},"chunk_bytes":{}}}"#,
        load.output_chunks, load.chunk_bytes
    );
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let request = SubmitRequest {
            action: "echo_async".into(),
            payload: Some(json(payload.clone())),
            wait: Some(FLOOD_TIMEOUT.try_into()?),
            ..SubmitRequest::default()
        };
        api.submit(request).await?;
        count += 1;
    }
    Ok(count)
}
