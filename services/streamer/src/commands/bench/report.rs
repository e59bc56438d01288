//! Report of a benchmark, as text or JSON.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};
use tokio::time::sleep;

use super::server_process::ServerProcess;

/// Counter of succeeded requests.
pub(crate) const SUCCEEDED: &str = r#"streamer_processor_attempts_total{outcome="succeeded"}"#;
/// Maximum latency: the time within which a stored event must reach its watchers. Every longer latency is a
/// fault.
pub(crate) const MAX_LATENCY: Duration = Duration::from_secs(5);

/// Returns a histogram for latencies in microseconds, up to a minute, with three significant digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are valid")
}

/// Records a latency.
pub(crate) fn record(histogram: &mut Histogram<u64>, latency: Duration) {
    histogram.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
}

/// Figures of a benchmark, in the order in which they were added.
pub(crate) struct Report {
    name: &'static str,
    figures: Vec<(&'static str, Value, &'static str)>,
    faults: u64,
}

impl Report {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, figures: Vec::new(), faults: 0 }
    }

    /// Adds a figure.
    pub(crate) fn figure(
        &mut self,
        name: &'static str,
        value: impl Into<Value>,
        unit: &'static str,
    ) {
        self.figures.push((name, value.into(), unit));
    }

    /// Adds the rate per second that corresponds to `count` within `elapsed`.
    pub(crate) fn rate(&mut self, name: &'static str, count: u64, elapsed: Duration) {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let rate = count as f64 / elapsed.as_secs_f64();
        self.figure(name, rate.round(), "/s");
    }

    /// Adds quantiles of the latencies, and counts those above [`MAX_LATENCY`] as faults.
    pub(crate) fn latencies(&mut self, histogram: &Histogram<u64>) {
        for (name, quantile) in
            [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)]
        {
            self.figure(name, histogram.value_at_quantile(quantile), "µs");
        }
        self.check_latencies(histogram);
    }

    /// Counts latencies above [`MAX_LATENCY`] as faults.
    pub(crate) fn check_latencies(&mut self, histogram: &Histogram<u64>) {
        let limit = u64::try_from(MAX_LATENCY.as_micros()).unwrap_or(u64::MAX);
        self.faults += histogram.count_between(limit + 1, u64::MAX);
    }

    /// Adds as faults the events that the server delivered only after a comparison with its store, and the
    /// attempts that it lost: neither occurs in a single healthy process.
    pub(crate) async fn check_delivery(&mut self, server: &ServerProcess) -> anyhow::Result<()> {
        // Wait for late announcements, which the gauge counts until they arrive.
        while server.metric("streamer_progress_unannounced_events").await? > 0 {
            sleep(Duration::from_millis(100)).await;
        }
        for (name, counter) in [
            ("events delivered late", "streamer_progress_missed_events_total"),
            ("attempts lost", r#"streamer_processor_attempts_total{outcome="fenced"}"#),
        ] {
            let count: u64 = server.metric(counter).await?;
            self.figure(name, count, "");
            self.faults += count;
        }
        Ok(())
    }

    /// Adds the server's processor time per request or event.
    pub(crate) fn processor(&mut self, milliseconds: u64, count: u64) {
        if milliseconds > 0 && count > 0 {
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            let each = milliseconds as f64 * 1000.0 / count as f64;
            self.figure("server processor time each", (each * 100.0).round() / 100.0, "µs");
        }
    }

    /// Adds the number of lost, repeated or wrong messages. A benchmark with faults fails.
    pub(crate) fn add_faults(&mut self, faults: u64) {
        self.faults += faults;
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults
    }

    pub(crate) fn print(mut self, as_json: bool) {
        self.figure("faults", self.faults, "");
        if as_json {
            let mut object = Map::new();
            object.insert("bench".into(), json!(self.name));
            for (name, value, unit) in &self.figures {
                let unit = match *unit {
                    "" => String::new(),
                    "/s" => "_per_second".into(),
                    "µs" => "_us".into(),
                    other => format!("_{other}"),
                };
                let name = name.replace([' ', '.'], "_");
                object.insert(format!("{name}{unit}"), value.clone());
            }
            println!("{}", Value::Object(object));
            return;
        }
        println!("bench {}", self.name);
        for (name, value, unit) in &self.figures {
            println!("  {name:<28} {value:>14} {unit}");
        }
    }
}
