//! Retry policy of attempts, and backoff with jitter.

use std::time::Duration;

use crate::ErrorCodes;

/// Policy that determines the number of attempts and the backoff between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Maximum number of attempts, at least 1.
    pub max_attempts: u32,
    /// Initial upper bound of the backoff, which doubles after each further attempt.
    pub initial_backoff: Duration,
    /// Maximum upper bound of the backoff.
    pub max_backoff: Duration,
    /// Codes of the errors that are never retried, even if the handler marks them as retryable.
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
    /// Returns a policy with one attempt and no retries.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            max_attempts: 1,
            initial_backoff: Duration::ZERO,
            max_backoff: Duration::ZERO,
            final_errors: ErrorCodes::NONE,
        }
    }

    /// Returns the backoff after `failed_attempts` failed attempts, at least 1; `None` if no attempts remain. Applies
    /// full jitter: multiplies the upper bound by `random`, a uniformly distributed number from 0.0 to 1.0
    /// (<https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>).
    #[must_use]
    pub fn backoff(&self, failed_attempts: u32, random: f64) -> Option<Duration> {
        if failed_attempts >= self.max_attempts {
            return None;
        }
        let doublings = failed_attempts.saturating_sub(1);
        let bound = upper_bound(self.initial_backoff, self.max_backoff, doublings);
        Some(bound.mul_f64(random.clamp(0.0, 1.0)))
    }
}

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

fn upper_bound(first: Duration, longest: Duration, doublings: u32) -> Duration {
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
    fn backoff_doubles_up_to_the_maximum_until_no_attempt_is_left() {
        let policy = RetryPolicy {
            max_attempts: 5,
            initial_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(3),
            ..RetryPolicy::default()
        };
        let backoffs: Vec<_> = (1..=5).map(|failed| policy.backoff(failed, 1.0)).collect();
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!(backoffs, [seconds(1), seconds(2), seconds(3), seconds(3), None]);
        assert_eq!(policy.backoff(3, 0.0), Some(Duration::ZERO));
    }

    #[test]
    fn the_bound_of_the_delay_doubles_up_to_the_longest() {
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
