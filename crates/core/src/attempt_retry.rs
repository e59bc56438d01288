//! Retry policy of attempts: their number, and the backoff after a failed one.

use std::time::Duration;

use crate::{ErrorCodes, backoff::upper_bound};

/// Policy that determines the number of attempts and the backoff between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Maximum number of attempts, at least 1. Attempts that were handed back unfinished do not count.
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
    fn many_attempts_do_not_overflow() {
        let policy = RetryPolicy { max_attempts: u32::MAX, ..RetryPolicy::default() };
        assert_eq!(policy.backoff(1_000_000, 1.0), Some(policy.max_backoff));
    }
}
