//! Which attempts have something to send: each is noted at most once, however much it has.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::attempt::Key;

#[derive(Default)]
pub(crate) struct Ready {
    keys: Mutex<Vec<Key>>,
    noted: Notify,
}

/// One attempt's entry.
#[derive(Default)]
pub(crate) struct Flag(AtomicBool);

impl Ready {
    /// Notes an attempt, unless it is noted already.
    pub(crate) fn note(&self, key: Key, flag: &Flag) {
        if !flag.0.swap(true, Ordering::AcqRel) {
            self.keys.lock().push(key);
            self.noted.notify_one();
        }
    }

    /// The attempts that were noted; returns once there is one.
    pub(crate) async fn take(&self) -> Vec<Key> {
        loop {
            let keys = std::mem::take(&mut *self.keys.lock());
            if !keys.is_empty() {
                return keys;
            }
            self.noted.notified().await;
        }
    }
}

impl Flag {
    /// Before looking at the attempt: what comes from now on is noted anew.
    pub(crate) fn clear(&self) {
        self.0.store(false, Ordering::Release);
    }
}
