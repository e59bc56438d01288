//! A rate limit in one number: the generic cell rate algorithm (ITU-T I.371).

use std::time::Duration;

use crate::Timestamp;

/// Admits a number of events a second, and bursts beyond that.
#[derive(Debug)]
pub struct RateLimiter {
    per_second: u32,
    burst: u32,
    /// When an evenly spaced sequence of everything admitted so far would be over, in nanoseconds.
    busy_until: i64,
}

impl RateLimiter {
    /// `per_second` 0 means no limit.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second, burst: burst.max(1), busy_until: 0 }
    }

    /// Admits one more, or says how long to wait.
    ///
    /// # Errors
    /// The time to wait.
    pub fn admit(&mut self, now: Timestamp) -> Result<(), Duration> {
        if self.per_second == 0 {
            return Ok(());
        }
        let now = now.as_millis().saturating_mul(1_000_000);
        let spacing = i64::from((1_000_000_000 / self.per_second).max(1));
        let tolerance = spacing.saturating_mul(i64::from(self.burst) - 1);
        // A wall clock that was set back must not refuse everything.
        let busy_until = self.busy_until.min(now.saturating_add(tolerance + spacing));
        let begin = busy_until.max(now);
        let too_early = begin - now - tolerance;
        if too_early > 0 {
            return Err(Duration::from_nanos(too_early.unsigned_abs()));
        }
        self.busy_until = begin.saturating_add(spacing);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let mut limiter = RateLimiter::new(10, 3);
        let at = Timestamp::from_millis;
        assert!((0..3).all(|_| limiter.admit(at(1000)).is_ok()));
        assert_eq!(limiter.admit(at(1000)), Err(Duration::from_millis(100)));
        assert!(limiter.admit(at(1100)).is_ok());
        assert!(limiter.admit(at(1100)).is_err());
        assert!((0..3).all(|_| limiter.admit(at(9000)).is_ok()));
    }

    #[test]
    fn high_rates_hold_exactly() {
        for rate in [30_000, 600_000] {
            let mut limiter = RateLimiter::new(rate, 1000);
            let admitted = (0..1000).map(|step| {
                let now = Timestamp::from_millis(1_790_000_000_000 + step);
                (0..4000).filter(|_| limiter.admit(now).is_ok()).count()
            });
            let (admitted, rate) = (admitted.sum::<usize>(), rate as usize);
            assert!(admitted.abs_diff(rate) <= rate / 500 + 1000, "{admitted} of {rate}");
        }
    }

    #[test]
    fn zero_means_no_limit() {
        let mut limiter = RateLimiter::new(0, 0);
        assert!((0..1000).all(|_| limiter.admit(Timestamp::default()).is_ok()));
    }
}
