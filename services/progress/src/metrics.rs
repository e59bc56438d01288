//! Metrics of the progress service.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use streamer_core::saturate;
use streamer_handler::MemoryBudget;
use streamer_telemetry::{LatencyHistogram, Metrics};

#[derive(Clone)]
pub(crate) struct ProgressMetrics {
    pub(crate) events: Counter,
    pub(crate) append_seconds: LatencyHistogram,
    pub(crate) fenced: Counter,
    pub(crate) watchers: Gauge,
    pub(crate) topics: Gauge,
    pub(crate) tail_bytes: Gauge,
    pub(crate) replayed: Counter,
    pub(crate) missed: Counter,
    pub(crate) unannounced: Gauge,
    pub(crate) undelivered_seconds: Gauge<f64, AtomicU64>,
}

/// Exports the usage and the limit of the budget for unread messages.
pub(crate) fn observe_unread(metrics: &Metrics, budget: &MemoryBudget, limit: usize) {
    let name = "streamer_progress_unread_watch_bytes";
    let gauge =
        metrics.gauge(name, "Bytes of large messages that were sent to watchers and not read");
    let limit_name = "streamer_progress_unread_watch_bytes_limit";
    let help = "Limit of streamer_progress_unread_watch_bytes (limits.max_unread_watch_bytes)";
    metrics.gauge(limit_name, help).set(saturate::to_i64(limit));
    budget.observe(move |used| {
        gauge.set(saturate::to_i64(used));
    });
}

impl ProgressMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            events: metrics.counter("streamer_progress_events", "Events appended by publishers"),
            append_seconds: metrics.latency(
                "streamer_progress_append_duration_seconds",
                "Time from a publish call until its events are durable",
            ),
            fenced: metrics.counter(
                "streamer_progress_fenced",
                "Publish calls that failed because their attempts are fenced",
            ),
            watchers: metrics.gauge("streamer_progress_watchers", "Open watch streams"),
            topics: metrics.gauge("streamer_progress_topics", "Requests with a tail in memory"),
            tail_bytes: metrics.gauge(
                "streamer_progress_tail_bytes",
                "Bytes of the latest events of all requests in memory",
            ),
            missed: metrics.counter(
                "streamer_progress_missed_events",
                "Events of watched requests that were found in the store and not announced within 5 s \
                 after the first of them was found",
            ),
            unannounced: metrics.gauge(
                "streamer_progress_unannounced_events",
                "Events of watched requests that were found in the store and may still be announced",
            ),
            undelivered_seconds: metrics.register(
                "streamer_progress_undelivered_age_seconds",
                "Maximum age, over all watched requests, of the newest event that has not been \
                 delivered to a watcher that was up to date",
                Gauge::default(),
            ),
            replayed: metrics.counter(
                "streamer_progress_replayed_events",
                "Events that watchers read from the store instead of memory",
            ),
        }
    }
}
