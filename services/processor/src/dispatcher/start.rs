//! Claims requests and runs their attempts, in this process or on a worker.

use std::sync::Arc;

use streamer_core::{OutputDigest, Uid};
use streamer_handler::{DynHandler, ReportQueue};
use streamer_proto::common::v1::{Cancelled, event::Kind};
use streamer_store::{CancelOutcome, Claim, ClaimOutcome, Claimed, RequestRecord, StoreError};
use streamer_telemetry::{AttemptSpan, InScope, IndexedActionLabel, Scope, TraceContext, Waited};
use tokio::time::Instant;
use tracing::Instrument;

use super::{
    Dispatcher,
    claim::{ClaimTiming, claim_until_answered},
};
use crate::{
    actions::Runner,
    attempt::{
        self, AttemptHandle, AttemptResult, AttemptSpec,
        log_lines::{attempt_span, log_end},
    },
    declaration::Declaration,
    workers::{
        remote_handler::{Assignment, RemoteHandler},
        remote_task::RemoteTask,
    },
};

impl Dispatcher {
    pub(super) async fn claim_and_run(
        &self,
        uid: Uid,
        declared: Arc<Declaration>,
        runner: Runner,
        handle: Arc<AttemptHandle>,
    ) {
        let now = self.now();
        let claim = Claim {
            uid,
            holder: self.name.clone(),
            worker: match &runner {
                Runner::Local(_) => None,
                Runner::Remote(permit) => Some(permit.worker.assigned.clone()),
            },
            now,
            lease_until: now.plus(self.options.lease),
            repeats: None,
        };
        let clock = &*self.environment.clock;
        let (outcome, timing) =
            claim_until_answered(claim, clock, self.stopped(), |claim| self.store.claim(claim))
                .await;
        match outcome {
            Ok(ClaimOutcome::Claimed(claimed)) => {
                self.running.set_claimed(uid, claimed.record.attempt);
                let record = &claimed.record;
                self.metrics.waited(
                    &self.metrics.label(Some(&declared)),
                    timing.started_at.since(record.not_before),
                );
                self.run_claimed(*claimed, declared, runner, handle, timing).await;
            }
            Ok(ClaimOutcome::Overdue(record)) => self.fail_unstarted(&record).await,
            Ok(ClaimOutcome::NotClaimable) => {
                self.metrics.claim_conflicts.inc();
            }
            Err(error) => {
                if matches!(error, StoreError::Corrupt { .. }) {
                    tracing::error!(%error, %uid, "failed to claim a request: the stored data is corrupt");
                    self.scheduler.lock().quarantine(uid, timing.started_at);
                } else {
                    tracing::warn!(%error, %uid, "failed to claim a request; it stays queued");
                }
                self.wakeup.mark_scan_pending();
            }
        }
    }

    /// Creates the queue for the reports of an attempt.
    pub(super) fn report_queue(&self, record: &RequestRecord) -> ReportQueue {
        ReportQueue::with_budget(self.output_budget.clone(), &record.owner.tenant)
    }

    async fn run_claimed(
        &self,
        claimed: Claimed,
        declared: Arc<Declaration>,
        runner: Runner,
        handle: Arc<AttemptHandle>,
        claim_timing: ClaimTiming,
    ) {
        let Claimed { record, payload, checkpoint, started } = claimed;
        if let Some(reason) = &record.cancel_reason {
            handle.cancel(reason);
        }
        let reports = Arc::new(self.report_queue(&record));
        let is_remote = matches!(runner, Runner::Remote(_));
        let attempt_spec = |handler: Arc<dyn DynHandler>| AttemptSpec {
            declared: declared.clone(),
            handler,
            reports: reports.clone(),
            payload,
            checkpoint,
            started: Some(started),
            output: OutputDigest::default(),
            record: record.clone(),
            is_remote,
        };
        match runner {
            Runner::Local(handler) => {
                self.run_attempt(attempt_spec(handler), handle, Some(claim_timing)).await;
            }
            Runner::Remote(permit) => {
                let task = RemoteTask::new(&record, 0, reports.clone(), &self.output_budget);
                let assignment = Some(Assignment { sync: false });
                let remote = Arc::new(RemoteHandler::new(
                    permit.worker.clone(),
                    declared.spec.clone(),
                    task,
                    assignment,
                    Some(handle.clone()),
                    self.options.cancellation_grace_period,
                ));
                let attempt_spec = attempt_spec(remote.clone());
                self.run_remote(attempt_spec, &remote, handle, Some(claim_timing)).await;
            }
        }
    }

