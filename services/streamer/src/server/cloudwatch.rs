//! Metrics for CloudWatch: a log line in the embedded metric format at each interval, from which CloudWatch Logs
//! creates metrics (<https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html>).
//! Only metrics with alarms are written, because each metric has a price.

mod samples;

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::{
        Arc,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use serde_json::{Map, Value, json};
use streamer_core::{Clock, Timestamp};
use streamer_store_dynamodb::tables::{Alarm, Statistic};
use streamer_telemetry::Metrics;
use tokio::{
    sync::oneshot,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use samples::Samples;

/// Dimension of the metrics. Each metric also exists without dimensions, for all services together.
const DIMENSION: &str = "Service";
/// Factor between the largest bucket bound of a histogram and the value that represents longer durations.
const BEYOND: f64 = 2.0;
/// Timeout for writing the last line.
const LAST_LINE_TIMEOUT: Duration = Duration::from_secs(1);

/// A metric in CloudWatch, with its alarm.
struct ServiceMetric {
    name: &'static str,
    unit: &'static str,
    source: Source,
    alarm: &'static str,
    statistic: Statistic,
    threshold: f64,
}

/// Where the values of a metric come from.
enum Source {
    /// Increase of the series with one of the given labels and values, or of all series if the list is empty.
    Counters(&'static [(&'static str, &'static [(&'static str, &'static str)])]),
    Gauge(&'static str),
    /// Durations in seconds, which are converted to milliseconds.
    Histogram(&'static str),
}

/// The metrics and their alarms.
const METRICS: [ServiceMetric; 8] = [
    ServiceMetric {
        name: "AuthenticationFailures",
        unit: "Count",
        source: Source::Counters(&[
            ("streamer_rpc_calls_total", &[("code", "UNAUTHENTICATED")]),
            ("streamer_gateway_connections_rejected_total", &[("code", "4401")]),
        ]),
        alarm: "Calls and connections have missing, invalid or expired tokens",
        statistic: Statistic::Sum,
        threshold: 100.0,
    },
    ServiceMetric {
        name: "FailedMessages",
        unit: "Count",
        source: Source::Counters(&[("streamer_gateway_messages_rejected_total", &[])]),
        alarm: "The gateway rejects messages of clients",
        statistic: Statistic::Sum,
        threshold: 100.0,
    },
    ServiceMetric {
        name: "SubmitLatency",
        unit: "Milliseconds",
        source: Source::Histogram("streamer_router_submit_duration_seconds"),
        alarm: "The acknowledgment of submissions is slow",
        statistic: Statistic::P99,
        threshold: 500.0,
    },
    ServiceMetric {
        name: "DeliveryLatency",
        unit: "Milliseconds",
        source: Source::Histogram("streamer_gateway_delivery_duration_seconds"),
        alarm: "The delivery of events to WebSocket clients is slow",
        statistic: Statistic::P99,
        threshold: 1000.0,
    },
    ServiceMetric {
        name: "FailedAttempts",
        unit: "Count",
        source: Source::Counters(&[(
            "streamer_processor_attempts_total",
            &[("outcome", "failed"), ("outcome", "retrying"), ("outcome", "fenced")],
        )]),
        alarm: "Attempts fail",
        statistic: Statistic::Sum,
        threshold: 50.0,
    },
    ServiceMetric {
        name: "QueueAge",
        unit: "Seconds",
        source: Source::Gauge("streamer_processor_queue_oldest_age_seconds"),
        alarm: "Requests wait too long in the queue",
        statistic: Statistic::Maximum,
        threshold: 60.0,
    },
    ServiceMetric {
        name: "Throttles",
        unit: "Count",
        source: Source::Counters(&[("streamer_dynamodb_throttled_total", &[])]),
        alarm: "Store operations are throttled after all retries",
        statistic: Statistic::Sum,
        threshold: 10.0,
    },
    ServiceMetric {
        name: "StoreErrors",
        unit: "Count",
        source: Source::Counters(&[(
            "streamer_store_operations_total",
            &[("outcome", "unavailable"), ("outcome", "overloaded"), ("outcome", "corrupt")],
        )]),
        alarm: "Store operations fail",
        statistic: Statistic::Sum,
        threshold: 10.0,
    },
];

/// Returns the alarms of the services.
pub(crate) fn alarms() -> Vec<Alarm> {
    let alarms = METRICS.iter().map(|metric| Alarm {
        metric: metric.name,
        description: metric.alarm,
        statistic: metric.statistic,
        threshold: metric.threshold,
    });
    alarms.collect()
}

/// Writes the metrics of a process.
pub(crate) struct CloudWatch {
    pub(crate) metrics: Metrics,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) namespace: String,
    pub(crate) service: &'static str,
}

impl CloudWatch {
    /// Writes a line to `out` at each interval, and when `shutdown` is cancelled. If `out` is blocked, the next line
    /// contains the changes.
    pub(crate) async fn run(
        self,
        every: Duration,
        out: impl Write + Send + 'static,
        shutdown: CancellationToken,
    ) {
        let lines = match write_lines(out) {
            Ok(lines) => lines,
            Err(error) => {
                tracing::error!(%error, "cannot write metrics for CloudWatch");
                return;
            }
        };
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut last = Snapshot::default();
        loop {
            let is_last = tokio::select! {
                () = shutdown.cancelled() => true,
                _ = ticks.tick() => false,
            };
            let next = Snapshot::of(&Samples::parse(&self.metrics.encode()));
            let (done, written) = oneshot::channel();
            let line = Line { text: self.line(&last, &next, self.clock.now()), done };
            match lines.try_send(line) {
                Ok(()) => last = next,
                Err(TrySendError::Full(_)) => {
                    tracing::warn!("metrics for CloudWatch are late: the output is blocked");
                }
                Err(TrySendError::Disconnected(_)) => return,
            }
            if is_last {
                if timeout(LAST_LINE_TIMEOUT, written).await.is_err() {
                    tracing::warn!("timed out writing the last metrics for CloudWatch");
                }
                return;
            }
        }
    }

    /// Returns the line with the changes between two snapshots.
    fn line(&self, last: &Snapshot, next: &Snapshot, now: Timestamp) -> String {
        let mut directives = Vec::new();
        let mut members = Map::new();
        members.insert(DIMENSION.to_owned(), self.service.into());
        for metric in &METRICS {
            let Some(value) = next.0.get(metric.name) else { continue };
            directives.push(json!({ "Name": metric.name, "Unit": metric.unit }));
            members.insert(metric.name.to_owned(), value.since(last.0.get(metric.name)));
        }
        let directive = json!({
            "Namespace": self.namespace,
            "Dimensions": [[], [DIMENSION]],
            "Metrics": directives,
        });
        let metadata = json!({ "Timestamp": now.as_millis(), "CloudWatchMetrics": [directive] });
        members.insert("_aws".to_owned(), metadata);
        Value::Object(members).to_string()
    }
}

/// A line to write, and a channel that is closed afterwards.
struct Line {
    text: String,
    done: oneshot::Sender<()>,
}

/// Starts a thread that writes lines. It is not a task, because the process waits for its tasks at the end, and an output
/// that is not read would block it.
fn write_lines(mut out: impl Write + Send + 'static) -> io::Result<SyncSender<Line>> {
    let (sender, lines) = sync_channel::<Line>(1);
    thread::Builder::new().name("cloudwatch".into()).spawn(move || {
        for Line { text, done } in lines {
            if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
                tracing::warn!(%error, "failed to write metrics for CloudWatch");
            }
            drop(done);
        }
    })?;
    Ok(sender)
}

/// Values of the metrics at one moment, by name.
#[derive(Default)]
struct Snapshot(BTreeMap<&'static str, Measured>);

#[derive(Clone, Debug, PartialEq)]
enum Measured {
    Counter(f64),
    Gauge(f64),
    /// Cumulative counts of the buckets by bound in seconds, and the sum of the durations.
    Histogram(Vec<(f64, f64)>, f64),
}

impl Snapshot {
    /// Returns the metrics that this process has.
    fn of(samples: &Samples<'_>) -> Self {
        let values = METRICS.iter().filter_map(|metric| {
            let value = match metric.source {
                Source::Counters(counters) => {
                    let sums = counters.iter().filter_map(|(name, any)| samples.sum(name, any));
                    Measured::Counter(sums.reduce(|total, sum| total + sum)?)
                }
                Source::Gauge(name) => Measured::Gauge(samples.sum(name, &[])?),
                Source::Histogram(name) => {
                    let sum = samples.sum(&format!("{name}_sum"), &[])?;
                    Measured::Histogram(samples.buckets(name), sum)
                }
            };
            Some((metric.name, value))
        });
        Self(values.collect())
    }
}

impl Measured {
    /// Returns the change since the last snapshot, in the embedded metric format.
    fn since(&self, last: Option<&Self>) -> Value {
        match (self, last) {
            (Self::Gauge(value), _) => json!(value),
            (Self::Counter(value), Some(Self::Counter(last))) => json!(value - last),
            (Self::Counter(value), _) => json!(value),
            (Self::Histogram(buckets, sum), last) => {
                let (last_buckets, last_sum) = match last {
                    Some(Self::Histogram(buckets, sum)) => (buckets.as_slice(), *sum),
                    _ => (&[][..], 0.0),
                };
                distribution(buckets, last_buckets, sum - last_sum)
            }
        }
    }
}

/// Returns a distribution in milliseconds. Each bucket is represented by its upper bound, so that percentiles are not
/// underestimated.
fn distribution(buckets: &[(f64, f64)], last: &[(f64, f64)], sum: f64) -> Value {
    let largest = buckets.iter().map(|(bound, _)| *bound).filter(|bound| bound.is_finite());
    let beyond = largest.fold(0.0, f64::max) * BEYOND;
    let (mut values, mut counts, mut total) = (Vec::new(), Vec::new(), 0.0);
    for (position, (bound, cumulative)) in buckets.iter().enumerate() {
        let count = cumulative - last.get(position).map_or(0.0, |(_, last)| *last) - total;
        if count > 0.0 {
            values.push(if bound.is_finite() { *bound } else { beyond } * 1000.0);
            counts.push(count);
            total += count;
        }
    }
    json!({
        "Values": values,
        "Counts": counts,
        "Min": values.first().copied().unwrap_or_default(),
        "Max": values.last().copied().unwrap_or_default(),
        "Count": total,
        "Sum": sum * 1000.0,
    })
}

#[cfg(test)]
mod tests {
    use streamer_core::ManualClock;

    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        Snapshot::of(&Samples::parse(text))
    }

    #[test]
    fn a_line_has_the_changes_since_the_last_line() {
        let cloudwatch = CloudWatch {
            metrics: Metrics::new(),
            clock: Arc::new(ManualClock::at(Timestamp::from_millis(7))),
            namespace: "Test".into(),
            service: "streamer",
        };
        let first = snapshot(
            "streamer_processor_attempts_total{action=\"a\",outcome=\"failed\"} 3\n\
             streamer_processor_attempts_total{action=\"a\",outcome=\"succeeded\"} 100\n\
             streamer_processor_queue_oldest_age_seconds 2.5\n",
        );
        let second = snapshot(
            "streamer_processor_attempts_total{action=\"a\",outcome=\"failed\"} 4\n\
             streamer_processor_attempts_total{action=\"b\",outcome=\"retrying\"} 1\n\
             streamer_processor_queue_oldest_age_seconds 0.5\n",
        );
        let line = cloudwatch.line(&first, &second, Timestamp::from_millis(7));
        let line: Value = serde_json::from_str(&line).unwrap();
        let directive = &line["_aws"]["CloudWatchMetrics"][0];
        assert_eq!(line["_aws"]["Timestamp"], 7);
        assert_eq!(directive["Namespace"], "Test");
        assert_eq!(directive["Dimensions"], json!([[], ["Service"]]));
        let names = ["FailedAttempts", "QueueAge"];
        let units = ["Count", "Seconds"];
        for (position, (name, unit)) in names.into_iter().zip(units).enumerate() {
            assert_eq!(directive["Metrics"][position], json!({ "Name": name, "Unit": unit }));
        }
        assert_eq!(line["Service"], "streamer");
        assert_eq!((&line["FailedAttempts"], &line["QueueAge"]), (&json!(2.0), &json!(0.5)));
    }

    /// Output that blocks until the sender is dropped.
    struct Blocked(std::sync::mpsc::Receiver<()>);

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            assert!(self.0.recv().is_err(), "nothing is sent");
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_blocked_output_does_not_delay_the_shutdown() {
        let (unblock, blocked) = std::sync::mpsc::channel();
        let cloudwatch = CloudWatch {
            metrics: Metrics::new(),
            clock: Arc::new(ManualClock::at(Timestamp::from_millis(7))),
            namespace: "Test".into(),
            service: "streamer",
        };
        let shutdown = CancellationToken::new();
        let every = Duration::from_secs(60);
        let running = tokio::spawn(cloudwatch.run(every, Blocked(blocked), shutdown.clone()));
        tokio::time::sleep(every * 5).await;
        shutdown.cancel();
        timeout(LAST_LINE_TIMEOUT * 2, running).await.unwrap().unwrap();
        drop(unblock);
    }

    #[test]
    fn a_distribution_has_the_new_durations() {
        let buckets = [(0.1, 5.0), (1.0, 8.0), (f64::INFINITY, 9.0)];
        let last = [(0.1, 4.0), (1.0, 4.0), (f64::INFINITY, 4.0)];
        let expected = json!({
            "Values": [100.0, 1000.0, 2000.0],
            "Counts": [1.0, 3.0, 1.0],
            "Min": 100.0,
            "Max": 2000.0,
            "Count": 5.0,
            "Sum": 3500.0,
        });
        assert_eq!(distribution(&buckets, &last, 3.5), expected);
        let empty = distribution(&buckets, &buckets, 0.0);
        assert_eq!((&empty["Values"], &empty["Count"]), (&json!([]), &json!(0.0)));
    }
}
