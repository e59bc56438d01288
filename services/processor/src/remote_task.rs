//! A task that a worker has, as the processor knows it.

mod arrivals;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::Uid;
use streamer_handler::{OutputBudget, PausedSource, ReportQueue, ReportSource, Reservation};
use streamer_proto::processor::v1::{Acknowledgment, Cancel, Report, Resend, Revoke, report};
use streamer_store::RequestRecord;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use self::arrivals::{Arrival, Arrivals};
use crate::mailbox::Mailbox;

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
    arrivals: Mutex<Arrivals>,
    /// Reports were dropped.
    dropped: Notify,
    /// Paused while dropped reports have not come again.
    source: Arc<ReportSource>,
    paused: Mutex<Option<PausedSource>>,
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
        let arrivals = Mutex::new(Arrivals::new(received));
        let (action, tenant) = (&record.action, &record.owner.tenant);
        let mailbox = Mailbox::new(budget.clone(), tenant);
        Self {
            arrivals,
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
        let source = Arc::<ReportSource>::default();
        reports.set_source(source.clone());
        Self {
            uid,
            attempt,
            action: action.to_owned(),
            tenant: tenant.to_owned(),
            sync: false,
            since: Instant::now(),
            mailbox,
            arrivals: Mutex::default(),
            dropped: Notify::new(),
            source,
            paused: Mutex::default(),
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

    /// For the reports of the worker, on their way to the log.
    pub(crate) fn prepay(&self, reserved: Reservation) {
        self.reports.prepay(reserved);
    }

    /// A new stream of its worker begins; the one before must be over.
    pub(crate) fn restart(&self) {
        self.arrivals.lock().restart();
        *self.paused.lock() = None;
    }

    /// Delivers a report of the worker. When there is no room for it, it is dropped, with those that follow it,
    /// until [`Self::ask_again`]. So is one whose stream is over by now.
    ///
    /// # Errors
    /// When it breaks the rules of the protocol.
    pub(crate) fn deliver(
        &self,
        report: &Report,
        kind: report::Kind,
        is_over: impl FnOnce() -> bool,
    ) -> Result<(), Status> {
        // Held to the end: reports of an old stream may still be on their way.
        let mut arrivals = self.arrivals.lock();
        if is_over() {
            return Ok(());
        }
        match arrivals.take(&self.mailbox, report.number, report.resends, kind)? {
            Arrival::Delivered => *self.paused.lock() = None,
            Arrival::Dropped => {
                self.paused.lock().get_or_insert_with(|| self.source.pause());
                self.dropped.notify_one();
            }
            Arrival::Ignored => {}
        }
        Ok(())
    }

    /// Returns once there is room for dropped reports, with the message that asks for them.
    pub(crate) async fn ask_again(&self) -> Resend {
        loop {
            let wanted = self.arrivals.lock().wanted();
            let Some(wanted) = wanted else {
                self.dropped.notified().await;
                continue;
            };
            let reserved = self.mailbox.reserve(wanted).await;
            if let Some((number, resends)) = self.arrivals.lock().ask_again(reserved) {
                let attempt = i32::try_from(self.attempt).unwrap_or(i32::MAX);
                return Resend { uid: self.uid.to_string(), attempt, number, resends };
            }
        }
    }

    /// The worker does not run it, or no longer.
    pub(crate) fn lose(&self, reason: impl Into<String>) {
        self.lost_reason.lock().get_or_insert_with(|| reason.into());
        self.lost.cancel();
    }

    /// The worker, which lives, does not know the task: its stream may have died with it. When it has
    /// said nothing of it, the attempt costs none.
    pub(crate) fn forgotten(&self, reason: impl Into<String>) {
        if self.arrivals.lock().received() == 0 {
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
    /// that the task had not arrived.
    pub(crate) fn should_be_named(&self, heartbeat: Duration) -> bool {
        self.since.elapsed() > heartbeat
    }
}
