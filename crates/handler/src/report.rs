//! Queue of reports between a handler and the log.

use std::{collections::VecDeque, pin::pin, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use streamer_core::limits::{MAX_PENDING_REPORT_BYTES, MAX_PENDING_REPORTS};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::{HandlerError, MemoryBudget, Reservation};

/// Maximum number of pending bytes that need no reservation; most attempts never exceed it.
const UNRESERVED_BYTES: usize = 4 * 1024;

/// Report of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// Progress of the attempt.
    Progress {
        /// Completed percentage, from 0 to 100, if known.
        percentage: Option<f64>,
        /// Human-readable message.
        message: String,
        /// Metadata, as JSON.
        metadata: Option<Bytes>,
    },
    /// Next chunk of the output.
    Output {
        /// IANA media type.
        content_type: String,
        /// Data of the chunk.
        data: Bytes,
    },
    /// State from which the next attempt can continue.
    Checkpoint(Bytes),
    /// The handler is alive and has nothing else to report.
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

    /// Returns whether the report becomes an event of the log.
    #[must_use]
    pub fn is_event(&self) -> bool {
        matches!(self, Self::Progress { .. } | Self::Output { .. })
    }
}

/// Ordered, bounded queue of reports between a handler and the log, which is read in batches.
#[derive(Default)]
pub struct ReportQueue {
    state: Mutex<State>,
    /// Callback that is called after each push.
    hook: Option<Box<dyn Fn() + Send + Sync>>,
    /// Budget that the queue shares with other attempts, and the tenant that the bytes are reserved for.
    budget: Option<(Arc<MemoryBudget>, Arc<str>)>,
    filled: Notify,
    emptied: Notify,
    durable: watch::Sender<i64>,
}

/// Batch of reports taken from a queue.
#[derive(Debug, Default)]
pub struct ReportBatch {
    /// Reports, in order.
    pub reports: VecDeque<Report>,
    /// Reservation of the bytes of the reports; must be dropped together with them.
    pub reserved: Reservation,
    /// Time at which the first of the reports was pushed.
    pub oldest: Option<Instant>,
}

#[derive(Debug)]
struct State {
    pending: ReportBatch,
    bytes: usize,
    closed: bool,
    discarding: bool,
    last_activity: Instant,
    /// Number of calls that wait for capacity.
    blocked: usize,
    /// Reservation for the next report of a worker, made when the report arrived.
    prepaid: Reservation,
    source: Option<Arc<ReportSource>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            pending: ReportBatch::default(),
            bytes: 0,
            closed: false,
            discarding: false,
            last_activity: Instant::now(),
            blocked: 0,
            prepaid: Reservation::default(),
            source: None,
        }
    }
}

impl State {
    fn has_room(&self, bytes: usize) -> bool {
        let reports = &self.pending.reports;
        reports.is_empty()
            || (reports.len() < MAX_PENDING_REPORTS
                && self.bytes + bytes <= MAX_PENDING_REPORT_BYTES)
    }

    /// Returns whether a report of `bytes` bytes needs no reservation.
    fn is_unreserved(&self, bytes: usize) -> bool {
        self.bytes + bytes <= UNRESERVED_BYTES
    }

    fn push(&mut self, report: Report, bytes: usize, reserved: Reservation) {
        self.pending.oldest.get_or_insert_with(Instant::now);
        self.pending.reports.push_back(report);
        self.pending.reserved.merge(reserved);
        self.bytes += bytes;
    }
}

/// Common source of the reports of several queues. While the source is paused, none of the queues counts as silent.
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
    /// Pauses the source until the returned guard is dropped.
    #[must_use]
    pub fn pause(self: &Arc<Self>) -> PauseGuard {
        self.pauses.lock().times += 1;
        PauseGuard(self.clone())
    }

    /// Returns the time at which the last pause ended, or the current time while the source is paused.
    #[must_use]
    pub fn paused_until(&self) -> Instant {
        let pauses = self.pauses.lock();
        if pauses.times > 0 { Instant::now() } else { pauses.until }
    }
}

/// Pauses a [`ReportSource`] until it is dropped.
#[derive(Debug)]
pub struct PauseGuard(Arc<ReportSource>);

impl Drop for PauseGuard {
    fn drop(&mut self) {
        let mut pauses = self.0.pauses.lock();
        pauses.times -= 1;
        pauses.until = Instant::now();
    }
}

/// Counts a call as waiting for capacity until dropped.
struct BlockedPush<'a>(&'a ReportQueue);

impl<'a> BlockedPush<'a> {
    fn begin(queue: &'a ReportQueue) -> Self {
        queue.state.lock().blocked += 1;
        Self(queue)
    }
}

impl Drop for BlockedPush<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.blocked -= 1;
        state.last_activity = Instant::now();
    }
}

impl ReportQueue {
    /// Creates a queue that reserves the bytes of its reports in `budget`, for the given tenant.
    #[must_use]
    pub fn with_budget(budget: Arc<MemoryBudget>, tenant: &str) -> Self {
        Self { budget: Some((budget, tenant.into())), ..Self::default() }
    }

