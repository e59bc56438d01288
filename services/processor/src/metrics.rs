//! Metrics of the processor.

use std::{sync::atomic::AtomicU64, thread, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use streamer_core::{ErrorCode, saturate};
use streamer_handler::MemoryBudget;
use streamer_proto::common::v1::event::Kind;
use streamer_rpc::error_from_proto;
use streamer_telemetry::{ActionLabel, LatencyFamily, Metrics};
use tokio::time::Instant;

use crate::declaration::{ActionKey, Declaration};

#[derive(Clone)]
pub(crate) struct ProcessorMetrics {
    metrics: Metrics,
    pub(crate) attempts_in_progress: Gauge,
    attempts: Family<OutcomeLabels, Counter>,
    attempt_seconds: LatencyFamily<ActionLabel>,
    retries: Family<ReasonLabel, Counter>,
    queued_requests_ended: Family<OutcomeLabels, Counter>,
    pub(crate) claim_conflicts: Counter,
    pub(crate) lease_expiries: Counter,
    queue_wait_seconds: LatencyFamily<ActionLabel>,
    sync_requests: Family<OutcomeLabels, Counter>,
    sync_seconds: LatencyFamily<ActionLabel>,
    queued_requests: Gauge,
    oldest_age_seconds: Gauge<f64, AtomicU64>,
    output_bytes: Gauge,
    output_bytes_limit: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabels {
    #[prometheus(flatten)]
    action: ActionLabel,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

impl ProcessorMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            metrics: metrics.clone(),
            attempts_in_progress: metrics
                .gauge("streamer_processor_attempts_in_progress", "Attempts in progress"),
            attempts: metrics.register(
                "streamer_processor_attempts",
                "Attempts that ended, by action and outcome: succeeded, failed, cancelled, retrying, or fenced if the \
                 attempt had lost its lease, so that a different processor ends it",
                Family::default(),
            ),
            attempt_seconds: metrics.latency_by_action(
                "streamer_processor_attempt_duration_seconds",
                "Time from the claim to the final event of an attempt, by action",
            ),
            retries: metrics.register(
                "streamer_processor_retries",
                "Attempts that are retried, by reason: the error code",
                Family::default(),
            ),
            queued_requests_ended: metrics.register(
                "streamer_processor_queued_requests_ended",
                "Requests that this processor ended while they waited for an attempt, by action and outcome: failed \
                 if a deadline or timeout had passed, or cancelled if their last attempt had ended before it was \
                 cancelled",
                Family::default(),
            ),
            claim_conflicts: metrics.counter(
                "streamer_processor_claim_conflicts",
                "Claims that failed because the request was already claimed",
            ),
            lease_expiries: metrics.counter(
                "streamer_processor_lease_expiries",
                "Expired leases that this processor recovered",
            ),
            queue_wait_seconds: metrics.latency_by_action(
                "streamer_processor_queue_wait_seconds",
                "Time from the due time of a request to its claim, by action",
            ),
            sync_requests: metrics.register(
                "streamer_processor_sync_requests",
                "Sync requests, by action and outcome: succeeded, failed, cancelled if the caller did not wait for the \
                 result, or rejected if this processor did not start the action",
                Family::default(),
            ),
            sync_seconds: metrics.latency_by_action(
                "streamer_processor_sync_duration_seconds",
                "Duration of sync requests whose action was started, by action",
            ),
            queued_requests: metrics
                .gauge("streamer_processor_queued_requests", "Queued requests"),
            oldest_age_seconds: metrics.register(
                "streamer_processor_queue_oldest_age_seconds",
                "Age of the oldest due request",
                Gauge::default(),
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

    /// Returns the label of an action with the given declaration; `None` if it has none.
    pub(crate) fn label(&self, declared: Option<&Declaration>) -> ActionLabel {
        let label = |key: &ActionKey| self.metrics.action_label(&key.action, key.scope());
        let key = declared.map(|declared| &declared.key);
        key.map_or_else(|| self.metrics.other_action_label(), label)
    }

    /// Counts the final event of an attempt.
    pub(crate) fn attempt_ended(&self, action: &ActionLabel, kind: &Kind) {
        if let Kind::Retrying(retrying) = kind {
            let code = retrying.error.as_ref().map(|error| error_from_proto(error).code);
            let reason = code.unwrap_or(ErrorCode::InternalError).as_str();
            self.retries.get_or_create(&ReasonLabel { reason }).inc();
        }
        if let Some(outcome) = outcome_name(kind) {
            self.attempts.get_or_create(&Self::outcome(action, outcome)).inc();
        }
    }

    /// Counts the final event of a request that waited for an attempt.
    pub(crate) fn queued_request_ended(&self, action: &ActionLabel, kind: &Kind) {
        if let Some(outcome) = outcome_name(kind) {
            self.queued_requests_ended.get_or_create(&Self::outcome(action, outcome)).inc();
        }
    }

    /// Counts an attempt that had lost its lease.
    pub(crate) fn attempt_fenced(&self, action: &ActionLabel) {
        self.attempts.get_or_create(&Self::outcome(action, "fenced")).inc();
    }

    /// Records the duration of an attempt.
    pub(crate) fn attempt_took(&self, action: &ActionLabel, duration: Duration) {
        let histogram = self.attempt_seconds.get_or_create(action);
        histogram.observe(duration);
    }

    /// Records the time from the due time of a request to its claim.
    pub(crate) fn waited(&self, action: &ActionLabel, duration: Duration) {
        let histogram = self.queue_wait_seconds.get_or_create(action);
        histogram.observe(duration);
    }

    /// Returns a measurement of a sync request that begins now.
    pub(crate) fn sync_request(&self) -> SyncTimer<'_> {
        SyncTimer {
            metrics: self,
            action: self.label(None),
            start: Instant::now(),
            is_started: false,
            outcome: None,
        }
    }

    /// Exports the state of the queue.
    pub(crate) fn set_queue(&self, queued: u64, oldest_age: Duration) {
        self.queued_requests.set(saturate::to_i64(queued));
        self.oldest_age_seconds.set(oldest_age.as_secs_f64());
    }

    /// Exports the usage and the limit of the output budget.
    pub(crate) fn export_output(&self, budget: &MemoryBudget, limit: usize) {
        self.output_bytes_limit.set(saturate::to_i64(limit));
        let gauge = self.output_bytes.clone();
        budget.observe(move |used| {
            gauge.set(saturate::to_i64(used));
        });
    }

    fn outcome(action: &ActionLabel, outcome: &'static str) -> OutcomeLabels {
        OutcomeLabels { action: action.clone(), outcome }
    }
}

/// Returns the outcome in the final event of an attempt or request; `None` if the event is a different one.
pub(crate) fn outcome_name(kind: &Kind) -> Option<&'static str> {
    match kind {
        Kind::Succeeded(_) => Some("succeeded"),
        Kind::Failed(_) => Some("failed"),
        Kind::Cancelled(_) => Some("cancelled"),
        Kind::Retrying(_) => Some("retrying"),
        Kind::Accepted(_) | Kind::Started(_) | Kind::Progress(_) | Kind::Output(_) => None,
    }
}

/// Measurement of a sync request in progress. If its caller does not wait for the result, it is recorded as cancelled.
pub(crate) struct SyncTimer<'a> {
    metrics: &'a ProcessorMetrics,
    action: ActionLabel,
    start: Instant,
    is_started: bool,
    outcome: Option<&'static str>,
}

