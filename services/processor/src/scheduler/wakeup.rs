//! Wakes the dispatcher when queued requests may be able to start.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Notify;

/// Notifies the dispatcher of queued requests and free slots.
pub(crate) struct Wakeup {
    /// Whether a scan is pending: the queue may contain requests that hints did not start, and that later hints must
    /// not overtake.
    scan_pending: AtomicBool,
    /// Number of slots that were released since the process started.
    freed_slots: AtomicU64,
    notify: Notify,
}

impl Default for Wakeup {
    fn default() -> Self {
        // The first scan finds requests that were queued before the process started.
        Self {
            scan_pending: AtomicBool::new(true),
            freed_slots: AtomicU64::new(0),
            notify: Notify::new(),
        }
    }
}

impl Wakeup {
    /// Requests a scan of the whole queue.
    pub(crate) fn request_scan(&self) {
        self.scan_pending.store(true, Ordering::SeqCst);
        self.notify.notify_one();
    }

    /// Same as [`Self::request_scan`], but does not wake the dispatcher, which is already awake.
    pub(crate) fn mark_scan_pending(&self) {
        self.scan_pending.store(true, Ordering::SeqCst);
    }

    /// Records that a slot was freed, and wakes the dispatcher if a scan is pending.
    pub(crate) fn slot_freed(&self) {
        self.freed_slots.fetch_add(1, Ordering::SeqCst);
        if self.is_scan_pending() {
            self.notify.notify_one();
        }
    }

    /// Returns the number of released slots. If it changed during a scan, the scan must be
    /// repeated.
    pub(crate) fn freed_slots(&self) -> u64 {
        self.freed_slots.load(Ordering::SeqCst)
    }

    /// Wakes the dispatcher.
    pub(crate) fn notify(&self) {
        self.notify.notify_one();
    }

    pub(crate) fn is_scan_pending(&self) -> bool {
        self.scan_pending.load(Ordering::SeqCst)
    }

    /// Returns whether a scan was pending, and clears it.
    pub(crate) fn take_pending_scan(&self) -> bool {
        self.scan_pending.swap(false, Ordering::SeqCst)
    }

    pub(crate) async fn notified(&self) {
        self.notify.notified().await;
    }
}
