//! Latency of one tenant's small requests, which shows the effect of other tenants.

use std::time::Duration;

use anyhow::{Context, bail};
use hdrhistogram::Histogram;
use streamer_client::Session;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    load_target::LoadTarget,
    report::{Report, histogram, record},
};

/// Timeout of each request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Measures the time from the submission of each request to its end. Requests run sequentially, at most `rate`
/// per second.
pub(super) async fn measure(
    target: &LoadTarget,
    token: &str,
    rate: u64,
    duration: Duration,
    name: &str,
) -> anyhow::Result<Histogram<u64>> {
    let interval = Duration::from_secs_f64(1.0 / rate.max(1) as f64);
    let mut session = Session::connect(&target.url, token).await?;
    session.next_text().await?;
    let end = Instant::now() + duration;
    let mut latencies = histogram();
    let mut count = 0;
    while Instant::now() < end {
        let begin = Instant::now();
        let payload = r#"{"steps":2,"delay_ms":0,"result":1}"#;
        let id = format!("{name}-{count}");
        let request = format!(r#"{{"id":"{id}","action":"echo_async","payload":{payload}}}"#);
        session.send(request).await?;
        loop {
            let message = timeout(REQUEST_TIMEOUT, session.next_text())
                .await
                .context("failed to receive the outcome in time")??;
            if message.starts_with("{\"type\":\"complete\"") {
                break;
            }
            if message.starts_with("{\"type\":\"error\"") {
                bail!("the request failed: {message}");
            }
        }
        record(&mut latencies, begin.elapsed());
        count += 1;
        sleep_until(begin + interval).await;
    }
    Ok(latencies)
}

/// Adds the latencies that were measured alone and beside the load of other tenants to a report.
pub(super) fn add_figures(report: &mut Report, alone: &Histogram<u64>, beside: &Histogram<u64>) {
    for (latencies, names) in [
        (alone, ["requests alone", "p50 alone", "p99 alone", "max alone"]),
        (beside, ["requests beside", "p50 beside", "p99 beside", "max beside"]),
    ] {
        let [count, p50, p99, max] = names;
        report.figure(count, latencies.len(), "");
        report.figure(p50, latencies.value_at_quantile(0.5), "µs");
        report.figure(p99, latencies.value_at_quantile(0.99), "µs");
        report.figure(max, latencies.max(), "µs");
        report.check_latencies(latencies);
    }
}
