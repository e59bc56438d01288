//! Tells the dispatcher that there may be something to start.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Notify;

/// Shared by whoever learns of work or of room for it.
pub(crate) struct Signal {
    /// There may be more in the queue than hints told of: hints wait their turn.
    backlog: AtomicBool,
    /// Counts slots that were given back.
    freed: AtomicU64,
    look: Notify,
}

impl Default for Signal {
    fn default() -> Self {
        // What an earlier process left is looked for first.
        Self { backlog: AtomicBool::new(true), freed: AtomicU64::new(0), look: Notify::new() }
    }
}

impl Signal {
    /// The queue has to be looked at, all of it.
    pub(crate) fn look_at_all(&self) {
        self.backlog.store(true, Ordering::SeqCst);
        self.look.notify_one();
    }

    /// As [`Self::look_at_all`], by whoever looks next anyway.
    pub(crate) fn note_backlog(&self) {
        self.backlog.store(true, Ordering::SeqCst);
    }

    /// Wakes the dispatcher if there is a backlog: a slot is free.
    pub(crate) fn room(&self) {
        self.freed.fetch_add(1, Ordering::SeqCst);
        if self.has_backlog() {
            self.look.notify_one();
        }
    }

    /// Changes whenever a slot was given back: who notes a backlog after looking must look again
    /// when it has.
    pub(crate) fn freed(&self) -> u64 {
        self.freed.load(Ordering::SeqCst)
    }

    /// Wakes the dispatcher.
    pub(crate) fn wake(&self) {
        self.look.notify_one();
    }

    pub(crate) fn has_backlog(&self) -> bool {
        self.backlog.load(Ordering::SeqCst)
    }

    /// Whether there was a backlog; from now on there is none.
    pub(crate) fn take_backlog(&self) -> bool {
        self.backlog.swap(false, Ordering::SeqCst)
    }

    pub(crate) async fn wanted(&self) {
        self.look.notified().await;
    }
}
