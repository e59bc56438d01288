//! When a failed attempt is followed by another.

use std::time::Duration;

use crate::ErrorCodes;

/// How often and how soon a failed attempt is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, at least 1.
    pub max_attempts: u32,
    /// Upper bound of the wait after the first attempt; doubled after each further one.
    pub initial_backoff: Duration,
    /// Upper bound of any wait.
    pub max_backoff: Duration,
    /// Failures of these kinds are final, whatever the handler says.
    pub final_errors: ErrorCodes,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 3,
            initial_backoff: Duration::from_millis(500),
            max_backoff: Duration::from_secs(60),
            final_errors: ErrorCodes::NONE,
        }
    }
}

impl RetryPolicy {
    /// One attempt and no other.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            max_attempts: 1,
            initial_backoff: Duration::ZERO,
            max_backoff: Duration::ZERO,
            final_errors: ErrorCodes::NONE,
        }
    }

    /// The wait after `failed_attempts` (from 1), or `None` when there is no attempt left. Full
    /// jitter: evenly drawn from nothing to the bound by `random`, 0.0 to 1.0
    /// (<https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>).
    #[must_use]
    pub fn backoff(&self, failed_attempts: u32, random: f64) -> Option<Duration> {
        if failed_attempts >= self.max_attempts {
            return None;
        }
        let doublings = failed_attempts.saturating_sub(1).min(31);
        let bound = self.initial_backoff.saturating_mul(1 << doublings).min(self.max_backoff);
        Some(bound.mul_f64(random.clamp(0.0, 1.0)))
    }
}

/// Waits between attempts at something outside: a bound that doubles from the first to the longest,
/// and a wait that is evenly drawn from nothing to it.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// Nothing has failed yet.
    #[must_use]
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// How often it failed in a row.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// It failed once more: how long to wait.
    #[must_use]
    pub fn wait(&mut self) -> Duration {
        let bound = self.first.saturating_mul(1 << self.failures.min(31)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        bound.mul_f64(random_fraction())
    }

    /// It went well.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A random number from 0.0 to 1.0, for jitter.
#[must_use]
pub fn random_fraction() -> f64 {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    f64::from(random) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_bound_and_end_with_the_attempts() {
        let policy = RetryPolicy {
            max_attempts: 5,
            initial_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(3),
            ..RetryPolicy::default()
        };
        let waits: Vec<_> = (1..=5).map(|failed| policy.backoff(failed, 1.0)).collect();
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!(waits, [seconds(1), seconds(2), seconds(3), seconds(3), None]);
        assert_eq!(policy.backoff(3, 0.0), Some(Duration::ZERO));
    }

    #[test]
    fn the_bound_of_a_wait_doubles_up_to_the_longest() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for bound in [100, 200, 400, 800, 1000, 1000] {
            assert!(backoff.wait() <= Duration::from_millis(bound));
        }
        backoff.reset();
        assert!(backoff.wait() <= Duration::from_millis(100));
    }

    #[test]
    fn many_attempts_do_not_overflow() {
        let policy = RetryPolicy { max_attempts: u32::MAX, ..RetryPolicy::default() };
        assert_eq!(policy.backoff(1_000_000, 1.0), Some(policy.max_backoff));
    }
}
