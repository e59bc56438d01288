//! State of a task of a worker, in the processor.

mod arrivals;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{AttemptNumber, Uid, saturate};
use streamer_handler::{MemoryBudget, PauseGuard, ReportQueue, ReportSource, Reservation};
use streamer_proto::processor::v1::{Acknowledgment, Cancel, Report, Resend, Revoke, report};
use streamer_store::RequestRecord;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use self::arrivals::{Arrival, Arrivals};
use crate::workers::report_buffer::ReportBuffer;

/// State of one attempt that a worker runs.
pub(crate) struct RemoteTask {
    pub(crate) uid: Uid,
    pub(crate) attempt: AttemptNumber,
    /// Name of the action.
    pub(crate) action: String,
    /// Tenant of the request.
    pub(crate) tenant: String,
    /// Whether the task is a sync call, which ends with the stream of its worker.
    pub(crate) sync: bool,
    created_at: Instant,
    pub(crate) buffer: ReportBuffer,
    arrivals: Mutex<Arrivals>,
    /// Signals that reports were dropped.
    dropped: Notify,
    /// Source of the reports; paused while dropped reports have not been resent.
    source: Arc<ReportSource>,
    /// Guard that pauses `source`; `None` while it is not paused.
    paused: Mutex<Option<PauseGuard>>,
    /// When dropped reports were requested again, until one of them arrives.
    requested_at: Mutex<Option<Instant>>,
    /// Signals that the worker no longer runs the attempt.
    revoked: CancellationToken,
    revoke_reason: Mutex<Option<String>>,
    never_started: AtomicBool,
    cancel: Mutex<Option<Cancel>>,
    reports: Arc<ReportQueue>,
}

impl RemoteTask {
    /// Creates the task of an attempt whose first `received` reports are durable.
    pub(crate) fn new(
        record: &RequestRecord,
        received: i64,
        reports: Arc<ReportQueue>,
        budget: &Arc<MemoryBudget>,
    ) -> Self {
        reports.set_durable(received);
        let arrivals = Mutex::new(Arrivals::new(received));
        let (action, tenant) = (&record.action, &record.owner.tenant);
        let buffer = ReportBuffer::new(budget.clone(), tenant);
        Self {
            arrivals,
            ..Self::begin(record.uid, record.attempt, action, tenant, reports, buffer)
        }
    }

    /// Creates the task of a sync call.
    pub(crate) fn sync(uid: Uid, action: &str, tenant: &str, budget: &Arc<MemoryBudget>) -> Self {
        let reports = Arc::new(ReportQueue::discarding());
        let buffer = ReportBuffer::new(budget.clone(), tenant);
        Self {
            sync: true,
            ..Self::begin(uid, AttemptNumber::FIRST, action, tenant, reports, buffer)
        }
    }

    fn begin(
        uid: Uid,
        attempt: AttemptNumber,
        action: &str,
        tenant: &str,
        reports: Arc<ReportQueue>,
        buffer: ReportBuffer,
    ) -> Self {
        let source = Arc::<ReportSource>::default();
        reports.set_source(source.clone());
        Self {
            uid,
            attempt,
            action: action.to_owned(),
            tenant: tenant.to_owned(),
            sync: false,
            created_at: Instant::now(),
            buffer,
            arrivals: Mutex::default(),
            dropped: Notify::new(),
            source,
            paused: Mutex::default(),
            requested_at: Mutex::default(),
            revoked: CancellationToken::new(),
            revoke_reason: Mutex::default(),
            never_started: AtomicBool::new(false),
            cancel: Mutex::default(),
            reports,
        }
    }

    /// Returns an acknowledgment of all durable reports; `ended` states whether the end of the attempt is durable.
    pub(crate) fn acknowledgment(&self, ended: bool) -> Acknowledgment {
        Acknowledgment {
            uid: self.uid.to_string(),
            attempt: self.attempt.as_i32(),
            number: *self.reports.durable().borrow(),
            ended,
            max_unacknowledged_bytes: saturate::to_i64(self.buffer.window()),
        }
    }

    /// Returns a receiver for the number of durable reports.
    pub(crate) fn durable(&self) -> watch::Receiver<i64> {
        self.reports.durable()
    }

    pub(crate) fn revocation(&self, reason: impl Into<String>) -> Revoke {
        let attempt = self.attempt.as_i32();
        Revoke { uid: self.uid.to_string(), attempt, reason: reason.into() }
    }

    /// Sets the reservation for the next report from the worker.
    pub(crate) fn prepay(&self, reserved: Reservation) {
        self.reports.prepay(reserved);
    }

    /// Prepares the task for a new stream of the worker; the previous stream must have ended.
    pub(crate) fn restart(&self) {
        self.arrivals.lock().restart();
        *self.paused.lock() = None;
        *self.requested_at.lock() = None;
    }

    /// Delivers a report from the worker. If the buffer lacks capacity, the report and all later ones are dropped until
    /// [`Self::request_resend`] requests them again. A report from a stream that has ended is dropped too.
    ///
    /// # Errors
    /// Fails if the report violates the protocol.
    pub(crate) fn deliver(
        &self,
        report: &Report,
        kind: report::Kind,
        stream_has_ended: impl FnOnce() -> bool,
    ) -> Result<(), Status> {
        // Locked until the report is delivered, because reports from an old stream may still arrive.
        let mut arrivals = self.arrivals.lock();
        if stream_has_ended() {
            return Ok(());
        }
        match arrivals.accept(&self.buffer, report.number, report.resends, kind)? {
            Arrival::Delivered => *self.requested_at.lock() = None,
            Arrival::Dropped => {
                *self.requested_at.lock() = None;
                self.paused.lock().get_or_insert_with(|| self.source.pause());
                self.dropped.notify_one();
            }
            Arrival::Ignored => {}
        }
        Ok(())
    }

