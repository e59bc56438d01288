//! The metrics of this service.

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};
use streamer_handler::OutputBudget;
use streamer_telemetry::Metrics;

#[derive(Clone)]
pub(crate) struct ProcessorMetrics {
    pub(crate) running: Gauge,
    pub(crate) succeeded: Counter,
    pub(crate) failed: Counter,
    pub(crate) cancelled: Counter,
    pub(crate) retried: Counter,
    pub(crate) lost: Counter,
    pub(crate) claims_missed: Counter,
    pub(crate) lease_expiries: Counter,
    pub(crate) run_seconds: Histogram,
    pub(crate) wait_seconds: Histogram,
    pub(crate) sync_calls: Counter,
    pub(crate) sync_failures: Counter,
    pub(crate) queue_depth: Gauge,
    pub(crate) queue_age_ms: Gauge,
    output_bytes: Gauge,
    output_bytes_limit: Gauge,
}

impl ProcessorMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let counter = |name, help| metrics.counter(name, help);
        Self {
            running: metrics.gauge("streamer_processor_running", "Attempts that run now"),
            succeeded: counter("streamer_processor_succeeded", "Requests that succeeded here"),
            failed: counter("streamer_processor_failed", "Requests that failed here"),
            cancelled: counter("streamer_processor_cancelled", "Requests that were cancelled here"),
            retried: counter("streamer_processor_retried", "Attempts that are followed by another"),
            lost: counter("streamer_processor_lost", "Attempts that were taken over by others"),
            claims_missed: counter(
                "streamer_processor_claims_missed",
                "Claims that came too late: others had the request already",
            ),
            lease_expiries: counter(
                "streamer_processor_lease_expiries",
                "Attempts of others whose lease ran out, found here",
            ),
            run_seconds: metrics
                .latency("streamer_processor_run_seconds", "From claim to outcome of an attempt"),
            wait_seconds: metrics
                .latency("streamer_processor_wait_seconds", "From being due to being claimed"),
            sync_calls: counter("streamer_processor_sync_calls", "Sync actions that were run"),
            sync_failures: counter("streamer_processor_sync_failures", "Sync actions that failed"),
            queue_depth: metrics.gauge("streamer_processor_queue_depth", "Requests that wait"),
            queue_age_ms: metrics.gauge(
                "streamer_processor_queue_age_milliseconds",
                "How long the request that has been due longest waits",
            ),
            output_bytes: metrics.gauge(
                "streamer_processor_buffered_output_bytes",
                "Bytes of reports and results that are not stored yet",
            ),
            output_bytes_limit: metrics.gauge(
                "streamer_processor_buffered_output_bytes_limit",
                "Limit of streamer_processor_buffered_output_bytes \
                 (execution.max_buffered_output_bytes)",
            ),
        }
    }

    /// Shows how much of the budget is used.
    pub(crate) fn watch_output(&self, budget: &OutputBudget, limit: usize) {
        let number = |bytes: usize| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.output_bytes_limit.set(number(limit));
        let gauge = self.output_bytes.clone();
        budget.observe(move |used| {
            gauge.set(number(used));
        });
    }
}
