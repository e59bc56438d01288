//! Claiming a request and running the attempt, here or in a worker.

use std::{sync::Arc, time::Duration};

use streamer_core::{ActionSpec, OutputDigest, Timestamp, Uid};
use streamer_handler::{DynHandler, ReportQueue};
use streamer_proto::common::v1::event::Kind;
use streamer_store::{CancelOutcome, Claim, ClaimOutcome, Claimed, RequestRecord, StoreError};
use streamer_telemetry::{AttemptSpan, InScope, Scope, TraceContext, Waited};
use tokio::time::Instant;
use tracing::Instrument;

use super::Dispatcher;
use crate::{
    actions::Runner,
    attempt::{self, AttemptHandle, Finished, Launch},
    remote::{Assignment, RemoteHandler},
    remote_task::RemoteTask,
};

/// When an attempt was claimed.
#[derive(Clone, Copy)]
pub(super) struct Claiming {
    began: Timestamp,
    took: Duration,
}

impl Dispatcher {
    pub(super) async fn claim_and_run(
        &self,
        uid: Uid,
        spec: Arc<ActionSpec>,
        runner: Runner,
        handle: Arc<AttemptHandle>,
    ) {
        let now = self.now();
        let claim = Claim {
            uid,
            holder: self.name.clone(),
            worker: match &runner {
                Runner::Local(_) => None,
                Runner::Remote(seat) => Some(seat.worker.assigned.clone()),
            },
            now,
            lease_until: now.plus(self.options.lease),
        };
        let began = Instant::now();
        match self.store.claim(claim).await {
            Ok(ClaimOutcome::Claimed(claimed)) => {
                if let Some(running) = self.running.lock().get_mut(&uid) {
                    running.attempt = claimed.record.attempt;
                }
                self.metrics
                    .wait_seconds
                    .observe(now.since(claimed.record.not_before).as_secs_f64());
                let claiming = Claiming { began: now, took: began.elapsed() };
                self.run_claimed(*claimed, spec, runner, handle, claiming).await;
            }
            Ok(ClaimOutcome::Overdue(record)) => self.fail_unrun(&record).await,
            Ok(ClaimOutcome::NotClaimable) => {
                self.metrics.claims_missed.inc();
            }
            Err(error) => {
                if matches!(error, StoreError::Corrupt { .. }) {
                    tracing::error!(%error, %uid, "cannot run a request; it waits until it can be read");
                    self.set_aside.note(uid, now);
                } else {
                    tracing::warn!(%error, %uid, "could not claim; it will be found again");
                }
                self.signal.note_backlog();
            }
        }
    }

    /// For what an attempt of this request reports.
    pub(super) fn report_queue(&self, record: &RequestRecord) -> ReportQueue {
        ReportQueue::within(self.output_budget.clone(), &record.owner.tenant)
    }