    /// Creates a queue that discards all reports, for sync actions, which have no log.
    #[must_use]
    pub fn discarding() -> Self {
        let queue = Self::default();
        queue.state.lock().discarding = true;
        queue
    }

    /// Creates a queue that calls `hook` after each push, for readers of many queues.
    #[must_use]
    pub fn with_hook(hook: impl Fn() + Send + Sync + 'static) -> Self {
        Self { hook: Some(Box::new(hook)), ..Self::default() }
    }

    /// Adds a report, and waits while the queue is full or the budget is exhausted.
    ///
    /// # Errors
    /// Returns an error if the attempt no longer belongs to this handler; its reports are then discarded.
    pub async fn push(&self, report: Report) -> Result<(), HandlerError> {
        let bytes = report.bytes();
        let mut report = Some(report);
        {
            let mut state = self.state.lock();
            if state.closed {
                return Err(HandlerError::cancelled());
            }
            state.last_activity = Instant::now();
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
            self.wait_and_push(report, bytes).await?;
        }
        self.filled.notify_one();
        if let Some(hook) = &self.hook {
            hook();
        }
        Ok(())
    }

    async fn wait_and_push(&self, report: Report, bytes: usize) -> Result<(), HandlerError> {
        let _blocked = BlockedPush::begin(self);
        let mut reserving = pin!(self.reserve_all(bytes));
        let mut reserved = None;
        loop {
            // Registered before the check, so that no wake-up is missed.
            let emptied = self.emptied.notified();
            let has_room = {
                let mut state = self.state.lock();
                if state.closed {
                    return Err(HandlerError::cancelled());
                }
                let has_room = state.has_room(bytes);
                // A small report needs no reservation after the earlier reports are taken.
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

    /// Reserves bytes for a result.
    pub async fn reserve(&self, bytes: usize) -> Reservation {
        if bytes <= UNRESERVED_BYTES {
            return Reservation::default();
        }
        let _blocked = BlockedPush::begin(self);
        self.reserve_all(bytes).await
    }

    async fn reserve_all(&self, bytes: usize) -> Reservation {
        let prepaid = std::mem::take(&mut self.state.lock().prepaid);
        match &self.budget {
            Some((budget, tenant)) if prepaid.bytes() == 0 => budget.reserve(tenant, bytes).await,
            _ => prepaid,
        }
    }

    /// Sets the reservation for the next report, or for the result.
    pub fn prepay(&self, reserved: Reservation) {
        // The previous reservation is released after the lock.
        let unused = {
            let mut state = self.state.lock();
            if state.closed { reserved } else { std::mem::replace(&mut state.prepaid, reserved) }
        };
        drop(unused);
    }

    /// Removes and returns all pending reports.
    #[must_use]
    pub fn take(&self) -> VecDeque<Report> {
        self.take_batch().reports
    }

    /// Removes and returns all pending reports, with their reservation.
    #[must_use]
    pub fn take_batch(&self) -> ReportBatch {
        let taken = {
            let mut state = self.state.lock();
            state.bytes = 0;
            std::mem::take(&mut state.pending)
        };
        if !taken.reports.is_empty() {
            self.emptied.notify_waiters();
        }
        taken
    }

    /// Removes and returns the next report, if any.
    #[must_use]
    pub fn pop(&self) -> Option<Report> {
        let (report, reserved) = {
            let mut state = self.state.lock();
            let report = state.pending.reports.pop_front()?;
            state.bytes -= report.bytes();
            let is_last = state.pending.reports.is_empty();
            let rest = is_last.then(|| std::mem::take(&mut state.pending));
            (report, rest.map(|rest| rest.reserved))
        };
        drop(reserved);
        self.emptied.notify_waiters();
        Some(report)
    }

    /// Waits until reports may be pending.
    pub async fn filled(&self) {
        let filled = self.filled.notified();
        if self.state.lock().pending.reports.is_empty() {
            filled.await;
        }
    }

    /// Sets the source of the reports of this queue.
    pub fn set_source(&self, source: Arc<ReportSource>) {
        self.state.lock().source = Some(source);
    }

    /// Returns the time at which the last report was pushed or, before the first report, the queue was created. Returns
    /// the current time while a call waits for capacity or the source is paused.
    #[must_use]
    pub fn last_activity(&self) -> Instant {
        let state = self.state.lock();
        if state.blocked > 0 {
            return Instant::now();
        }
        let paused_until = state.source.as_ref().map(|source| source.paused_until());
        paused_until.map_or(state.last_activity, |until| until.max(state.last_activity))
    }

    /// Records the number of reports of the attempt that are durable events.
    pub fn set_durable(&self, events: i64) {
        self.durable.send_if_modified(|known| std::mem::replace(known, events) != events);
    }

    /// Returns a receiver of the number of reports of the attempt that are durable events.
    #[must_use]
    pub fn durable(&self) -> watch::Receiver<i64> {
        self.durable.subscribe()
    }

    /// Closes the queue, which then rejects all further reports.
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
