//! Rate limiter that uses the generic cell rate algorithm (ITU-T I.371), whose state is a single number.

use std::time::Duration;

use crate::{Timestamp, saturate};

/// Admits events up to a maximum rate per second, with bursts.
#[derive(Debug)]
pub struct RateLimiter {
    per_second: u32,
    burst: u32,
    /// Time at which the admitted events would end if they were evenly spaced, in nanoseconds since the Unix epoch.
    busy_until: i64,
}

impl RateLimiter {
    /// Creates a limiter for `per_second` events per second, with bursts of up to `burst` events. A `per_second` of 0
    /// means no limit.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second, burst: burst.max(1), busy_until: 0 }
    }

    /// Changes the rate. Events that were admitted earlier count at the previous rate.
    pub fn set_rate(&mut self, per_second: u32, burst: u32) {
        self.per_second = per_second;
        self.burst = burst.max(1);
    }

    /// Admits one event.
    ///
    /// # Errors
    /// Returns the time to wait if the limit is exceeded.
    pub fn admit(&mut self, now: Timestamp) -> Result<(), Duration> {
        if self.per_second == 0 {
            return Ok(());
        }
        let now = now.as_millis().saturating_mul(1_000_000);
        let spacing = i64::from((1_000_000_000 / self.per_second).max(1));
        let tolerance = spacing.saturating_mul(i64::from(self.burst) - 1);
        // Bounded, so that the limiter does not reject all events after the wall clock is set back.
        let busy_until = self.busy_until.min(now.saturating_add(tolerance + spacing));
        let start = busy_until.max(now);
        let too_early = start - now - tolerance;
        if too_early > 0 {
            return Err(Duration::from_nanos(too_early.unsigned_abs()));
        }
        self.busy_until = start.saturating_add(spacing);
        Ok(())
    }

    /// Returns the used part of the burst and the size of the burst, both in nanoseconds.
    #[must_use]
    pub fn used_of_burst(&self, now: Timestamp) -> (u64, u64) {
        let now = now.as_millis().saturating_mul(1_000_000);
        let used = saturate::to_u64(self.busy_until.saturating_sub(now));
        let spacing = u64::from((1_000_000_000 / self.per_second.max(1)).max(1));
        (used, spacing.saturating_mul(self.burst.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_admitted_and_then_the_rate_applies() {
        let mut limiter = RateLimiter::new(10, 3);
        let at = Timestamp::from_millis;
        assert!((0..3).all(|_| limiter.admit(at(1000)).is_ok()));
        assert_eq!(limiter.admit(at(1000)), Err(Duration::from_millis(100)));
        assert_eq!(limiter.used_of_burst(at(1000)), (300_000_000, 300_000_000));
        assert_eq!(limiter.used_of_burst(at(2000)).0, 0);
        assert!(limiter.admit(at(1100)).is_ok());
        assert!(limiter.admit(at(1100)).is_err());
        assert!((0..3).all(|_| limiter.admit(at(9000)).is_ok()));
    }

    #[test]
    fn high_rates_are_enforced_exactly() {
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
    fn a_changed_rate_applies_immediately() {
        let mut limiter = RateLimiter::new(10, 2);
        let at = Timestamp::from_millis;
        assert_eq!((0..9).filter(|_| limiter.admit(at(1000)).is_ok()).count(), 2);
        limiter.set_rate(1000, 100);
        assert_eq!((0..99).filter(|_| limiter.admit(at(1300)).is_ok()).count(), 99);
        limiter.set_rate(1, 1);
        assert!(limiter.admit(at(1350)).is_err());
        assert_eq!((0..9).filter(|_| limiter.admit(at(9000)).is_ok()).count(), 1);
    }

    #[test]
    fn zero_means_no_limit() {
        let mut limiter = RateLimiter::new(0, 0);
        assert!((0..1000).all(|_| limiter.admit(Timestamp::default()).is_ok()));
    }
}
