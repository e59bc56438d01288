//! What a tenant's small requests take: alone, and while the output of another tenant floods the store.

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

use super::{Report, Subject, small_requests::measure};

/// How long one of the flood may take.
const FLOOD_PATIENCE: Duration = Duration::from_secs(300);
/// After the end, for as long as it takes the server to drop what it held.
const SETTLE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) attempts: usize,
    pub(super) output_chunks: u32,
    pub(super) chunk_bytes: u32,
    pub(super) rate: u64,
    pub(super) duration: Duration,
}

pub(super) async fn run(subject: &Subject, load: Load) -> anyhow::Result<Report> {
    let own = subject.own.as_ref().context("it needs a server of its own")?;
    let token = own.token("small")?;
    let alone = measure(subject, &token, load.rate, load.duration, "alone").await?;
    let before = own.resident_bytes()?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut flooding = JoinSet::new();
    for _ in 0..load.attempts {
        let api = Api::new(&subject.url, &own.token("flooder")?)?;
        flooding.spawn(flood(api, load, stop.clone()));
    }
    let beside = measure(subject, &token, load.rate, load.duration, "beside").await;
    stop.store(true, Ordering::Relaxed);
    let mut flooded = 0;
    while let Some(driven) = flooding.join_next().await {
        flooded += driven??;
    }
    let beside = beside?;
    let peak = own.peak_resident_bytes()?;
    sleep(SETTLE).await;
    let mut report = Report::new("output");
    report.figure("attempts at once", load.attempts, "");
    report.figure("attempts in all", flooded, "");
    report.figure("bytes of each", u64::from(load.output_chunks) * u64::from(load.chunk_bytes), "");
    for (latencies, names) in [
        (&alone, ["requests alone", "p50 alone", "p99 alone", "max alone"]),
        (&beside, ["requests beside", "p50 beside", "p99 beside", "max beside"]),
    ] {
        let [count, median, high, most] = names;
        report.figure(count, latencies.len(), "");
        report.figure(median, latencies.value_at_quantile(0.5), "µs");
        report.figure(high, latencies.value_at_quantile(0.99), "µs");
        report.figure(most, latencies.max(), "µs");
        report.check_latencies(latencies);
    }
    report.figure("resident before", before / 1024, "KiB");
    report.figure("resident at the peak", peak / 1024, "KiB");
    report.figure("resident after", own.resident_bytes()? / 1024, "KiB");
    Ok(report)
}

/// Submits one request with much output after the other, each when the one before has ended.
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
            wait: Some(FLOOD_PATIENCE.try_into()?),
            ..SubmitRequest::default()
        };
        api.submit(request).await?;
        count += 1;
    }
    Ok(count)
}
