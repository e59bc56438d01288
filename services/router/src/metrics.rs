//! Metrics of the router.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use streamer_telemetry::{ActionLabel, LatencyHistogram, Metrics};

use crate::catalog::CatalogEntry;

pub(crate) struct RouterMetrics {
    metrics: Metrics,
    requests: Family<RequestLabels, Counter>,
    rejections: Family<ReasonLabel, Counter>,
    pub(crate) submit_seconds: LatencyHistogram,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    #[prometheus(flatten)]
    action: ActionLabel,
    mode: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// Result of a submission that was not rejected.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Submitted {
    /// A sync request was forwarded to a processor.
    Sync,
    /// An async request was stored.
    Async,
    /// A request with the same `id` existed.
    Duplicate,
}

impl RouterMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            metrics: metrics.clone(),
            requests: metrics.register(
                "streamer_router_requests",
                "Submissions that were not rejected, by action, mode (sync, async) and result: accepted, or duplicate \
                 if a request with the same id existed",
                Family::default(),
            ),
            rejections: metrics.register(
                "streamer_router_rejections",
                "Submissions that were rejected, by reason: the error code",
                Family::default(),
            ),
            submit_seconds: metrics.latency(
                "streamer_router_submit_duration_seconds",
                "Time from an async submission to its acknowledgment, without waiting for the outcome",
            ),
        }
    }

    /// Counts a submission that was not rejected. The declaration of its action is `None` if it is unknown.
    pub(crate) fn submitted(&self, declared: Option<&CatalogEntry>, submitted: Submitted) {
        let (mode, result) = match submitted {
            Submitted::Sync => ("sync", "accepted"),
            Submitted::Async => ("async", "accepted"),
            Submitted::Duplicate => ("async", "duplicate"),
        };
        let label =
            |entry: &CatalogEntry| self.metrics.action_label(&entry.action.name, entry.scope);
        let action = declared.map_or_else(|| self.metrics.other_action_label(), label);
        self.requests.get_or_create(&RequestLabels { action, mode, result }).inc();
    }

    /// Counts a rejected submission.
    pub(crate) fn rejected(&self, reason: &'static str) {
        self.rejections.get_or_create(&ReasonLabel { reason }).inc();
    }
}
