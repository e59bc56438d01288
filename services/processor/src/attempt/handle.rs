//! How others reach a running attempt.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// Renewals that may miss the lease of an attempt whose last event is on its way. There are three in the
/// length of a lease.
pub(super) const MAX_MISSING: u32 = 3;

/// How others reach a running attempt.
#[derive(Default)]
pub(crate) struct AttemptHandle {
    /// Tells the handler that cancellation was asked for.
    pub(crate) cancellation: CancellationToken,
    cancel_reason: Mutex<Option<String>>,
    /// The attempt is another's now, or left to another.
    lost: AtomicBool,
    lost_signal: CancellationToken,
    /// The last event is on its way to the log: only the log's answer decides how the attempt ended.
    ending: AtomicBool,
    /// Renewals that did not find the lease.
    missing: AtomicU32,
    release_reason: Mutex<Option<&'static str>>,
    release_signal: CancellationToken,
}

impl AttemptHandle {
    /// Cancellation was asked for; the first reason stays.
    pub(crate) fn cancel(&self, reason: &str) {
        self.cancel_reason.lock().get_or_insert_with(|| reason.to_owned());
        self.cancellation.cancel();
    }

    /// The store does not show this attempt as the holder of its lease. That is a loss, unless the
    /// attempt is appending its last event, which ends the lease: then the lease may be missing because
    /// the append is committed and its answer is still on the way. An append that comes too late is
    /// refused by the store; one that is neither stored nor refused for a whole lease is given up.
    pub(crate) fn note_lease_missing(&self) {
        let missing = self.missing.fetch_add(1, Ordering::SeqCst) + 1;
        if !self.ending.load(Ordering::SeqCst) || missing > MAX_MISSING {
            self.lose();
        }
    }

    /// The lease is gone: whatever this attempt would still write is refused.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
        self.lost_signal.cancel();
        self.cancellation.cancel();
    }

    /// Stops the handler where it is and hands the attempt back.
    pub(crate) fn release(&self, reason: &'static str) {
        *self.release_reason.lock() = Some(reason);
        self.release_signal.cancel();
    }

    /// Why cancellation was asked for, when it was.
    pub(crate) fn cancel_reason(&self) -> Option<String> {
        self.cancel_reason.lock().clone()
    }

    /// Returns the reason once it is handed back.
    pub(super) async fn released(&self) -> &'static str {
        self.release_signal.cancelled().await;
        self.release_reason.lock().unwrap_or("it was handed back")
    }

    /// Returns once the lease is gone.
    pub(super) async fn until_lost(&self) {
        self.lost_signal.cancelled().await;
    }

    /// The last event is on its way to the log.
    pub(super) fn note_ending(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// Whether the lease is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }
}
