//! Mean duration of recent attempts per tenant and action, for estimates of when a queued request starts.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;

/// Weight of the latest duration in the average, which covers approximately the last ten durations.
const WEIGHT: f64 = 0.2;
/// Maximum number of averages; when it is reached, all averages are dropped and measured again.
const MAX_AVERAGES: usize = 100_000;

/// Average durations. Each tenant has its own, so that no tenant sees or influences the estimates of other tenants.
#[derive(Default)]
pub(crate) struct RuntimeEstimates {
    averages: Mutex<Averages>,
}

#[derive(Default)]
struct Averages {
    by_tenant: HashMap<String, HashMap<String, f64>>,
    count: usize,
}

impl RuntimeEstimates {
    pub(crate) fn record(&self, tenant: &str, action: &str, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let mut averages = self.averages.lock();
        let known = averages.by_tenant.get_mut(tenant).and_then(|actions| actions.get_mut(action));
        if let Some(average) = known {
            *average += (seconds - *average) * WEIGHT;
            return;
        }
        if averages.count >= MAX_AVERAGES {
            *averages = Averages::default();
        }
        averages.count += 1;
        averages.by_tenant.entry(tenant.to_owned()).or_default().insert(action.to_owned(), seconds);
    }

    /// Returns the mean duration of recent attempts; `None` before the first measurement.
    pub(crate) fn mean(&self, tenant: &str, action: &str) -> Option<Duration> {
        let averages = self.averages.lock();
        averages.by_tenant.get(tenant)?.get(action).copied().map(Duration::from_secs_f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_follows_the_durations_of_the_tenant() {
        let estimates = RuntimeEstimates::default();
        let seconds = Duration::from_secs;
        assert_eq!(estimates.mean("acme", "a"), None);
        estimates.record("acme", "a", seconds(10));
        estimates.record("globex", "a", seconds(100));
        assert_eq!(estimates.mean("acme", "a"), Some(seconds(10)));
        estimates.record("acme", "a", seconds(5));
        assert_eq!(estimates.mean("acme", "a"), Some(seconds(9)));
    }

    #[test]
    fn the_number_of_averages_is_bounded() {
        let estimates = RuntimeEstimates::default();
        for number in 0..=MAX_AVERAGES {
            estimates.record("acme", &number.to_string(), Duration::from_secs(1));
        }
        assert_eq!(estimates.averages.lock().count, 1);
    }
}
