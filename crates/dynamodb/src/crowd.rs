//! How processors that read the same queue keep out of each other's way: each has an order of its
//! own among requests of about the same age, so that they do not all claim the same.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicUsize, Ordering},
};

use streamer_core::Uid;

/// Of two requests the older one is taken first when it is older by more than this, in milliseconds.
const SAME_AGE_MS: u64 = 1000;
/// Requests of each shard that are chosen from at least.
const CHOICE: usize = 24;

/// What is known of the other processors.
pub(crate) struct Crowd {
    processors: AtomicUsize,
    order: RandomState,
}

impl Default for Crowd {
    fn default() -> Self {
        Self { processors: AtomicUsize::new(0), order: RandomState::new() }
    }
}

impl Crowd {
    /// So many processors are alive.
    pub(crate) fn note(&self, processors: usize) {
        self.processors.store(processors, Ordering::Relaxed);
    }

    /// How many requests to read of a shard to choose so many.
    pub(crate) fn choice(&self, limit: usize) -> usize {
        if self.is_alone() { limit } else { limit.max(CHOICE) }
    }

    /// By how many milliseconds a request counts as younger here.
    pub(crate) fn reluctance_ms(&self, uid: Uid) -> i64 {
        if self.is_alone() {
            return 0;
        }
        i64::try_from(self.order.hash_one(uid) % SAME_AGE_MS).unwrap_or(0)
    }

    fn is_alone(&self) -> bool {
        self.processors.load(Ordering::Relaxed) < 2
    }
}
