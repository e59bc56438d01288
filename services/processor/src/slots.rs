//! How many attempts may run at once: a pure count, of all, of each action and of each tenant.

use std::{borrow::Borrow, collections::HashMap, hash::Hash, sync::Arc};

use parking_lot::Mutex;

use crate::{actions::Declared, workers::Key};

/// Counts running attempts.
pub(crate) struct Slots {
    total_limit: u32,
    tenant_limit: u32,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    total: u32,
    by_action: HashMap<Key, u32>,
    by_tenant: HashMap<String, u32>,
}

/// The right to run one attempt, given back when dropped.
pub(crate) struct Slot {
    slots: Arc<Slots>,
    action: Key,
    tenant: String,
}

impl Slots {
    /// `total_limit` in all, and `tenant_share` percent of them for any one tenant: what is left
    /// is there for whoever comes while one tenant floods.
    pub(crate) fn new(total_limit: u32, tenant_share: u32) -> Self {
        let tenant_limit = share(total_limit, tenant_share);
        Self { total_limit, tenant_limit, taken: Mutex::default() }
    }

    /// Takes a slot for this action and tenant, if one is free.
    pub(crate) fn take(self: &Arc<Self>, declared: &Declared, tenant: &str) -> Option<Slot> {
        let mut taken = self.taken.lock();
        let of_tenant = taken.by_tenant.get(tenant).copied().unwrap_or(0);
        if !self.room_in(&taken, declared) || of_tenant >= self.tenant_limit {
            return None;
        }
        *taken.by_action.entry(declared.key.clone()).or_insert(0) += 1;
        *taken.by_tenant.entry(tenant.to_owned()).or_insert(0) += 1;
        taken.total += 1;
        Some(Slot { slots: self.clone(), action: declared.key.clone(), tenant: tenant.to_owned() })
    }

    /// How many more may run in all.
    pub(crate) fn free(&self) -> u32 {
        self.total_limit.saturating_sub(self.taken.lock().total)
    }

    /// Whether one more of this action may run.
    pub(crate) fn has_room(&self, declared: &Declared) -> bool {
        self.room_in(&self.taken.lock(), declared)
    }

    /// How many more may run of each tenant that has any.
    pub(crate) fn tenant_room(&self) -> HashMap<String, usize> {
        let taken = self.taken.lock();
        let room = |count: &u32| {
            usize::try_from(self.tenant_limit.saturating_sub(*count)).unwrap_or(usize::MAX)
        };
        taken.by_tenant.iter().map(|(tenant, count)| (tenant.clone(), room(count))).collect()
    }

    /// How many run for each tenant that has any.
    pub(crate) fn by_tenant(&self) -> HashMap<String, u32> {
        self.taken.lock().by_tenant.clone()
    }

    fn room_in(&self, taken: &Taken, declared: &Declared) -> bool {
        let of_action = taken.by_action.get(&declared.key).copied().unwrap_or(0);
        let limit = declared.spec.max_concurrency;
        taken.total < self.total_limit && limit.is_none_or(|limit| of_action < limit)
    }
}

/// This many percent of them, but at least one.
pub(crate) fn share(of: u32, percent: u32) -> u32 {
    let part = u64::from(of) * u64::from(percent.min(100)) / 100;
    u32::try_from(part).unwrap_or(u32::MAX).max(1)
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock();
        taken.total -= 1;
        give_back(&mut taken.by_action, &self.action);
        give_back(&mut taken.by_tenant, self.tenant.as_str());
    }
}

fn give_back<K, Q>(counts: &mut HashMap<K, u32>, name: &Q)
where
    K: Hash + Eq + Borrow<Q>,
    Q: Hash + Eq + ?Sized,
{
    if let Some(count) = counts.get_mut(name) {
        *count -= 1;
        if *count == 0 {
            counts.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::ActionSpec;

    use super::*;

    fn declared(spec: ActionSpec) -> Declared {
        let key = Key { action: spec.name.clone(), tenant: None };
        Declared { key, spec: Arc::new(spec) }
    }

    #[test]
    fn each_limit_holds_and_slots_come_back() {
        let slots = Arc::new(Slots::new(4, 50));
        let limited = declared(ActionSpec::new("limited").max_concurrency(1));
        let other = declared(ActionSpec::new("b"));
        let first = slots.take(&limited, "acme").unwrap();
        assert!(slots.take(&limited, "other").is_none());
        assert!(!slots.has_room(&limited) && slots.has_room(&other));
        let second = slots.take(&other, "acme").unwrap();
        assert!(slots.take(&other, "acme").is_none(), "half of four is two");
        let _third = slots.take(&other, "other").unwrap();
        assert_eq!((slots.free(), slots.by_tenant()["acme"]), (1, 2));
        drop((first, second));
        assert!(slots.take(&limited, "acme").is_some());
        assert_eq!(slots.by_tenant().len(), 1);
    }

    #[test]
    fn one_tenant_alone_always_has_a_slot() {
        assert_eq!((share(1, 75), share(8, 75), share(8, 100)), (1, 6, 8));
    }
}
