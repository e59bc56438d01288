//! Metrics of the processor.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::AtomicU64},
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use streamer_core::{ErrorCode, Timestamp, saturate};
use streamer_handler::MemoryBudget;
use streamer_proto::common::v1::event::Kind;
use streamer_rpc::error_from_proto;
use streamer_store::QueueStats;
use streamer_telemetry::{
    ActionLabel, IndexedActionLabel, IndexedFamily, LatencyHistogram, Metrics,
};
use strum::{EnumCount, IntoStaticStr};
use tokio::time::Instant;

use crate::declaration::Declaration;

type CountersByOutcome = Arc<IndexedFamily<OutcomeLabels, Counter>>;
type LatenciesByAction = Arc<IndexedFamily<ActionLabel, LatencyHistogram>>;

#[derive(Clone)]
pub(crate) struct ProcessorMetrics {
    metrics: Metrics,
    pub(crate) attempts_in_progress: Gauge,
    attempts: CountersByOutcome,
    attempt_seconds: LatenciesByAction,
    retries: Family<ReasonLabel, Counter>,
    queued_requests_ended: CountersByOutcome,
    pub(crate) claim_conflicts: Counter,
    pub(crate) lease_expiries: Counter,
    queue_wait_seconds: LatenciesByAction,
    sync_requests: CountersByOutcome,
    sync_seconds: LatenciesByAction,
    queued_requests: Gauge,
    oldest_age_seconds: Gauge<f64, AtomicU64>,
    action_queued_requests: Family<ActionLabel, Gauge>,
    action_oldest_age_seconds: Family<ActionLabel, Gauge<f64, AtomicU64>>,
    /// Labels of the queues that were exported.
    exported_queues: Arc<Mutex<HashSet<ActionLabel>>>,
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

/// Outcome of an attempt or of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EnumCount, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum OutcomeLabel {
    Succeeded,
    Failed,
    Cancelled,
    Retrying,
    Fenced,
    Rejected,
}

impl OutcomeLabel {
    /// Returns the outcome in the final event of an attempt or request; `None` if the event is a different one.
    pub(crate) fn of(kind: &Kind) -> Option<Self> {
        match kind {
            Kind::Succeeded(_) => Some(Self::Succeeded),
            Kind::Failed(_) => Some(Self::Failed),
            Kind::Cancelled(_) => Some(Self::Cancelled),
            Kind::Retrying(_) => Some(Self::Retrying),
            Kind::Accepted(_) | Kind::Started(_) | Kind::Progress(_) | Kind::Output(_) => None,
        }
    }
}

