//! How long attempts took lately, by tenant and action: for estimates of when a queued request starts.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;

/// How much the latest one counts: an average over about the last ten.
const WEIGHT: f64 = 0.2;
/// Averages that are kept. Beyond that all are dropped and measured anew.
const MAX_AVERAGES: usize = 100_000;

/// Averages in seconds: by tenant, so that no tenant learns of another's work or changes its estimates.
#[derive(Default)]
pub(crate) struct Durations {
    averages: Mutex<Averages>,
}

#[derive(Default)]
struct Averages {
    by_tenant: HashMap<String, HashMap<String, f64>>,
    count: usize,
}

impl Durations {
    pub(crate) fn note(&self, tenant: &str, action: &str, took: Duration) {
        let took = took.as_secs_f64();
        let mut averages = self.averages.lock();
        let known = averages.by_tenant.get_mut(tenant).and_then(|actions| actions.get_mut(action));
        if let Some(average) = known {
            *average += (took - *average) * WEIGHT;
            return;
        }
        if averages.count >= MAX_AVERAGES {
            *averages = Averages::default();
        }
        averages.count += 1;
        averages.by_tenant.entry(tenant.to_owned()).or_default().insert(action.to_owned(), took);
    }

    /// `None` while nothing was measured.
    pub(crate) fn usual(&self, tenant: &str, action: &str) -> Option<Duration> {
        let averages = self.averages.lock();
        averages.by_tenant.get(tenant)?.get(action).copied().map(Duration::from_secs_f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_follows_what_is_measured_of_the_tenant() {
        let durations = Durations::default();
        let seconds = Duration::from_secs;
        assert_eq!(durations.usual("acme", "a"), None);
        durations.note("acme", "a", seconds(10));
        durations.note("globex", "a", seconds(100));
        assert_eq!(durations.usual("acme", "a"), Some(seconds(10)));
        durations.note("acme", "a", seconds(5));
        assert_eq!(durations.usual("acme", "a"), Some(seconds(9)));
    }

    #[test]
    fn their_number_is_bounded() {
        let durations = Durations::default();
        for number in 0..=MAX_AVERAGES {
            durations.note("acme", &number.to_string(), Duration::from_secs(1));
        }
        assert_eq!(durations.averages.lock().count, 1);
    }
}
