//! Budget of bytes for incomplete WebSocket messages, limited in total and per user.

use std::collections::HashMap;

use parking_lot::Mutex;
use streamer_core::saturate;
use streamer_store::Owner;

use crate::metrics::GatewayMetrics;

/// Granularity of reservations, in bytes. Smaller changes are not counted.
const STEP: usize = 4096;

/// Limits the number of bytes that all connections buffer.
pub(crate) struct BufferBudget {
    max: usize,
    max_per_user: usize,
    usage: Mutex<Usage>,
    metrics: GatewayMetrics,
}

#[derive(Default)]
struct Usage {
    total: usize,
    by_user: HashMap<Owner, usize>,
}

/// Number of bytes reserved by one connection.
#[derive(Default)]
pub(crate) struct Reservation(usize);

impl Reservation {
    /// Returns whether the reservation must change to cover `bytes` bytes.
    pub(crate) fn differs(&self, bytes: usize) -> bool {
        bytes / STEP * STEP != self.0
    }
}

impl BufferBudget {
    pub(crate) fn new(max: usize, max_per_user: usize, metrics: GatewayMetrics) -> Self {
        metrics.buffered_bytes_limit.set(saturate::to_i64(max));
        Self { max, max_per_user, usage: Mutex::default(), metrics }
    }

    /// Sets the reservation of a connection of the given user to `bytes`.
    ///
    /// # Errors
    /// Returns the name of the option whose limit is exceeded. The caller must then drop the buffered bytes.
    pub(crate) fn update(
        &self,
        owner: &Owner,
        reservation: &mut Reservation,
        bytes: usize,
    ) -> Result<(), &'static str> {
        let bytes = bytes / STEP * STEP;
        let mut usage = self.usage.lock();
        let of_user = usage.by_user.get(owner).copied().unwrap_or(0);
        let of_user = of_user.saturating_sub(reservation.0).saturating_add(bytes);
        let total = usage.total.saturating_sub(reservation.0).saturating_add(bytes);
        let grows = bytes > reservation.0;
        if grows && of_user > self.max_per_user {
            return Err("gateway.max_buffered_bytes_per_user");
        }
        if grows && total > self.max {
            return Err("gateway.max_buffered_bytes");
        }
        reservation.0 = bytes;
        usage.total = total;
        if of_user == 0 {
            usage.by_user.remove(owner);
        } else {
            usage.by_user.insert(owner.clone(), of_user);
        }
        self.metrics.buffered_bytes.set(saturate::to_i64(total));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use streamer_telemetry::Metrics;

    use super::*;

    fn owner(user: &str) -> Owner {
        Owner { tenant: "acme".into(), user: user.into() }
    }

    #[test]
    fn bytes_are_limited_per_user_and_in_total() {
        let budget = BufferBudget::new(30 * STEP, 20 * STEP, GatewayMetrics::new(&Metrics::new()));
        let [ann, bob] = ["ann", "bob"].map(owner);
        let [mut first, mut second, mut third] = [(); 3].map(|()| Reservation::default());
        assert_eq!(budget.update(&ann, &mut first, 15 * STEP + 1), Ok(()));
        assert!(!first.differs(15 * STEP) && first.differs(16 * STEP));
        let rejected = budget.update(&ann, &mut second, 6 * STEP);
        assert_eq!(rejected, Err("gateway.max_buffered_bytes_per_user"));
        assert_eq!(budget.update(&ann, &mut second, 5 * STEP), Ok(()));
        assert_eq!(budget.update(&bob, &mut third, 11 * STEP), Err("gateway.max_buffered_bytes"));
        // A smaller reservation never fails.
        assert_eq!(budget.update(&ann, &mut first, 14 * STEP), Ok(()));
        assert_eq!(budget.update(&bob, &mut third, 11 * STEP), Ok(()));
        for (user, reservation) in [(&ann, &mut first), (&ann, &mut second), (&bob, &mut third)] {
            assert_eq!(budget.update(user, reservation, 0), Ok(()));
        }
        let usage = budget.usage.lock();
        assert!(usage.total == 0 && usage.by_user.is_empty());
    }
}
