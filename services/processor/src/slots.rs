//! How many attempts may run at once: a pure count, of all and of each action.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use streamer_handler::Handlers;

/// Counts running attempts.
pub(crate) struct Slots {
    limits: HashMap<String, u32>,
    total_limit: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    total: usize,
    by_action: HashMap<String, u32>,
}

/// The right to run one attempt, given back when dropped.
pub(crate) struct Slot {
    slots: Arc<Slots>,
    action: String,
}

impl Slots {
    pub(crate) fn new(handlers: &Handlers, total_limit: usize) -> Self {
        let limits = handlers
            .specs()
            .filter_map(|spec| Some((spec.name.clone(), spec.max_concurrency?)))
            .collect();
        Self { limits, total_limit, taken: Mutex::default() }
    }

    /// Takes a slot for this action, if one is free.
    pub(crate) fn take(self: &Arc<Self>, action: &str) -> Option<Slot> {
        let mut taken = self.taken.lock();
        if taken.total >= self.total_limit {
            return None;
        }
        let of_action = taken.by_action.entry(action.to_owned()).or_insert(0);
        if self.limits.get(action).is_some_and(|limit| *of_action >= *limit) {
            return None;
        }
        *of_action += 1;
        taken.total += 1;
        Some(Slot { slots: self.clone(), action: action.to_owned() })
    }

    /// How many more may run in all.
    pub(crate) fn free(&self) -> usize {
        self.total_limit.saturating_sub(self.taken.lock().total)
    }

    /// Whether one more of this action may run.
    pub(crate) fn has_room(&self, action: &str) -> bool {
        let taken = self.taken.lock();
        let of_action = taken.by_action.get(action).copied().unwrap_or(0);
        taken.total < self.total_limit
            && self.limits.get(action).is_none_or(|limit| of_action < *limit)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock();
        taken.total -= 1;
        if let Some(of_action) = taken.by_action.get_mut(&self.action) {
            *of_action -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use streamer_handler::{ActionSpec, Context, Handler, HandlerError, async_trait};

    use super::*;

    struct Limited;

    #[async_trait]
    impl Handler for Limited {
        type Input = ();
        type Output = ();
        fn spec(&self) -> ActionSpec {
            ActionSpec::new("limited").max_concurrency(1)
        }
        async fn handle(&self, _: &Context, (): ()) -> Result<(), HandlerError> {
            Ok(())
        }
    }

    #[test]
    fn both_limits_hold_and_slots_come_back() {
        let slots = Arc::new(Slots::new(&Handlers::new().with(Limited), 2));
        let first = slots.take("limited").unwrap();
        assert!(slots.take("limited").is_none());
        assert!(!slots.has_room("limited") && slots.has_room("other"));
        let _other = slots.take("other").unwrap();
        assert!(slots.take("other").is_none());
        assert_eq!(slots.free(), 0);
        drop(first);
        assert!(slots.take("limited").is_some());
    }
}
