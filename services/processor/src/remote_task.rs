//! A task that a worker has, as the processor knows it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::Uid;
use streamer_handler::{OutputBudget, ReportQueue, ReportSource, Reservation};
use streamer_proto::processor::v1::{Acknowledgment, Cancel, Revoke, report};
use streamer_store::RequestRecord;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::mailbox::{Full, MAX_BYTES, MAX_REPORTS, Mailbox};

/// A worker's end of one attempt.
pub(crate) struct RemoteTask {
    pub(crate) uid: Uid,
    pub(crate) attempt: u32,
    /// Which action it runs.
    pub(crate) action: String,
    /// For whom.
    pub(crate) tenant: String,
    /// A sync task ends with its worker's stream.
    pub(crate) sync: bool,
    since: Instant,
    pub(crate) mailbox: Mailbox,
    /// Progress and output reports that have come.
    received: Mutex<i64>,
    /// The worker no longer runs it; why.
    lost: CancellationToken,
    lost_reason: Mutex<Option<String>>,
    never_arrived: AtomicBool,
    cancel: Mutex<Option<Cancel>>,
    reports: Arc<ReportQueue>,
}

impl RemoteTask {
    /// Of an attempt of this request whose first `received` reports are durable.
    pub(crate) fn new(
        record: &RequestRecord,
        received: i64,
        reports: Arc<ReportQueue>,
        budget: &Arc<OutputBudget>,
    ) -> Self {
        reports.note_durable(received);
        let received = Mutex::new(received);
        let (action, tenant) = (&record.action, &record.owner.tenant);
        let mailbox = Mailbox::new(budget.clone(), tenant);
        Self {
            received,
            ..Self::begin(record.uid, record.attempt, action, tenant, reports, mailbox)
        }
    }

    /// Of a call of a sync action.
    pub(crate) fn sync(uid: Uid, action: &str, tenant: &str, budget: &Arc<OutputBudget>) -> Self {
        let reports = Arc::new(ReportQueue::discarding());
        let mailbox = Mailbox::new(budget.clone(), tenant);
        Self { sync: true, ..Self::begin(uid, 1, action, tenant, reports, mailbox) }
    }

    fn begin(
        uid: Uid,
        attempt: u32,
        action: &str,
        tenant: &str,
        reports: Arc<ReportQueue>,
        mailbox: Mailbox,
    ) -> Self {
        Self {
            uid,
            attempt,
            action: action.to_owned(),
            tenant: tenant.to_owned(),
            sync: false,
            since: Instant::now(),
            mailbox,
            received: Mutex::default(),
            lost: CancellationToken::new(),
            lost_reason: Mutex::default(),
            never_arrived: AtomicBool::new(false),
            cancel: Mutex::default(),
            reports,
        }
    }

    /// Reports up to this one are durable.
    pub(crate) fn acknowledgment(&self, ended: bool) -> Acknowledgment {
        Acknowledgment {
            uid: self.uid.to_string(),
            attempt: i32::try_from(self.attempt).unwrap_or(i32::MAX),
            number: *self.reports.durable().borrow(),
            ended,
            max_unacknowledged_bytes: i64::try_from(self.mailbox.window()).unwrap_or(i64::MAX),
        }
    }

    /// Follows how many reports are durable.
    pub(crate) fn durable(&self) -> watch::Receiver<i64> {
        self.reports.durable()
    }

    pub(crate) fn revoke(&self, reason: impl Into<String>) -> Revoke {
        let attempt = i32::try_from(self.attempt).unwrap_or(i32::MAX);
        Revoke { uid: self.uid.to_string(), attempt, reason: reason.into() }
    }

    /// Its reports come from this worker.
    pub(crate) fn set_source(&self, worker: Arc<ReportSource>) {
        self.reports.set_source(worker);
    }

    /// For the reports of the worker, on their way to the log.
    pub(crate) fn prepay(&self, reserved: Reservation) {
        self.reports.prepay(reserved);
    }

    /// Whether this progress or output report has come before.
    pub(crate) fn is_repeated(&self, number: i64, kind: &report::Kind) -> bool {
        matches!(kind, report::Kind::Progress(_) | report::Kind::Output(_))
            && (1..=*self.received.lock()).contains(&number)
    }

    /// Takes a report of the worker, with what is reserved for it.
    ///
    /// # Errors
    /// When it breaks the rules of the protocol.
    pub(crate) fn deliver(
        &self,
        number: i64,
        kind: report::Kind,
        reserved: Reservation,
    ) -> Result<(), Status> {
        // Held to the end: reports of an old stream may still be on their way.
        let mut last = self.received.lock();
        let received = *last;
        if matches!(kind, report::Kind::Progress(_) | report::Kind::Output(_)) {
            if number <= received && number > 0 {
                return Ok(()); // sent again after a reconnect
            }
            if number != received + 1 {
                return Err(Status::invalid_argument(format!(
                    "report.number: must be {}, is {number}",
                    received + 1
                )));
            }
        } else if number != received {
            let may_repeat =
                matches!(kind, report::Kind::Checkpoint(_) | report::Kind::KeepAlive(_));
            if may_repeat && number < received {
                return Ok(());
            }
            return Err(Status::invalid_argument(format!(
                "report.number: {received} progress and output reports went before, not {number}"
            )));
        }
        self.mailbox.push(kind, reserved).map_err(|Full| {
            Status::resource_exhausted(format!(
                "more than {MAX_REPORTS} reports or {MAX_BYTES} bytes of them are not acknowledged \
                 (welcome.max_unacknowledged, welcome.max_unacknowledged_bytes)"
            ))
        })?;
        *last = received.max(number);
        Ok(())
    }

    /// The worker does not run it, or no longer.
    pub(crate) fn lose(&self, reason: impl Into<String>) {
        self.lost_reason.lock().get_or_insert_with(|| reason.into());
        self.lost.cancel();
    }

    /// The worker, which lives, does not know the task: its stream may have died with it. When it has
    /// said nothing of it, the attempt costs none.
    pub(crate) fn forgotten(&self, reason: impl Into<String>) {
        if *self.received.lock() == 0 {
            self.never_arrived.store(true, Ordering::SeqCst);
        }
        self.lose(reason);
    }

    pub(crate) fn may_have_begun(&self) -> bool {
        !self.never_arrived.load(Ordering::SeqCst)
    }

    /// Why the worker no longer runs it, if so.
    pub(crate) fn lost_reason(&self) -> Option<String> {
        self.lost_reason.lock().clone()
    }

    /// Returns why, once the worker no longer runs it.
    pub(crate) async fn lost(&self) -> String {
        self.lost.cancelled().await;
        self.lost_reason.lock().clone().unwrap_or_default()
    }

    /// Notes that cancellation was asked for, so that heartbeats repeat it.
    pub(crate) fn note_cancel(&self, reason: String, grace: Duration) -> Cancel {
        let cancel = Cancel {
            uid: self.uid.to_string(),
            attempt: i32::try_from(self.attempt).unwrap_or(i32::MAX),
            reason,
            grace_ms: i64::try_from(grace.as_millis()).unwrap_or(i64::MAX),
        };
        *self.cancel.lock() = Some(cancel.clone());
        cancel
    }

    pub(crate) fn cancel(&self) -> Option<Cancel> {
        self.cancel.lock().clone()
    }

    /// Whether a heartbeat that does not name it means that the worker has lost it, and not only
    /// that the task had not arrived. Until `paused_until` what the worker sent was not read.
    pub(crate) fn should_be_named(&self, heartbeat: Duration, paused_until: Instant) -> bool {
        self.since.max(paused_until).elapsed() > heartbeat
    }
}
