//! What a running attempt reports, on its way to the log.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;
use streamer_core::limits::{MAX_WAITING_REPORT_BYTES, MAX_WAITING_REPORTS};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::HandlerError;

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
    filled: Notify,
    emptied: Notify,
    durable: watch::Sender<i64>,
}

#[derive(Debug)]
struct State {
    reports: VecDeque<Report>,
    bytes: usize,
    closed: bool,
    discarding: bool,
    last_push: Instant,
}

impl Default for State {
    fn default() -> Self {
        Self {
            reports: VecDeque::new(),
            bytes: 0,
            closed: false,
            discarding: false,
            last_push: Instant::now(),
        }
    }
}

impl ReportQueue {
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

    /// Adds a report; waits while the queue is full.
    ///
    /// # Errors
    /// When the attempt has been taken from this handler: nothing it reports counts any more.
    pub async fn push(&self, report: Report) -> Result<(), HandlerError> {
        let bytes = report.bytes();
        let mut report = Some(report);
        loop {
            // Registered before looking, so that no wake-up is missed.
            let emptied = self.emptied.notified();
            {
                let mut state = self.state.lock();
                if state.closed {
                    return Err(HandlerError::cancelled());
                }
                state.last_push = Instant::now();
                if state.discarding {
                    return Ok(());
                }
                let room = state.reports.len() < MAX_WAITING_REPORTS
                    && (state.bytes + bytes <= MAX_WAITING_REPORT_BYTES
                        || state.reports.is_empty());
                if room && let Some(report) = report.take() {
                    state.reports.push_back(report);
                    state.bytes += bytes;
                }
            }
            if report.is_none() {
                self.filled.notify_one();
                if let Some(hook) = &self.hook {
                    hook();
                }
                return Ok(());
            }
            emptied.await;
        }
    }

    /// Takes everything that waits.
    #[must_use]
    pub fn take(&self) -> VecDeque<Report> {
        let taken = {
            let mut state = self.state.lock();
            state.bytes = 0;
            std::mem::take(&mut state.reports)
        };
        if !taken.is_empty() {
            self.emptied.notify_waiters();
        }
        taken
    }

    /// Takes the next report, if one waits.
    #[must_use]
    pub fn pop(&self) -> Option<Report> {
        let report = {
            let mut state = self.state.lock();
            let report = state.reports.pop_front()?;
            state.bytes -= report.bytes();
            report
        };
        self.emptied.notify_waiters();
        Some(report)
    }

    /// Returns once there may be something to take.
    pub async fn filled(&self) {
        let filled = self.filled.notified();
        if self.state.lock().reports.is_empty() {
            filled.await;
        }
    }

    /// When something was last pushed, or the queue was made.
    #[must_use]
    pub fn last_push(&self) -> Instant {
        self.state.lock().last_push
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
        self.state.lock().closed = true;
        self.emptied.notify_waiters();
    }
}
