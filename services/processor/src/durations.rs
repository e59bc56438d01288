//! How long attempts took lately, action by action: for estimates of when a queued request starts.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;

/// How much the latest one counts: an average over about the last ten.
const WEIGHT: f64 = 0.2;

#[derive(Default)]
pub(crate) struct Durations {
    seconds: Mutex<HashMap<String, f64>>,
}

impl Durations {
    pub(crate) fn note(&self, action: &str, took: Duration) {
        let took = took.as_secs_f64();
        let mut seconds = self.seconds.lock();
        match seconds.get_mut(action) {
            Some(average) => *average += (took - *average) * WEIGHT,
            None => {
                seconds.insert(action.to_owned(), took);
            }
        }
    }

    /// `None` while nothing was measured.
    pub(crate) fn usual(&self, action: &str) -> Option<Duration> {
        self.seconds.lock().get(action).copied().map(Duration::from_secs_f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_follows_what_is_measured() {
        let durations = Durations::default();
        assert_eq!(durations.usual("a"), None);
        durations.note("a", Duration::from_secs(10));
        assert_eq!(durations.usual("a"), Some(Duration::from_secs(10)));
        durations.note("a", Duration::from_secs(5));
        assert_eq!(durations.usual("a"), Some(Duration::from_secs(9)));
    }
}