impl ProcessorMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let actions = metrics.action_label_count();
        let counters = |name: &str, help: &str| {
            let size = actions.saturating_mul(OutcomeLabel::COUNT);
            Arc::new(IndexedFamily::register(metrics, name, help, size))
        };
        let latencies = |name: &str, help: &str| {
            Arc::new(IndexedFamily::register(metrics, name, help, actions))
        };
        Self {
            metrics: metrics.clone(),
            attempts_in_progress: metrics
                .gauge("streamer_processor_attempts_in_progress", "Attempts in progress"),
            attempts: counters(
                "streamer_processor_attempts",
                "Attempts that ended, by action and outcome: succeeded, failed, cancelled, retrying, or fenced if the \
                 attempt had lost its lease, so that a different processor ends it",
            ),
            attempt_seconds: latencies(
                "streamer_processor_attempt_duration_seconds",
                "Time from the claim to the final event of an attempt, by action",
            ),
            retries: metrics.register(
                "streamer_processor_retries",
                "Attempts that are retried, by reason: the error code",
                Family::default(),
            ),
            queued_requests_ended: counters(
                "streamer_processor_queued_requests_ended",
                "Requests that this processor ended while they waited for an attempt, by action and outcome: failed \
                 if a deadline or timeout had passed, or cancelled if their last attempt had ended before it was \
                 cancelled",
            ),
            claim_conflicts: metrics.counter(
                "streamer_processor_claim_conflicts",
                "Claims that failed because the request was already claimed",
            ),
            lease_expiries: metrics.counter(
                "streamer_processor_lease_expiries",
                "Expired leases that this processor recovered",
            ),
            queue_wait_seconds: latencies(
                "streamer_processor_queue_wait_seconds",
                "Time from the due time of a request to its claim, by action",
            ),
            sync_requests: counters(
                "streamer_processor_sync_requests",
                "Sync requests, by action and outcome: succeeded, failed, cancelled if the caller did not wait for the \
                 result, or rejected if this processor did not start the action",
            ),
            sync_seconds: latencies(
                "streamer_processor_sync_duration_seconds",
                "Duration of sync requests whose action was started, by action",
            ),
            queued_requests: metrics.gauge("streamer_processor_queued_requests", "Queued requests"),
            oldest_age_seconds: metrics.register(
                "streamer_processor_queue_oldest_age_seconds",
                "Age of the oldest due request",
                Gauge::default(),
            ),
            action_queued_requests: metrics.register(
                "streamer_processor_action_queued_requests",
                "Due requests, by action. Engine dynamodb counts up to 1,000 of each action in each shard",
                Family::default(),
            ),
            action_oldest_age_seconds: metrics.register(
                "streamer_processor_action_queue_oldest_age_seconds",
                "Age of the oldest due request, by action",
                Family::default(),
            ),
            exported_queues: Arc::default(),
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
    pub(crate) fn label(&self, declared: Option<&Declaration>) -> IndexedActionLabel {
        let Some(declared) = declared else { return self.metrics.other_action_label() };
        let key = &declared.key;
        let label = || self.metrics.action_label(&key.action, key.scope());
        declared.label.get_or_init(label).clone()
    }

    /// Counts the final event of an attempt.
    pub(crate) fn attempt_ended(&self, action: &IndexedActionLabel, kind: &Kind) {
        if let Kind::Retrying(retrying) = kind {
            let code = retrying.error.as_ref().map(|error| error_from_proto(error).code);
            let reason = code.unwrap_or(ErrorCode::InternalError).as_str();
            self.retries.get_or_create(&ReasonLabel { reason }).inc();
        }
        if let Some(outcome) = OutcomeLabel::of(kind) {
            count(&self.attempts, action, outcome);
        }
    }

    /// Counts the final event of a request that waited for an attempt.
    pub(crate) fn queued_request_ended(&self, action: &IndexedActionLabel, kind: &Kind) {
        if let Some(outcome) = OutcomeLabel::of(kind) {
            count(&self.queued_requests_ended, action, outcome);
        }
    }

    /// Counts an attempt that had lost its lease.
    pub(crate) fn attempt_fenced(&self, action: &IndexedActionLabel) {
        count(&self.attempts, action, OutcomeLabel::Fenced);
    }

    /// Records the duration of an attempt.
    pub(crate) fn attempt_took(&self, action: &IndexedActionLabel, duration: Duration) {
        observe(&self.attempt_seconds, action, duration);
    }

    /// Records the time from the due time of a request to its claim.
    pub(crate) fn waited(&self, action: &IndexedActionLabel, duration: Duration) {
        observe(&self.queue_wait_seconds, action, duration);
    }

    /// Returns a measurement of a sync request that begins now.
    pub(crate) fn sync_request(&self) -> SyncTimer<'_> {
        SyncTimer {
            metrics: self,
            action: None,
            start: Instant::now(),
            is_started: false,
            outcome: None,
        }
    }

    /// Exports the state of the queue. `find` returns the declaration of an action for all tenants.
    pub(crate) fn set_queue(
        &self,
        stats: &QueueStats,
        find: impl Fn(&str) -> Option<Arc<Declaration>>,
        now: Timestamp,
    ) {
        let age = |due: Timestamp| now.since(due).as_secs_f64();
        self.queued_requests.set(saturate::to_i64(stats.queued));
        self.oldest_age_seconds.set(stats.oldest_due.map_or(0.0, age));
        let mut by_label: HashMap<ActionLabel, (u64, f64)> = HashMap::new();
        for (action, queue) in &stats.by_action {
            let label = self.label(find(action).as_deref()).label;
            let (queued, oldest_age) = by_label.entry(label).or_default();
            *queued += queue.queued;
            *oldest_age = oldest_age.max(age(queue.oldest_due));
        }
        // The queues of actions that were exported before may be empty now.
        let mut exported = self.exported_queues.lock();
        for label in exported.iter() {
            by_label.entry(label.clone()).or_default();
        }
        for (label, (queued, oldest_age)) in by_label {
            let gauge = self.action_queued_requests.get_or_create(&label);
            gauge.set(saturate::to_i64(queued));
            drop(gauge);
            self.action_oldest_age_seconds.get_or_create(&label).set(oldest_age);
            exported.insert(label);
        }
    }

    /// Exports the usage and the limit of the output budget.
    pub(crate) fn export_output(&self, budget: &MemoryBudget, limit: usize) {
        self.output_bytes_limit.set(saturate::to_i64(limit));
        let gauge = self.output_bytes.clone();
        budget.observe(move |used| {
            gauge.set(saturate::to_i64(used));
        });
    }
}

