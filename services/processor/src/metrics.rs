//! Metrics of the processor.

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};
use streamer_core::saturate;
use streamer_handler::MemoryBudget;
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
            running: metrics
                .gauge("streamer_processor_attempts_in_progress", "Attempts in progress"),
            succeeded: counter(
                "streamer_processor_succeeded",
                "Requests that succeeded on this processor",
            ),
            failed: counter("streamer_processor_failed", "Requests that failed on this processor"),
            cancelled: counter(
                "streamer_processor_cancelled",
                "Requests that were cancelled on this processor",
            ),
            retried: counter("streamer_processor_retried", "Attempts with a scheduled retry"),
            lost: counter("streamer_processor_attempts_fenced", "Attempts that were fenced"),
            claims_missed: counter(
                "streamer_processor_claim_conflicts",
                "Claims that failed because the request was already claimed",
            ),
            lease_expiries: counter(
                "streamer_processor_lease_expiries",
                "Expired leases that this processor recovered",
            ),
            run_seconds: metrics.latency(
                "streamer_processor_attempt_duration_seconds",
                "Time from the claim to the final event of an attempt",
            ),
            wait_seconds: metrics.latency(
                "streamer_processor_queue_wait_seconds",
                "Time from the due time of a request to its claim",
            ),
            sync_calls: counter("streamer_processor_sync_calls", "Sync calls received"),
            sync_failures: counter("streamer_processor_sync_failures", "Sync calls that failed"),
            queue_depth: metrics.gauge("streamer_processor_queue_depth", "Queued requests"),
            queue_age_ms: metrics.gauge(
                "streamer_processor_queue_age_milliseconds",
                "Age of the oldest due request",
            ),
            output_bytes: metrics.gauge(
                "streamer_processor_buffered_output_bytes",
                "Bytes of reports and results that are not durable yet",
            ),
            output_bytes_limit: metrics.gauge(
                "streamer_processor_buffered_output_bytes_limit",
                "Limit of streamer_processor_buffered_output_bytes \
                 (execution.max_buffered_output_bytes)",
            ),
        }
    }

    /// Exports the usage and the limit of the output budget.
    pub(crate) fn watch_output(&self, budget: &MemoryBudget, limit: usize) {
        self.output_bytes_limit.set(saturate::to_i64(limit));
        let gauge = self.output_bytes.clone();
        budget.observe(move |used| {
            gauge.set(saturate::to_i64(used));
        });
    }
}
