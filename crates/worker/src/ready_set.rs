//! Set of attempts that have something to send: each is contained at most once.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::attempt::AttemptKey;

#[derive(Default)]
pub(crate) struct ReadySet {
    keys: Mutex<Vec<AttemptKey>>,
    notify: Notify,
}

/// Whether an attempt is in the set.
#[derive(Default)]
pub(crate) struct ReadyFlag(AtomicBool);

impl ReadySet {
    /// Inserts an attempt, unless it is in the set already.
    pub(crate) fn insert(&self, key: AttemptKey, flag: &ReadyFlag) {
        if !flag.0.swap(true, Ordering::AcqRel) {
            self.keys.lock().push(key);
            self.notify.notify_one();
        }
    }

    /// Removes and returns all attempts; waits until the set is not empty.
    pub(crate) async fn take(&self) -> Vec<AttemptKey> {
        loop {
            let keys = std::mem::take(&mut *self.keys.lock());
            if !keys.is_empty() {
                return keys;
            }
            self.notify.notified().await;
        }
    }
}

impl ReadyFlag {
    /// Marks the attempt as removed; called before its reports are collected, so that later ones
    /// insert it again.
    pub(crate) fn clear(&self) {
        self.0.store(false, Ordering::Release);
    }
}