fn count(counters: &CountersByOutcome, action: &IndexedActionLabel, outcome: OutcomeLabel) {
    let labels = || OutcomeLabels { action: action.label.clone(), outcome: outcome.into() };
    let index = action.index * OutcomeLabel::COUNT + outcome as usize;
    counters.with(index, labels, |counter| {
        counter.inc();
    });
}

fn observe(latencies: &LatenciesByAction, action: &IndexedActionLabel, duration: Duration) {
    let label = || action.label.clone();
    latencies.with(action.index, label, |latency| latency.observe(duration));
}

/// Measurement of a sync request in progress. If its caller does not wait for the result, it is recorded as cancelled.
pub(crate) struct SyncTimer<'a> {
    metrics: &'a ProcessorMetrics,
    /// `None` until the declaration of the action is found.
    action: Option<IndexedActionLabel>,
    start: Instant,
    is_started: bool,
    outcome: Option<OutcomeLabel>,
}

impl SyncTimer<'_> {
    /// Sets the declaration of the action.
    pub(crate) fn set_declaration(&mut self, declared: &Declaration) {
        self.action = Some(self.metrics.label(Some(declared)));
    }

    /// Records that the action is started.
    pub(crate) fn set_started(&mut self) {
        self.is_started = true;
    }

    /// Records the end of the request.
    pub(crate) fn record(mut self, has_succeeded: bool) {
        self.outcome = Some(match (has_succeeded, self.is_started) {
            (true, _) => OutcomeLabel::Succeeded,
            (false, true) => OutcomeLabel::Failed,
            (false, false) => OutcomeLabel::Rejected,
        });
    }
}

impl Drop for SyncTimer<'_> {
    fn drop(&mut self) {
        let is_panic = thread::panicking();
        let unrecorded = if is_panic { OutcomeLabel::Failed } else { OutcomeLabel::Cancelled };
        let action = self.action.take().unwrap_or_else(|| self.metrics.label(None));
        count(&self.metrics.sync_requests, &action, self.outcome.unwrap_or(unrecorded));
        if self.is_started {
            observe(&self.metrics.sync_seconds, &action, self.start.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::ActionSpec;
    use streamer_store::ActionQueue;

    use super::*;
    use crate::declaration::ActionKey;

    #[test]
    fn queues_are_exported_by_action_and_reset_when_they_are_empty() {
        let metrics = Metrics::new();
        let processor = ProcessorMetrics::new(&metrics);
        let at = Timestamp::from_millis;
        let find = |action: &str| {
            let key = ActionKey { action: action.into(), tenant: None };
            let declared = || Declaration::new(key, Arc::new(ActionSpec::new(action)));
            (action == "a").then(|| Arc::new(declared()))
        };
        let queue = |action: &str, queued, due| {
            (action.to_owned(), ActionQueue { queued, oldest_due: at(due) })
        };
        let stats = QueueStats {
            queued: 10,
            oldest_due: Some(at(2_000)),
            by_action: [queue("a", 3, 4_000), queue("x", 1, 3_000), queue("y", 2, 2_000)].into(),
        };
        processor.set_queue(&stats, find, at(5_000));
        let has = |line: &str| metrics.encode().lines().any(|found| found == line);
        assert!(has("streamer_processor_queued_requests 10"));
        assert!(has("streamer_processor_queue_oldest_age_seconds 3.0"));
        assert!(has("streamer_processor_action_queued_requests{action=\"a\"} 3"));
        assert!(has("streamer_processor_action_queued_requests{action=\"_other\"} 3"));
        let age = "streamer_processor_action_queue_oldest_age_seconds{action=\"_other\"}";
        assert!(has(&format!("{age} 3.0")));
        processor.set_queue(&QueueStats::default(), find, at(5_000));
        assert!(has("streamer_processor_action_queued_requests{action=\"a\"} 0"));
        assert!(has(&format!("{age} 0.0")));
    }

    #[test]
    fn each_sync_request_has_one_outcome_and_a_duration_if_it_was_started() {
        let metrics = Metrics::new();
        let processor = ProcessorMetrics::new(&metrics);
        let key = ActionKey { action: "a".into(), tenant: None };
        let declared = Declaration::new(key, Arc::new(ActionSpec::new("a")));
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