    /// Waits until the buffer has capacity for dropped reports, and sends the message that requests them again.
    pub(crate) async fn request_resend(&self, send: impl FnOnce(Resend)) {
        loop {
            let needed = self.arrivals.lock().bytes_to_reserve();
            let Some(needed) = needed else {
                self.dropped.notified().await;
                continue;
            };
            let reserved = self.buffer.reserve(needed).await;
            // Locked until the message is sent, so that it cannot reach a later stream.
            let mut arrivals = self.arrivals.lock();
            if let Some((number, resends)) = arrivals.request_resend(reserved) {
                *self.paused.lock() = None;
                *self.requested_at.lock() = Some(Instant::now());
                let attempt = self.attempt.as_i32();
                return send(Resend { uid: self.uid.to_string(), attempt, number, resends });
            }
        }
    }

    /// Returns whether the worker has not sent a requested report again for longer than `timeout`.
    pub(crate) fn ignores_resend(&self, timeout: Duration) -> bool {
        self.requested_at.lock().is_some_and(|at| at.elapsed() > timeout)
    }

    /// Revokes the attempt: the worker no longer runs it.
    pub(crate) fn revoke(&self, reason: impl Into<String>) {
        self.revoke_reason.lock().get_or_insert_with(|| reason.into());
        self.revoked.cancel();
    }

    /// Revokes the attempt because a healthy worker does not run it: the task may have been lost with its stream. If
    /// the worker has sent no report, the attempt does not count as a failed one.
    pub(crate) fn lost_on_worker(&self, reason: impl Into<String>) {
        if !self.arrivals.lock().has_any() {
            self.never_started.store(true, Ordering::SeqCst);
        }
        self.revoke(reason);
    }

    pub(crate) fn may_have_started(&self) -> bool {
        !self.never_started.load(Ordering::SeqCst)
    }

    /// Returns the reason of the revocation if the attempt is revoked.
    pub(crate) fn revoke_reason(&self) -> Option<String> {
        self.revoke_reason.lock().clone()
    }

    /// Waits until the attempt is revoked; returns the reason.
    pub(crate) async fn revoked(&self) -> String {
        self.revoked.cancelled().await;
        self.revoke_reason.lock().clone().unwrap_or_default()
    }

    /// Stores the cancellation, so that replies to heartbeats repeat it.
    pub(crate) fn set_cancel(&self, reason: String, grace: Duration) -> Cancel {
        let cancel = Cancel {
            uid: self.uid.to_string(),
            attempt: self.attempt.as_i32(),
            reason,
            grace_ms: saturate::to_millis(grace),
        };
        *self.cancel.lock() = Some(cancel.clone());
        cancel
    }

    pub(crate) fn cancel(&self) -> Option<Cancel> {
        self.cancel.lock().clone()
    }

    /// Returns whether the task is older than `grace`. If so, a heartbeat that does not list the attempt means that the
    /// worker has lost it, not that the task is still in transit.
    pub(crate) fn past_heartbeat_grace(&self, grace: Duration) -> bool {
        self.created_at.elapsed() > grace
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::Timestamp;
    use streamer_proto::common::v1::{Payload, payload::Body};
    use tokio::time::advance;

    use super::*;

    const BUDGET: usize = 1 << 20;
    const LEASE: Duration = Duration::from_secs(10);

    fn report(resends: i32) -> (Report, report::Kind) {
        let body = Some(Body::Data(vec![0; 100_000].into()));
        let output = Payload { content_type: String::new(), body };
        (Report { number: 1, resends, ..Report::default() }, report::Kind::Output(output))
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_has_a_lease_to_send_a_requested_report_again() {
        let budget = MemoryBudget::new(BUDGET);
        let all = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let task = RemoteTask::sync(Uid::new(Timestamp::default()), "echo", "acme", &budget);
        let (first, kind) = report(0);
        task.deliver(&first, kind, || false).unwrap();
        advance(LEASE * 2).await;
        assert!(!task.ignores_resend(LEASE), "it was not requested again");
        drop(all);
        let mut resend = None;
        task.request_resend(|message| resend = Some(message)).await;
        assert_eq!(resend.map(|message| (message.number, message.resends)), Some((0, 1)));
        advance(LEASE).await;
        assert!(!task.ignores_resend(LEASE));
        advance(Duration::from_millis(1)).await;
        assert!(task.ignores_resend(LEASE));
        let (second, kind) = report(1);
        task.deliver(&second, kind, || false).unwrap();
        assert!(!task.ignores_resend(LEASE));
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_that_is_dropped_again_does_not_count_as_missing() {
        let budget = MemoryBudget::new(BUDGET);
        let all = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let task = RemoteTask::sync(Uid::new(Timestamp::default()), "echo", "acme", &budget);
        let (first, kind) = report(0);
        task.deliver(&first, kind, || false).unwrap();
        drop(all);
        task.request_resend(drop).await;
        let _rest = budget.try_reserve(&"globex".into(), BUDGET - 100_000).unwrap();
        let (larger, _) = report(1);
        let body = Some(Body::Data(vec![0; 200_000].into()));
        let output = Payload { content_type: String::new(), body };
        task.deliver(&larger, report::Kind::Output(output), || false).unwrap();
        advance(LEASE * 2).await;
        assert!(!task.ignores_resend(LEASE));
    }
}