    pub(super) async fn run_remote(
        &self,
        attempt_spec: AttemptSpec,
        remote: &RemoteHandler,
        handle: Arc<AttemptHandle>,
        claim_timing: Option<ClaimTiming>,
    ) {
        if self.run_attempt(attempt_spec, handle, claim_timing).await {
            remote.send_ended();
        } else if self.is_stopping() {
            // The worker still runs the attempt, and will resume it on another processor.
            remote.worker.unassign(&remote.task);
        } else {
            remote.send_revoke("the attempt has a different owner");
        }
    }

    /// Runs an attempt; returns whether its final event is durable.
    async fn run_attempt(
        &self,
        attempt_spec: AttemptSpec,
        handle: Arc<AttemptHandle>,
        claim_timing: Option<ClaimTiming>,
    ) -> bool {
        let record = &attempt_spec.record;
        let scope = self.trace(record, claim_timing);
        let span = attempt_span(record);
        let started_at = Instant::now();
        let (uid, action) = (record.uid, record.action.clone());
        let tenant = record.owner.tenant.clone();
        let label = self.metrics.label(Some(&attempt_spec.declared));
        self.metrics.attempts_in_progress.inc();
        let running = attempt::run(&self.environment, attempt_spec, handle);
        let result = Box::pin(running).instrument(span.clone()).in_scope(scope.clone()).await;
        scope.run(|| self.metrics.attempt_took(&label, started_at.elapsed()));
        scope.end_attempt(result.outcome(), result.error());
        self.metrics.attempts_in_progress.dec();
        match result {
            AttemptResult::Recorded(kind, retry_at, cancel_reason) => {
                self.runtime_estimates.record(&tenant, &action, started_at.elapsed());
                self.metrics.attempt_ended(&label, &kind);
                scope.run(|| span.in_scope(|| log_end(&kind, Some(started_at.elapsed()))));
                match (retry_at, cancel_reason) {
                    // Cancellation was requested after the final event was determined.
                    (Some(_), Some(reason)) => self.cancel_queued(uid, reason, &label).await,
                    (Some(retry_at), None) => self.record_due(retry_at),
                    (None, _) => {}
                }
                true
            }
            AttemptResult::Fenced => {
                self.metrics.attempt_fenced(&label);
                false
            }
        }
    }

    /// Returns the scope of an attempt: with a separate trace if the trace of the submission is sampled.
    fn trace(&self, record: &RequestRecord, claim_timing: Option<ClaimTiming>) -> Scope {
        let Some(parent) = &record.trace_parent else { return Scope::default() };
        let submission = TraceContext::parse(parent, record.trace_state.as_deref());
        let Some(submission) = submission else { return Scope::default() };
        // Most requests are not sampled, and do not need the request ID.
        let request_id = if submission.is_sampled() { record.request_id() } else { String::new() };
        self.traces.attempt(&AttemptSpan {
            uid: record.uid,
            attempt: record.attempt,
            submission: &submission,
            waited: claim_timing.map(|claim_timing| Waited {
                since: record.not_before.into(),
                until: claim_timing.started_at.into(),
                claim: claim_timing.duration,
            }),
            action: &record.action,
            tenant: &record.owner.tenant,
            request_id: &request_id,
        })
    }

    /// Cancels a request that waits for its next attempt.
    async fn cancel_queued(&self, uid: Uid, reason: String, label: &IndexedActionLabel) {
        match self.store.cancel(uid, reason, self.now()).await {
            Ok(CancelOutcome::Cancelled(record, event)) => {
                self.metrics.queued_request_ended(label, &Kind::Cancelled(Cancelled::default()));
                self.environment.log.announce(record.uid, vec![*event]).await;
            }
            // The request is already running again, and its attempt will be notified.
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, %uid, "failed to cancel a request; its next attempt will be notified");
            }
        }
    }
}
