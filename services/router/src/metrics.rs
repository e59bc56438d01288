//! Metrics of the router.

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};
use streamer_telemetry::Metrics;

pub(crate) struct RouterMetrics {
    pub(crate) submitted_sync: Counter,
    pub(crate) submitted_async: Counter,
    pub(crate) duplicates: Counter,
    pub(crate) refused: Counter,
    pub(crate) submit_seconds: Histogram,
}

impl RouterMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            submitted_sync: metrics
                .counter("streamer_router_submitted_sync", "Admitted sync requests"),
            submitted_async: metrics
                .counter("streamer_router_submitted_async", "Stored async requests"),
            duplicates: metrics
                .counter("streamer_router_duplicates", "Submissions with the ID of an existing request"),
            refused: metrics.counter("streamer_router_refused", "Rejected submissions"),
            submit_seconds: metrics.latency(
                "streamer_router_submit_seconds",
                "Time from an async submission to its acknowledgement, without waiting for the outcome",
            ),
        }
    }
}
