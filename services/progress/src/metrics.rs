//! The metrics of this service.

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};
use streamer_telemetry::Metrics;

#[derive(Clone)]
pub(crate) struct ProgressMetrics {
    pub(crate) events: Counter,
    pub(crate) append_seconds: Histogram,
    pub(crate) fenced: Counter,
    pub(crate) watchers: Gauge,
    pub(crate) topics: Gauge,
    pub(crate) replayed: Counter,
}

impl ProgressMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            events: metrics.counter("streamer_progress_events", "Events appended by publishers"),
            append_seconds: metrics.latency(
                "streamer_progress_append_seconds",
                "From a publish call to its events being durable",
            ),
            fenced: metrics.counter(
                "streamer_progress_fenced",
                "Publish calls of attempts that are not current",
            ),
            watchers: metrics.gauge("streamer_progress_watchers", "Open watch streams"),
            topics: metrics.gauge("streamer_progress_topics", "Requests with a tail in memory"),
            replayed: metrics.counter(
                "streamer_progress_replayed_events",
                "Events that watchers read from the store instead of memory",
            ),
        }
    }
}
