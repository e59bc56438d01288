//! Quarantine of requests that cannot be claimed because their stored data is corrupt. They stay queued until an
//! operator repairs them, but are retried rarely, so that they do not block the requests behind them.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;
use streamer_core::{Timestamp, Uid};

/// Interval between retries of a quarantined request.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// Maximum number of quarantined requests; further ones are not quarantined.
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

    /// Removes requests that are due for a retry, and returns the number of the remaining ones.
    pub(crate) fn count(&self, now: Timestamp) -> usize {
        let mut entries = self.0.lock();
        entries.retain(|_, until| *until > now);
        entries.len()
    }

    pub(crate) fn contains(&self, uid: Uid) -> bool {
        self.0.lock().contains_key(&uid)
    }
}
