//! Set of attempts that have reports to send, without duplicates.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::attempt_key::AttemptKey;

#[derive(Default)]
pub(crate) struct ReadySet {
    keys: Mutex<Vec<AttemptKey>>,
    notify: Notify,
}

/// Flag that is set while an attempt is in the set.
#[derive(Default)]
pub(crate) struct ReadyFlag(AtomicBool);

impl ReadySet {
    /// Inserts an attempt unless the set already contains it.
    pub(crate) fn insert(&self, key: AttemptKey, flag: &ReadyFlag) {
        if !flag.0.swap(true, Ordering::AcqRel) {
            self.keys.lock().push(key);
            self.notify.notify_one();
        }
    }

    /// Waits until the set is not empty, then removes and returns all attempts.
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
    /// Marks the attempt as removed. Must be called before the reports of the attempt are collected, so that later
    /// reports insert the attempt again.
    pub(crate) fn clear(&self) {
        self.0.store(false, Ordering::Release);
    }
}
