//! Time from the submission of a request to its start: without load, while one tenant floods the queue, and
//! with the resulting queue.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::Context;
use hdrhistogram::Histogram;
use streamer_client::{Api, Session, json};
use streamer_proto::router::v1::SubmitRequest;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    load_target::LoadTarget,
    raw_message::text_after,
    report::{Report, histogram, record},
};

/// Maximum number of concurrent calls of the flooding tenant.
const FLOOD_CALLS: usize = 128;
/// Number of requests of the flooding tenant that are queued before the measurement starts.
const MIN_FLOODED: usize = 10_000;
/// Timeout for the start of the last requests.
const START_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) tenants: usize,
    pub(super) flood: usize,
    pub(super) rate: u64,
    pub(super) duration: Duration,
}

pub(super) async fn run(target: &LoadTarget, load: Load) -> anyhow::Result<Report> {
    let process = target.process.as_ref().context("bench fairness does not support --server")?;
    let tokens: Vec<String> = (1..load.tenants)
        .map(|number| process.token(&format!("tenant-{number}")))
        .collect::<anyhow::Result<_>>()?;
    let alone = measure(target, &tokens, load, "alone").await?;
    let api = Arc::new(Api::new(&target.url, &process.token("flooder")?)?);
    let flooded = Arc::new(Semaphore::new(0));
    let flooding = tokio::spawn(flood(api, load.flood, flooded.clone()));
    let min_flooded = u32::try_from(MIN_FLOODED.min(load.flood)).unwrap_or(u32::MAX);
    drop(flooded.acquire_many(min_flooded).await?);
    let during = measure(target, &tokens, load, "during").await?;
    let accepted = flooding.await??;
    let beside = measure(target, &tokens, load, "beside").await?;
    let (median_alone, median_beside) =
        (alone.value_at_quantile(0.5), beside.value_at_quantile(0.5));
    let mut report = Report::new("fairness");
    report.figure("tenants", load.tenants, "");
    report.figure("flood", accepted, "");
    report.figure("waits measured alone", alone.len(), "");
    report.figure("median wait alone", median_alone, "µs");
    report.figure("p99 wait alone", alone.value_at_quantile(0.99), "µs");
    report.figure("median wait while it submits", during.value_at_quantile(0.5), "µs");
    report.figure("p99 wait while it submits", during.value_at_quantile(0.99), "µs");
    report.figure("waits measured beside", beside.len(), "");
    report.figure("median wait beside", median_beside, "µs");
    report.figure("p99 wait beside", beside.value_at_quantile(0.99), "µs");
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let ratio = median_beside as f64 / median_alone.max(1) as f64;
    for waits in [&alone, &during, &beside] {
        report.check_latencies(waits);
    }
    report.figure("ratio of medians", (ratio * 100.0).round() / 100.0, "");
    Ok(report)
}

/// Submits `count` requests as fast as the server accepts them, and returns the number of accepted requests.
async fn flood(api: Arc<Api>, count: usize, flooded: Arc<Semaphore>) -> anyhow::Result<usize> {
    let mut calls = JoinSet::new();
    let mut accepted = 0;
    for _ in 0..count {
        if calls.len() >= FLOOD_CALLS
            && let Some(call) = calls.join_next().await
        {
            accepted += usize::from(call?);
            flooded.add_permits(1);
        }
        let api = api.clone();
        calls.spawn(async move {
            let request = SubmitRequest {
                action: "echo_async".into(),
                payload: Some(json(r#"{"steps":1,"delay_ms":20}"#)),
                ..SubmitRequest::default()
            };
            api.submit(request).await.is_ok()
        });
    }
    while let Some(call) = calls.join_next().await {
        accepted += usize::from(call?);
    }
    Ok(accepted)
}

/// Measures the time between the due time and the start of each request, for the tenants with the given tokens.
async fn measure(
    target: &LoadTarget,
    tokens: &[String],
    load: Load,
    name: &str,
) -> anyhow::Result<Histogram<u64>> {
    let interval = Duration::from_secs_f64(1.0 / load.rate.max(1) as f64);
    let end = Instant::now() + load.duration;
    let mut drivers = JoinSet::new();
    for (position, token) in tokens.iter().enumerate() {
        let mut session = Session::connect(&target.url, token).await?;
        session.next_text().await?;
        // The start times of the tenants are distributed over one interval.
        let begin = Instant::now() + interval.mul_f64(position as f64 / tokens.len() as f64);
        drivers.spawn(drive(session, name.to_owned(), begin, end, interval));
    }
    let mut waits = histogram();
    while let Some(driven) = drivers.join_next().await {
        waits.add(driven??)?;
    }
    Ok(waits)
}

/// Submits requests on schedule, and returns the time between the due time and the start of each request.
async fn drive(
    mut session: Session,
    name: String,
    begin: Instant,
    end: Instant,
    interval: Duration,
) -> anyhow::Result<Histogram<u64>> {
    let mut waits = histogram();
    let mut due_at = begin;
    let mut waiting: HashMap<String, Instant> = HashMap::new();
    let mut count = 0;
    while due_at < end || (!waiting.is_empty() && Instant::now() < end + START_TIMEOUT) {
        tokio::select! {
            () = sleep_until(due_at), if due_at < end => {
                let id = format!("{name}-{count}");
                count += 1;
                session
                    .send(format!(
                        r#"{{"id":"{id}","action":"echo_async","payload":{{"steps":1,"delay_ms":20}}}}"#
                    ))
                    .await?;
                waiting.insert(id, due_at);
                due_at += interval;
            }
            message = session.next_text() => {
                let message = message?;
                if message.starts_with("{\"type\":\"started\"")
                    && let Some(id) = text_after(&message, "\"request_id\":\"")
                    && let Some(due_at) = waiting.remove(id)
                {
                    record(&mut waits, due_at.elapsed());
                }
            }
        }
    }
    Ok(waits)
}
