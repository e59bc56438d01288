//! Handle through which other tasks control a running attempt.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// Maximum number of renewals that may find no lease while the final event of an attempt is being appended. Equal to
/// the number of renewals per lease duration.
pub(super) const MAX_MISSED_RENEWALS: u32 = 3;

/// Handle through which other tasks control a running attempt.
#[derive(Default)]
pub(crate) struct AttemptHandle {
    /// Token that notifies the handler of a requested cancellation.
    pub(crate) cancellation: CancellationToken,
    cancel_reason: Mutex<Option<String>>,
    /// Whether the lease is lost or abandoned.
    fenced: AtomicBool,
    fenced_signal: CancellationToken,
    /// Whether the final event is being appended; the response of the log then determines how the attempt finishes.
    finishing: AtomicBool,
    /// Number of renewals that did not find the lease.
    missed_renewals: AtomicU32,
    release_reason: Mutex<Option<&'static str>>,
    release_signal: CancellationToken,
}

impl AttemptHandle {
    /// Requests cancellation. Only the reason of the first call is kept.
    pub(crate) fn cancel(&self, reason: &str) {
        self.cancel_reason.lock().get_or_insert_with(|| reason.to_owned());
        self.cancellation.cancel();
    }

    /// Records that the store does not list this attempt as the holder of the lease. Fences the attempt, unless it is
    /// appending its final event: the append ends the lease, and may be committed before its response arrives. The
    /// store rejects an append that arrives too late. An append that is neither stored nor rejected for a lease
    /// duration is abandoned.
    pub(crate) fn record_missing_lease(&self) {
        let missed = self.missed_renewals.fetch_add(1, Ordering::SeqCst) + 1;
        if !self.finishing.load(Ordering::SeqCst) || missed > MAX_MISSED_RENEWALS {
            self.fence();
        }
    }

    /// Fences the attempt: it stops, and the store rejects its later writes.
    pub(crate) fn fence(&self) {
        self.fenced.store(true, Ordering::SeqCst);
        self.fenced_signal.cancel();
        self.cancellation.cancel();
    }

    /// Stops the handler and releases the attempt.
    pub(crate) fn release(&self, reason: &'static str) {
        *self.release_reason.lock() = Some(reason);
        self.release_signal.cancel();
    }

    /// Returns the cancellation reason if cancellation was requested.
    pub(crate) fn cancel_reason(&self) -> Option<String> {
        self.cancel_reason.lock().clone()
    }

    /// Waits until the attempt is released; returns the reason.
    pub(super) async fn released(&self) -> &'static str {
        self.release_signal.cancelled().await;
        self.release_reason.lock().unwrap_or("the attempt was released")
    }

    /// Waits until the attempt is fenced.
    pub(super) async fn fenced(&self) {
        self.fenced_signal.cancelled().await;
    }

    /// Records that the final event is being appended.
    pub(super) fn mark_finishing(&self) {
        self.finishing.store(true, Ordering::SeqCst);
    }

    /// Returns whether the attempt is fenced.
    pub(crate) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }
}
