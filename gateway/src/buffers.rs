//! Bytes of WebSocket messages that are not whole yet: bounded in all, and for each user.

use std::collections::HashMap;

use parking_lot::Mutex;
use streamer_store::Owner;

use crate::metrics::GatewayMetrics;

/// What a connection holds is counted in steps of this many bytes; less is not counted.
const STEP: usize = 4096;

/// What all connections hold.
pub(crate) struct Buffers {
    max: usize,
    max_of_user: usize,
    held: Mutex<Held>,
    metrics: GatewayMetrics,
}

#[derive(Default)]
struct Held {
    all: usize,
    of_user: HashMap<Owner, usize>,
}

/// What one connection is counted with.
#[derive(Default)]
pub(crate) struct Counted(usize);

impl Counted {
    /// Whether these bytes are counted differently.
    pub(crate) fn differs(&self, bytes: usize) -> bool {
        bytes / STEP * STEP != self.0
    }
}

impl Buffers {
    pub(crate) fn new(max: usize, max_of_user: usize, metrics: GatewayMetrics) -> Self {
        metrics.buffered_bytes_limit.set(i64::try_from(max).unwrap_or(i64::MAX));
        Self { max, max_of_user, held: Mutex::default(), metrics }
    }

    /// Counts what a connection of this user holds now. If it is too much, names the option that bounds
    /// it; what it holds has to be dropped then.
    pub(crate) fn count(
        &self,
        owner: &Owner,
        counted: &mut Counted,
        bytes: usize,
    ) -> Result<(), &'static str> {
        let bytes = bytes / STEP * STEP;
        let mut held = self.held.lock();
        let of_user = held.of_user.get(owner).copied().unwrap_or(0);
        let of_user = of_user.saturating_sub(counted.0).saturating_add(bytes);
        let all = held.all.saturating_sub(counted.0).saturating_add(bytes);
        let grows = bytes > counted.0;
        if grows && of_user > self.max_of_user {
            return Err("gateway.max_buffered_bytes_per_user");
        }
        if grows && all > self.max {
            return Err("gateway.max_buffered_bytes");
        }
        counted.0 = bytes;
        held.all = all;
        if of_user == 0 {
            held.of_user.remove(owner);
        } else {
            held.of_user.insert(owner.clone(), of_user);
        }
        self.metrics.buffered_bytes.set(i64::try_from(all).unwrap_or(i64::MAX));
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
    fn what_is_held_is_bounded_for_each_user_and_in_all() {
        let buffers = Buffers::new(30 * STEP, 20 * STEP, GatewayMetrics::new(&Metrics::new()));
        let [ann, bob] = ["ann", "bob"].map(owner);
        let [mut first, mut second, mut third] = [(); 3].map(|()| Counted::default());
        assert_eq!(buffers.count(&ann, &mut first, 15 * STEP + 1), Ok(()));
        assert!(!first.differs(15 * STEP) && first.differs(16 * STEP));
        let refusal = buffers.count(&ann, &mut second, 6 * STEP);
        assert_eq!(refusal, Err("gateway.max_buffered_bytes_per_user"));
        assert_eq!(buffers.count(&ann, &mut second, 5 * STEP), Ok(()));
        assert_eq!(buffers.count(&bob, &mut third, 11 * STEP), Err("gateway.max_buffered_bytes"));
        // Less is never refused.
        assert_eq!(buffers.count(&ann, &mut first, 14 * STEP), Ok(()));
        assert_eq!(buffers.count(&bob, &mut third, 11 * STEP), Ok(()));
        for (user, counted) in [(&ann, &mut first), (&ann, &mut second), (&bob, &mut third)] {
            assert_eq!(buffers.count(user, counted, 0), Ok(()));
        }
        let held = buffers.held.lock();
        assert!(held.all == 0 && held.of_user.is_empty());
    }
}
