//! The metrics of this service.

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
                .counter("streamer_router_submitted_sync", "Sync requests that were admitted"),
            submitted_async: metrics
                .counter("streamer_router_submitted_async", "Async requests that were stored"),
            duplicates: metrics
                .counter("streamer_router_duplicates", "Submissions of an id that was known"),
            refused: metrics.counter("streamer_router_refused", "Submissions that were refused"),
            submit_seconds: metrics.latency(
                "streamer_router_submit_seconds",
                "From an async submission to its acknowledgement, without waiting for the outcome",
            ),
        }
    }
}
