//! Requests that cannot be claimed because their stored data is corrupt. They stay queued for an
//! operator to repair, but are retried rarely, so that they do not block the requests behind them.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;
use streamer_core::{Timestamp, Uid};

/// Time until a quarantined request is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// Requests beyond these are not quarantined.
const MAX_ENTRIES: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Quarantine(Mutex<HashMap<Uid, Timestamp>>);

impl Quarantine {
    pub(crate) fn insert(&self, uid: Uid, now: Timestamp) {
        let mut entries = self.0.lock();
        if entries.len() < MAX_ENTRIES {
            entries.insert(uid, now.plus(RETRY_INTERVAL));
        }
    }

    /// Returns the number of quarantined requests; removes those that are due for a retry.
    pub(crate) fn count(&self, now: Timestamp) -> usize {
        let mut entries = self.0.lock();
        entries.retain(|_, until| *until > now);
        entries.len()
    }

    pub(crate) fn contains(&self, uid: Uid) -> bool {
        self.0.lock().contains_key(&uid)
    }
}