    async fn run_claimed(
        &self,
        claimed: Claimed,
        spec: Arc<ActionSpec>,
        runner: Runner,
        handle: Arc<AttemptHandle>,
        claiming: Claiming,
    ) {
        let Claimed { record, payload, checkpoint, started } = claimed;
        if let Some(reason) = &record.cancel_reason {
            handle.cancel(reason);
        }
        let reports = Arc::new(self.report_queue(&record));
        let is_remote = matches!(runner, Runner::Remote(_));
        let launch = |handler: Arc<dyn DynHandler>| Launch {
            spec: spec.clone(),
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
                self.run_attempt(launch(handler), handle, Some(claiming)).await;
            }
            Runner::Remote(seat) => {
                let task = RemoteTask::new(&record, 0, reports.clone(), &self.output_budget);
                let assignment = Some(Assignment { sync: false });
                let remote = Arc::new(RemoteHandler::new(
                    seat.worker.clone(),
                    spec.clone(),
                    task,
                    assignment,
                    Some(handle.clone()),
                    self.options.cancel_grace,
                ));
                let launch = launch(remote.clone());
                self.run_remote(launch, &remote, handle, Some(claiming)).await;
            }
        }
    }

    pub(super) async fn run_remote(
        &self,
        launch: Launch,
        remote: &RemoteHandler,
        handle: Arc<AttemptHandle>,
        claiming: Option<Claiming>,
    ) {
        if self.run_attempt(launch, handle, claiming).await {
            remote.ended();
        } else if self.is_stopping() {
            // It is the worker's still: it will bring it to whoever takes over.
            remote.worker.unassign(&remote.task);
        } else {
            remote.revoked("the attempt is another's now");
        }
    }

    /// Runs an attempt; whether its end is durable, and not another's.
    async fn run_attempt(
        &self,
        launch: Launch,
        handle: Arc<AttemptHandle>,
        claiming: Option<Claiming>,
    ) -> bool {
        let record = &launch.record;
        let scope = self.trace(record, claiming);
        let span = tracing::info_span!(
            "attempt",
            request_id = record.request_id(),
            uid = %record.uid,
            tenant_id = record.owner.tenant,
            action = record.action,
            attempt = record.attempt,
        );
        let began = Instant::now();
        let (uid, action) = (record.uid, record.action.clone());
        let tenant = record.owner.tenant.clone();
        self.metrics.running.inc();
        let running = attempt::run(&self.environment, launch, handle);
        let finished = Box::pin(running).instrument(span).in_scope(scope.clone()).await;
        scope.end_attempt(finished.outcome(), finished.error());
        self.metrics.running.dec();
        self.metrics.run_seconds.observe(began.elapsed().as_secs_f64());
        match finished {
            Finished::Concluded(kind, retry_at, cancel_reason) => {
                self.durations.note(&tenant, &action, began.elapsed());
                self.count(&kind);
                match (retry_at, cancel_reason) {
                    // Asked for when the attempt had already decided how it ends.
                    (Some(_), Some(reason)) => self.cancel_queued(uid, reason).await,
                    (Some(retry_at), None) => self.note_due(retry_at),
                    (None, _) => {}
                }
                true
            }
            Finished::Lost => {
                self.metrics.lost.inc();
                false
            }
        }
    }

    /// The trace of an attempt: one of its own if the submission is sampled.
    fn trace(&self, record: &RequestRecord, claiming: Option<Claiming>) -> Scope {
        let Some(parent) = &record.trace_parent else { return Scope::default() };
        let submission = TraceContext::parse(parent, record.trace_state.as_deref());
        let Some(submission) = submission else { return Scope::default() };
        // Most requests are not sampled, and need no name.
        let request_id = if submission.is_sampled() { record.request_id() } else { String::new() };
        self.traces.attempt(&AttemptSpan {
            uid: record.uid,
            attempt: record.attempt,
            submission: &submission,
            waited: claiming.map(|claiming| Waited {
                since: record.not_before.into(),
                until: claiming.began.into(),
                claim: claiming.took,
            }),
            action: &record.action,
            tenant: &record.owner.tenant,
            request_id: &request_id,
        })
    }

    /// Ends a request that waits for another attempt, though cancellation was asked for.
    async fn cancel_queued(&self, uid: Uid, reason: String) {
        match self.store.cancel(uid, reason, self.now()).await {
            Ok(CancelOutcome::Cancelled(record, event)) => {
                self.metrics.cancelled.inc();
                self.environment.log.announce(record.uid, vec![*event]).await;
            }
            // It runs again, and its attempt will be told.
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, %uid, "could not cancel; the next attempt will be told");
            }
        }
    }

    pub(super) fn count(&self, kind: &Kind) {
        match kind {
            Kind::Succeeded(_) => self.metrics.succeeded.inc(),
            Kind::Failed(_) => self.metrics.failed.inc(),
            Kind::Cancelled(_) => self.metrics.cancelled.inc(),
            Kind::Retrying(_) => self.metrics.retried.inc(),
            Kind::Accepted(_) | Kind::Started(_) | Kind::Progress(_) | Kind::Output(_) => return,
        };
    }
}
