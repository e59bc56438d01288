//! What a measurement found, for people and for programs.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};
use tokio::time::sleep;

use crate::server_process::ServerProcess;

/// The counter of requests that succeeded.
pub(crate) const SUCCEEDED: &str = "streamer_processor_succeeded_total";
/// Whatever takes longer is a fault, however many others are fast: a stored event reaches its watchers
/// within this.
pub(crate) const MAX_LATENCY: Duration = Duration::from_secs(5);

/// Latencies, in microseconds: up to a minute, to three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are valid")
}

/// Notes a latency.
pub(crate) fn record(histogram: &mut Histogram<u64>, latency: Duration) {
    histogram.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
}

/// Figures by name, in order.
pub(crate) struct Report {
    name: &'static str,
    figures: Vec<(&'static str, Value, &'static str)>,
    faults: u64,
}

impl Report {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, figures: Vec::new(), faults: 0 }
    }

    pub(crate) fn figure(
        &mut self,
        name: &'static str,
        value: impl Into<Value>,
        unit: &'static str,
    ) {
        self.figures.push((name, value.into(), unit));
    }

    /// So many in so long.
    pub(crate) fn rate(&mut self, name: &'static str, count: u64, elapsed: Duration) {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let rate = count as f64 / elapsed.as_secs_f64();
        self.figure(name, rate.round(), "/s");
    }

    pub(crate) fn latencies(&mut self, histogram: &Histogram<u64>) {
        for (name, quantile) in
            [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)]
        {
            self.figure(name, histogram.value_at_quantile(quantile), "µs");
        }
        self.check_latencies(histogram);
    }

    /// Counts what took longer than [`MAX_LATENCY`] as faults.
    pub(crate) fn check_latencies(&mut self, histogram: &Histogram<u64>) {
        let limit = u64::try_from(MAX_LATENCY.as_micros()).unwrap_or(u64::MAX);
        self.faults += histogram.count_between(limit + 1, u64::MAX);
    }

    /// Counts what a server of our own found only by comparing with its store, and attempts that it lost:
    /// neither happens in one healthy process.
    pub(crate) async fn check_delivery(&mut self, server: &ServerProcess) -> anyhow::Result<()> {
        // An announcement that is late may still come; until then the gauge counts it.
        while server.metric::<i64>("streamer_progress_unannounced_events").await? > 0 {
            sleep(Duration::from_millis(100)).await;
        }
        for (name, counter) in [
            ("events delivered late", "streamer_progress_missed_events_total"),
            ("attempts lost", "streamer_processor_lost_total"),
        ] {
            let count: u64 = server.metric(counter).await?;
            self.figure(name, count, "");
            self.faults += count;
        }
        Ok(())
    }

    /// What the server spent on each of so many.
    pub(crate) fn processor(&mut self, milliseconds: u64, count: u64) {
        if milliseconds > 0 && count > 0 {
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            let each = milliseconds as f64 * 1000.0 / count as f64;
            self.figure("server processor time each", (each * 100.0).round() / 100.0, "µs");
        }
    }

    /// Adds lost, repeated or wrong messages; the measurement fails when there are any.
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
