//! Metrics of the router.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use streamer_core::ErrorCode;
use streamer_rpc::request_error;
use streamer_telemetry::{
    ActionLabel, IndexedActionLabel, IndexedFamily, LatencyHistogram, Metrics,
};
use strum::{EnumCount, IntoStaticStr};
use tonic::Status;

use crate::catalog::CatalogEntry;

pub(crate) struct RouterMetrics {
    metrics: Metrics,
    requests: IndexedFamily<RequestLabels, Counter>,
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

/// Mode of a submission.
#[derive(Clone, Copy, Debug, EnumCount, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Mode {
    /// The request is forwarded to a processor.
    Sync,
    /// The request is stored.
    Async,
    /// The action is not yet known.
    Unknown,
}

/// Result of a submission that was not rejected.
#[derive(Clone, Copy, Debug, EnumCount, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
enum SubmissionResult {
    Accepted,
    Duplicate,
    Cancelled,
}

impl RouterMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let kinds = Mode::COUNT * SubmissionResult::COUNT;
        Self {
            metrics: metrics.clone(),
            requests: IndexedFamily::register(
                metrics,
                "streamer_router_requests",
                "Submissions and redrives that were not rejected, by action, mode (sync, async) and result: accepted, \
                 duplicate if a request with the same id existed, or cancelled if the caller did not wait until the \
                 request was stored or its sync action had ended. The mode of a submission that was cancelled before \
                 its action was known is unknown",
                metrics.action_label_count().saturating_mul(kinds),
            ),
            rejections: metrics.register(
                "streamer_router_rejections",
                "Submissions and redrives that were rejected, by the router or by all processors, by reason: the \
                 error code",
                Family::default(),
            ),
            submit_seconds: metrics.latency(
                "streamer_router_submit_duration_seconds",
                "Time from an async submission to its acknowledgment, without waiting for the outcome",
            ),
        }
    }

    /// Returns the count of a submission that begins now.
    pub(crate) fn submission(self: &Arc<Self>) -> Arc<SubmissionCount> {
        Arc::new(SubmissionCount {
            metrics: self.clone(),
            labels: OnceLock::new(),
            is_counted: AtomicBool::new(false),
        })
    }

    fn count_request(&self, action: &IndexedActionLabel, mode: Mode, result: SubmissionResult) {
        let of_action = action.index * Mode::COUNT + mode as usize;
        let index = of_action * SubmissionResult::COUNT + result as usize;
        let labels = || RequestLabels {
            action: action.label.clone(),
            mode: mode.into(),
            result: result.into(),
        };
        self.requests.with(index, labels, |counter| {
            counter.inc();
        });
    }

    fn count_rejection(&self, reason: ErrorCode) {
        self.rejections.get_or_create(&ReasonLabel { reason: reason.as_str() }).inc();
    }
}

/// Count of one submission. Only the first result is counted. The count is shared by the call and by the task that
/// stores the request, which continues after the caller has disconnected; if neither has recorded a result in the end, the
/// submission is counted as cancelled.
pub(crate) struct SubmissionCount {
    metrics: Arc<RouterMetrics>,
    /// Action and mode, once they are known.
    labels: OnceLock<(IndexedActionLabel, Mode)>,
    is_counted: AtomicBool,
}

impl SubmissionCount {
    /// Records the action and the mode of the submission.
    pub(crate) fn set_action(&self, entry: &CatalogEntry, mode: Mode) {
        let metrics = &self.metrics.metrics;
        let label = || metrics.action_label(&entry.action.name, entry.scope);
        self.labels.get_or_init(|| (entry.label.get_or_init(label).clone(), mode));
    }

    /// Counts a submission whose request was stored, or executed by a processor.
    pub(crate) fn accepted(&self) {
        self.count(SubmissionResult::Accepted);
    }

    /// Counts a submission for which a request with the same `id` existed.
    pub(crate) fn duplicate(&self) {
        self.count(SubmissionResult::Duplicate);
    }

    /// Does not count a repeated call, because an earlier call was counted.
    pub(crate) fn repeated(&self) {
        self.is_counted.store(true, Ordering::Relaxed);
    }

    /// Counts a rejected submission.
    pub(crate) fn rejected(&self, status: &Status) {
        if self.is_first() {
            self.metrics.count_rejection(request_error(status).code);
        }
    }

    fn count(&self, result: SubmissionResult) {
        if self.is_first() {
            let unknown = || (self.metrics.metrics.other_action_label(), Mode::Unknown);
            let (action, mode) = self.labels.get_or_init(unknown);
            self.metrics.count_request(action, *mode, result);
        }
    }

    fn is_first(&self) -> bool {
        !self.is_counted.swap(true, Ordering::Relaxed)
    }
}

impl Drop for SubmissionCount {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.count(SubmissionResult::Cancelled);
        } else if self.is_first() {
            self.metrics.count_rejection(ErrorCode::InternalError);
        }
    }
}

#[cfg(test)]
mod tests {
    use streamer_proto::common::v1::Action;
    use streamer_telemetry::ActionScope;

    use super::*;

    fn entry(action: &str, scope: ActionScope) -> CatalogEntry {
        CatalogEntry::new(
            Action { name: action.into(), ..Action::default() },
            None,
            scope,
            Vec::new(),
        )
    }

    /// Returns the counters after a submission.
    fn counters(submit: impl FnOnce(Arc<SubmissionCount>)) -> Vec<String> {
        let metrics = Metrics::new();
        submit(Arc::new(RouterMetrics::new(&metrics)).submission());
        let text = metrics.encode();
        let counters = text.lines().filter_map(|line| line.strip_prefix("streamer_router_re"));
        counters.map(str::to_owned).collect()
    }

    #[test]
    fn a_submission_is_counted_once_with_its_first_result() {
        let accepted = "quests_total{action=\"a\",mode=\"sync\",result=\"accepted\"} 1";
        let counted = counters(|count| {
            count.set_action(&entry("a", ActionScope::AllTenants), Mode::Sync);
            count.accepted();
            count.rejected(&Status::unavailable("the handler failed"));
        });
        assert_eq!(counted, [accepted]);
        let counted = counters(|count| {
            count.rejected(&Status::unavailable("no processor"));
            count.accepted();
        });
        assert_eq!(counted, ["jections_total{reason=\"UNAVAILABLE\"} 1"]);
        assert!(counters(|count| count.repeated()).is_empty());
    }

    #[test]
    fn a_submission_without_a_result_is_cancelled_when_its_last_user_ends() {
        let counted = counters(|count| {
            count.set_action(&entry("a", ActionScope::OneTenant), Mode::Async);
            let task = count.clone();
            drop(count);
            task.duplicate();
        });
        assert_eq!(
            counted,
            ["quests_total{action=\"_other\",mode=\"async\",result=\"duplicate\"} 1"]
        );
        let cancelled = "quests_total{action=\"_other\",mode=\"unknown\",result=\"cancelled\"} 1";
        assert_eq!(counters(drop), [cancelled]);
    }

    #[test]
    fn a_submission_that_panics_is_rejected() {
        let counted = counters(|count| {
            let panicked = thread::spawn(move || {
                let _count = count;
                panic!("a defect");
            });
            panicked.join().unwrap_err();
        });
        assert_eq!(counted, ["jections_total{reason=\"INTERNAL_ERROR\"} 1"]);
    }
}
