//! What a running attempt reports, on its way to the log.

use std::{collections::VecDeque, pin::pin, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use streamer_core::limits::{MAX_WAITING_REPORT_BYTES, MAX_WAITING_REPORTS};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::{HandlerError, OutputBudget, Reservation};

/// Bytes of waiting reports up to which none are reserved: most attempts never have more.
const UNRESERVED_BYTES: usize = 4 * 1024;

/// One thing that an attempt reports.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// How far it is.
    Progress {
        /// 0 to 100.
        percentage: Option<f64>,
        /// For people.
        message: String,
        /// JSON.
        metadata: Option<Bytes>,
    },
    /// The next chunk of its output.
    Output {
        /// IANA media type.
        content_type: String,
        /// The chunk.
        data: Bytes,
    },
    /// What the next attempt may begin from.
    Checkpoint(Bytes),
    /// The handler lives and has nothing else to say.
    KeepAlive,
}

impl Report {
    fn bytes(&self) -> usize {
        const OVERHEAD: usize = 64;
        OVERHEAD
            + match self {
                Self::Progress { message, metadata, .. } => {
                    message.len() + metadata.as_ref().map_or(0, Bytes::len)
                }
                Self::Output { content_type, data } => content_type.len() + data.len(),
                Self::Checkpoint(data) => data.len(),
                Self::KeepAlive => 0,
            }
    }

    /// Whether it becomes an event of the log.
    #[must_use]
    pub fn is_event(&self) -> bool {
        matches!(self, Self::Progress { .. } | Self::Output { .. })
    }
}

/// Reports between a handler and the log: in order, bounded, taken in batches.
#[derive(Default)]
pub struct ReportQueue {
    state: Mutex<State>,
    /// Called when something was pushed.
    hook: Option<Box<dyn Fn() + Send + Sync>>,
    /// The budget that it shares with other attempts, and the tenant that uses it.
    budget: Option<(Arc<OutputBudget>, Arc<str>)>,
    filled: Notify,
    emptied: Notify,
    durable: watch::Sender<i64>,
}

/// Reports that were taken together.
#[derive(Debug, Default)]
pub struct ReportBatch {
    /// In order.
    pub reports: VecDeque<Report>,
    /// For their bytes; to be dropped when the reports are.
    pub reserved: Reservation,
}

#[derive(Debug)]
struct State {
    waiting: ReportBatch,
    bytes: usize,
    closed: bool,
    discarding: bool,
    last_push: Instant,
    /// How many calls wait for room.
    blocked: usize,
    /// For the next report, which came from a worker and was reserved when it did.
    prepaid: Reservation,
    source: Option<Arc<ReportSource>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            waiting: ReportBatch::default(),
            bytes: 0,
            closed: false,
            discarding: false,
            last_push: Instant::now(),
            blocked: 0,
            prepaid: Reservation::default(),
            source: None,
        }
    }
}

impl State {
    fn has_room(&self, bytes: usize) -> bool {
        let reports = &self.waiting.reports;
        reports.is_empty()
            || (reports.len() < MAX_WAITING_REPORTS
                && self.bytes + bytes <= MAX_WAITING_REPORT_BYTES)
    }

    /// Whether a report of this size needs no reservation.
    fn is_unreserved(&self, bytes: usize) -> bool {
        self.bytes + bytes <= UNRESERVED_BYTES
    }

    fn push(&mut self, report: Report, bytes: usize, reserved: Reservation) {
        self.waiting.reports.push_back(report);
        self.waiting.reserved.merge(reserved);
        self.bytes += bytes;
    }
}

/// Where the reports of several queues come from. While it is paused, no queue counts as silent.
#[derive(Debug)]
pub struct ReportSource {
    pauses: Mutex<Pauses>,
}

#[derive(Debug)]
struct Pauses {
    times: u32,
    until: Instant,
}

impl Default for ReportSource {
    fn default() -> Self {
        Self { pauses: Mutex::new(Pauses { times: 0, until: Instant::now() }) }
    }
}

impl ReportSource {
    /// Pauses it until the returned guard is dropped.
    #[must_use]
    pub fn pause(self: &Arc<Self>) -> PausedSource {
        self.pauses.lock().times += 1;
        PausedSource(self.clone())
    }

    /// When its last pause ended: now, while it is paused.
    #[must_use]
    pub fn paused_until(&self) -> Instant {
        let pauses = self.pauses.lock();
        if pauses.times > 0 { Instant::now() } else { pauses.until }
    }
}

/// Pauses a [`ReportSource`] until it is dropped.
#[derive(Debug)]
pub struct PausedSource(Arc<ReportSource>);

impl Drop for PausedSource {
    fn drop(&mut self) {
        let mut pauses = self.0.pauses.lock();
        pauses.times -= 1;
        pauses.until = Instant::now();
    }
}

/// A call that waits for room.
struct Blocked<'a>(&'a ReportQueue);

impl<'a> Blocked<'a> {
    fn begin(queue: &'a ReportQueue) -> Self {
        queue.state.lock().blocked += 1;
        Self(queue)
    }
}

impl Drop for Blocked<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.blocked -= 1;
        state.last_push = Instant::now();
    }
}

impl ReportQueue {
    /// Reserves the bytes of its reports in a budget, for this tenant.
    #[must_use]
    pub fn within(budget: Arc<OutputBudget>, tenant: &str) -> Self {
        Self { budget: Some((budget, tenant.into())), ..Self::default() }
    }

    /// Takes everything and keeps nothing: for sync actions, which have no log.
    #[must_use]
    pub fn discarding() -> Self {
        let queue = Self::default();
        queue.state.lock().discarding = true;
        queue
    }

