//! Control of a running attempt from other tasks.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// Failed renewals that an attempt survives while its final event is being appended. A lease is
/// renewed three times per lease duration.
pub(super) const MAX_MISSED_RENEWALS: u32 = 3;

/// Control of a running attempt from other tasks.
#[derive(Default)]
pub(crate) struct AttemptHandle {
    /// Notifies the handler that cancellation is requested.
    pub(crate) cancellation: CancellationToken,
    cancel_reason: Mutex<Option<String>>,
    /// The lease is lost or abandoned.
    fenced: AtomicBool,
    fenced_signal: CancellationToken,
    /// The final event is being appended: only the log's response decides how the attempt finished.
    finishing: AtomicBool,
    /// Renewals that did not find the lease.
    missed_renewals: AtomicU32,
    release_reason: Mutex<Option<&'static str>>,
    release_signal: CancellationToken,
}

impl AttemptHandle {
    /// Requests cancellation; the first reason is kept.
    pub(crate) fn cancel(&self, reason: &str) {
        self.cancel_reason.lock().get_or_insert_with(|| reason.to_owned());
        self.cancellation.cancel();
    }

    /// Records that the store does not show this attempt as the lease holder. The attempt is
    /// fenced, unless it is appending its final event: the append ends the lease, and may be
    /// committed while its response is still in transit. The store rejects an append that arrives
    /// too late; one that is neither stored nor rejected for a whole lease is abandoned.
    pub(crate) fn record_missing_lease(&self) {
        let missed = self.missed_renewals.fetch_add(1, Ordering::SeqCst) + 1;
        if !self.finishing.load(Ordering::SeqCst) || missed > MAX_MISSED_RENEWALS {
            self.fence();
        }
    }

    /// Fences the attempt: the store rejects whatever it still writes.
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

    /// Returns the reason of the cancellation if one was requested.
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
    pub(super) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }
}
