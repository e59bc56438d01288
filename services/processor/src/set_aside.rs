//! Requests that cannot be claimed because what is stored of them cannot be read. They stay queued, for
//! an operator to mend, but must not be tried again and again before everything behind them.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;
use streamer_core::{Timestamp, Uid};

/// They are tried again after so long.
const TRY_AGAIN: Duration = Duration::from_secs(30);
/// Others beyond these are tried all the time.
const MAX: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct SetAside(Mutex<HashMap<Uid, Timestamp>>);

impl SetAside {
    pub(crate) fn note(&self, uid: Uid, now: Timestamp) {
        let mut all = self.0.lock();
        if all.len() < MAX {
            all.insert(uid, now.plus(TRY_AGAIN));
        }
    }

    /// How many there are now.
    pub(crate) fn count(&self, now: Timestamp) -> usize {
        let mut all = self.0.lock();
        all.retain(|_, until| *until > now);
        all.len()
    }

    pub(crate) fn contains(&self, uid: Uid) -> bool {
        self.0.lock().contains_key(&uid)
    }
}