    /// Calls `hook` whenever something was pushed: for who looks after many queues at once.
    #[must_use]
    pub fn with_hook(hook: impl Fn() + Send + Sync + 'static) -> Self {
        Self { hook: Some(Box::new(hook)), ..Self::default() }
    }

    /// Adds a report; waits while the queue is full or the budget is used up.
    ///
    /// # Errors
    /// When the attempt has been taken from this handler: nothing it reports counts any more.
    pub async fn push(&self, report: Report) -> Result<(), HandlerError> {
        let bytes = report.bytes();
        let mut report = Some(report);
        {
            let mut state = self.state.lock();
            if state.closed {
                return Err(HandlerError::cancelled());
            }
            state.last_push = Instant::now();
            if state.discarding {
                return Ok(());
            }
            let is_covered =
                self.budget.is_none() || state.prepaid.bytes() > 0 || state.is_unreserved(bytes);
            if state.has_room(bytes)
                && is_covered
                && let Some(report) = report.take()
            {
                let reserved = std::mem::take(&mut state.prepaid);
                state.push(report, bytes, reserved);
            }
        }
        if let Some(report) = report {
            self.push_when_there_is_room(report, bytes).await?;
        }
        self.filled.notify_one();
        if let Some(hook) = &self.hook {
            hook();
        }
        Ok(())
    }

    async fn push_when_there_is_room(
        &self,
        report: Report,
        bytes: usize,
    ) -> Result<(), HandlerError> {
        let _blocked = Blocked::begin(self);
        let mut reserving = pin!(self.reserve_all(bytes));
        let mut reserved = None;
        loop {
            // Registered before looking, so that no wake-up is missed.
            let emptied = self.emptied.notified();
            let has_room = {
                let mut state = self.state.lock();
                if state.closed {
                    return Err(HandlerError::cancelled());
                }
                let has_room = state.has_room(bytes);
                // A small report needs no reservation once the others were taken.
                let covered = match reserved.take() {
                    None if state.is_unreserved(bytes) => Some(Reservation::default()),
                    reserved => reserved,
                };
                match covered {
                    Some(covered) if has_room => {
                        state.push(report, bytes, covered);
                        return Ok(());
                    }
                    covered => reserved = covered,
                }
                has_room
            };
            tokio::select! {
                reservation = &mut reserving, if has_room && reserved.is_none() => {
                    reserved = Some(reservation);
                }
                () = emptied => {}
            }
        }
    }

    /// Reserves the bytes of a result.
    pub async fn reserve(&self, bytes: usize) -> Reservation {
        if bytes <= UNRESERVED_BYTES {
            return Reservation::default();
        }
        let _blocked = Blocked::begin(self);
        self.reserve_all(bytes).await
    }

    async fn reserve_all(&self, bytes: usize) -> Reservation {
        let prepaid = std::mem::take(&mut self.state.lock().prepaid);
        match &self.budget {
            Some((budget, tenant)) if prepaid.bytes() == 0 => budget.reserve(tenant, bytes).await,
            _ => prepaid,
        }
    }

    /// Takes over a reservation for the next report, or for the result.
    pub fn prepay(&self, reserved: Reservation) {
        // The one before is released without the lock.
        let unused = {
            let mut state = self.state.lock();
            if state.closed { reserved } else { std::mem::replace(&mut state.prepaid, reserved) }
        };
        drop(unused);
    }

    /// Takes everything that waits.
    #[must_use]
    pub fn take(&self) -> VecDeque<Report> {
        self.take_batch().reports
    }

    /// Takes everything that waits, with what is reserved for it.
    #[must_use]
    pub fn take_batch(&self) -> ReportBatch {
        let taken = {
            let mut state = self.state.lock();
            state.bytes = 0;
            std::mem::take(&mut state.waiting)
        };
        if !taken.reports.is_empty() {
            self.emptied.notify_waiters();
        }
        taken
    }

    /// Takes the next report, if one waits.
    #[must_use]
    pub fn pop(&self) -> Option<Report> {
        let (report, reserved) = {
            let mut state = self.state.lock();
            let report = state.waiting.reports.pop_front()?;
            state.bytes -= report.bytes();
            let is_last = state.waiting.reports.is_empty();
            let reserved = is_last.then(|| std::mem::take(&mut state.waiting.reserved));
            (report, reserved)
        };
        drop(reserved);
        self.emptied.notify_waiters();
        Some(report)
    }

    /// Returns once there may be something to take.
    pub async fn filled(&self) {
        let filled = self.filled.notified();
        if self.state.lock().waiting.reports.is_empty() {
            filled.await;
        }
    }

    /// Sets where its reports come from.
    pub fn set_source(&self, source: Arc<ReportSource>) {
        self.state.lock().source = Some(source);
    }

    /// When something was last pushed, or the queue was made. Now, while something waits for room here
    /// or in its source.
    #[must_use]
    pub fn last_push(&self) -> Instant {
        let state = self.state.lock();
        if state.blocked > 0 {
            return Instant::now();
        }
        let paused_until = state.source.as_ref().map(|source| source.paused_until());
        paused_until.map_or(state.last_push, |until| until.max(state.last_push))
    }

    /// Notes how many reports of the attempt are durable events by now.
    pub fn note_durable(&self, events: i64) {
        self.durable.send_if_modified(|known| std::mem::replace(known, events) != events);
    }

    /// Follows how many reports of the attempt are durable events.
    #[must_use]
    pub fn durable(&self) -> watch::Receiver<i64> {
        self.durable.subscribe()
    }

    /// Refuses everything from now on.
    pub fn close(&self) {
        let prepaid = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.prepaid)
        };
        drop(prepaid);
        self.emptied.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