impl SyncTimer<'_> {
    /// Sets the declaration of the action.
    pub(crate) fn set_declaration(&mut self, declared: &Declaration) {
        self.action = self.metrics.label(Some(declared));
    }

    /// Records that the action is started.
    pub(crate) fn set_started(&mut self) {
        self.is_started = true;
    }

    /// Records the end of the request.
    pub(crate) fn record(mut self, has_succeeded: bool) {
        self.outcome = Some(match (has_succeeded, self.is_started) {
            (true, _) => "succeeded",
            (false, true) => "failed",
            (false, false) => "rejected",
        });
    }
}

impl Drop for SyncTimer<'_> {
    fn drop(&mut self) {
        let unrecorded = if thread::panicking() { "failed" } else { "cancelled" };
        let outcome = self.outcome.unwrap_or(unrecorded);
        let labels = ProcessorMetrics::outcome(&self.action, outcome);
        self.metrics.sync_requests.get_or_create(&labels).inc();
        if self.is_started {
            self.metrics.sync_seconds.get_or_create(&self.action).observe(self.start.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use streamer_core::ActionSpec;

    use super::*;

    #[test]
    fn each_sync_request_has_one_outcome_and_a_duration_if_it_was_started() {
        let metrics = Metrics::new();
        let processor = ProcessorMetrics::new(&metrics);
        let key = ActionKey { action: "a".into(), tenant: None };
        let declared = Declaration { key, spec: Arc::new(ActionSpec::new("a")) };
        let start = || {
            let mut timer = processor.sync_request();
            timer.set_declaration(&declared);
            timer.set_started();
            timer
        };
        start().record(true);
        start().record(false);
        drop(start());
        let mut rejected = processor.sync_request();
        rejected.set_declaration(&declared);
        rejected.record(false);
        processor.sync_request().record(false);
        let text = metrics.encode();
        for line in [
            "streamer_processor_sync_requests_total{action=\"a\",outcome=\"succeeded\"} 1",
            "streamer_processor_sync_requests_total{action=\"a\",outcome=\"failed\"} 1",
            "streamer_processor_sync_requests_total{action=\"a\",outcome=\"cancelled\"} 1",
            "streamer_processor_sync_requests_total{action=\"a\",outcome=\"rejected\"} 1",
            "streamer_processor_sync_requests_total{action=\"_other\",outcome=\"rejected\"} 1",
            "streamer_processor_sync_duration_seconds_count{action=\"a\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in {text}");
        }
        assert!(!text.contains("sync_duration_seconds_count{action=\"_other\"}"), "{text}");
    }
}
