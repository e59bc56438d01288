//! Claim jitter: processors that read the same queue order requests of about the same age differently, so that they do
//! not all claim the same requests.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicUsize, Ordering},
};

use streamer_core::{Uid, saturate};

/// Maximum jitter, in milliseconds. A request that is older than another request by more than this always precedes it.
const MAX_JITTER_MS: u64 = 1000;
/// Minimum number of requests to read from each shard while several processors are alive.
const MIN_READ: usize = 24;

/// Claim order of this process, and the number of processors.
pub(crate) struct ClaimJitter {
    processors: AtomicUsize,
    order: RandomState,
}

impl Default for ClaimJitter {
    fn default() -> Self {
        Self { processors: AtomicUsize::new(0), order: RandomState::new() }
    }
}

impl ClaimJitter {
    /// Sets the number of live processors.
    pub(crate) fn set_processors(&self, processors: usize) {
        self.processors.store(processors, Ordering::Relaxed);
    }

    /// Returns the number of requests to read from a shard in order to select `limit` of them.
    pub(crate) fn read_limit(&self, limit: usize) -> usize {
        if self.is_alone() { limit } else { limit.max(MIN_READ) }
    }

    /// Returns the number of milliseconds by which a request counts as younger.
    pub(crate) fn jitter_ms(&self, uid: Uid) -> i64 {
        if self.is_alone() {
            return 0;
        }
        saturate::to_i64(self.order.hash_one(uid) % MAX_JITTER_MS)
    }

    fn is_alone(&self) -> bool {
        self.processors.load(Ordering::Relaxed) < 2
    }
}
