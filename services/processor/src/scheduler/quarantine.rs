//! Quarantine of requests that cannot be claimed because their stored data is corrupt. They stay queued until an
//! operator repairs them, but are retried rarely, so that they do not block the requests behind them.

use std::{collections::HashMap, time::Duration};

use streamer_core::{Timestamp, Uid};

/// Interval between retries of a quarantined request.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// Maximum number of quarantined requests; further ones are not quarantined.
const MAX_ENTRIES: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Quarantine(HashMap<Uid, Timestamp>);

impl Quarantine {
    pub(crate) fn insert(&mut self, uid: Uid, now: Timestamp) {
        if self.0.len() < MAX_ENTRIES {
            self.0.insert(uid, now.plus(RETRY_INTERVAL));
        }
    }

    /// Removes requests that are due for a retry, and returns the number of the remaining ones.
    pub(crate) fn count(&mut self, now: Timestamp) -> usize {
        self.0.retain(|_, until| *until > now);
        self.0.len()
    }

    pub(crate) fn contains(&self, uid: Uid) -> bool {
        !self.0.is_empty() && self.0.contains_key(&uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_retried_after_the_interval_and_their_number_is_limited() {
        let mut quarantine = Quarantine::default();
        let at = Timestamp::from_millis;
        let first = Uid::new(at(1));
        quarantine.insert(first, at(0));
        assert!(quarantine.contains(first) && !quarantine.contains(Uid::new(at(2))));
        assert_eq!((quarantine.count(at(29_999)), quarantine.count(at(30_000))), (1, 0));
        assert!(!quarantine.contains(first));
        (0..300).for_each(|number| quarantine.insert(Uid::new(at(number)), at(0)));
        assert_eq!(quarantine.count(at(0)), MAX_ENTRIES);
    }
}
