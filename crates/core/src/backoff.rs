//! Exponential backoff with jitter, for retries of calls to other systems.

use std::time::Duration;

/// Exponential backoff with full jitter for calls to other systems. The upper bound doubles from `first` to `longest`;
/// each delay is uniformly distributed between zero and the upper bound.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// Creates a backoff without failures.
    #[must_use]
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// Returns the number of consecutive failures.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// Records a failure and returns the delay before the next retry.
    #[must_use]
    pub fn wait(&mut self) -> Duration {
        let bound = upper_bound(self.first, self.longest, self.failures);
        self.failures = self.failures.saturating_add(1);
        jitter(bound)
    }

    /// Records a success, which resets the number of failures.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Returns the upper bound of a delay, which doubles from `first` to `longest`.
pub(crate) fn upper_bound(first: Duration, longest: Duration, doublings: u32) -> Duration {
    first.saturating_mul(1 << doublings.min(31)).min(longest)
}

/// Returns a random duration from zero to `max`: full jitter.
#[must_use]
pub fn jitter(max: Duration) -> Duration {
    max.mul_f64(random_fraction())
}

/// Returns a random number from 0.0 to 1.0, for jitter.
#[must_use]
pub fn random_fraction() -> f64 {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    f64::from(random) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_of_the_delay_doubles_up_to_the_longest() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for bound in [100, 200, 400, 800, 1000, 1000] {
            assert!(backoff.wait() <= Duration::from_millis(bound));
        }
        backoff.reset();
        assert!(backoff.wait() <= Duration::from_millis(100));
    }
}
