//! Limits the number of concurrent attempts: in total, per action and per tenant.

use std::{borrow::Borrow, collections::HashMap, hash::Hash, sync::Arc};

use parking_lot::Mutex;
use streamer_core::saturate;

use crate::declaration::{ActionKey, Declaration};

/// Issues permits for concurrent attempts.
pub(crate) struct ConcurrencyLimiter {
    total_limit: u32,
    tenant_limit: u32,
    in_use: Mutex<InUse>,
}

#[derive(Default)]
struct InUse {
    total: u32,
    by_action: HashMap<ActionKey, u32>,
    by_tenant: HashMap<String, u32>,
}

/// Permit for one attempt, released when dropped.
pub(crate) struct ConcurrencyPermit {
    limiter: Arc<ConcurrencyLimiter>,
    action: ActionKey,
    tenant: String,
}

impl ConcurrencyLimiter {
    /// Creates a limiter that allows `total_limit` concurrent attempts, of which each tenant may use at most
    /// `tenant_share` percent. The rest remains available to other tenants while one tenant floods the queue.
    pub(crate) fn new(total_limit: u32, tenant_share: u32) -> Self {
        let tenant_limit = percent_of(total_limit, tenant_share);
        Self { total_limit, tenant_limit, in_use: Mutex::default() }
    }

    /// Acquires a permit for the given action and tenant, if one is available.
    pub(crate) fn try_acquire(
        self: &Arc<Self>,
        declared: &Declaration,
        tenant: &str,
    ) -> Option<ConcurrencyPermit> {
        let mut in_use = self.in_use.lock();
        let of_tenant = in_use.by_tenant.get(tenant).copied().unwrap_or(0);
        if !self.admits(&in_use, declared) || of_tenant >= self.tenant_limit {
            return None;
        }
        *in_use.by_action.entry(declared.key.clone()).or_insert(0) += 1;
        *in_use.by_tenant.entry(tenant.to_owned()).or_insert(0) += 1;
        in_use.total += 1;
        Some(ConcurrencyPermit {
            limiter: self.clone(),
            action: declared.key.clone(),
            tenant: tenant.to_owned(),
        })
    }

    /// Returns the number of additional attempts that may run in total.
    pub(crate) fn available(&self) -> u32 {
        self.total_limit.saturating_sub(self.in_use.lock().total)
    }

    /// Returns whether an additional attempt of the given action may run.
    pub(crate) fn has_capacity(&self, declared: &Declaration) -> bool {
        self.admits(&self.in_use.lock(), declared)
    }

    /// Returns the number of additional attempts that may run, for each tenant with running attempts.
    pub(crate) fn available_by_tenant(&self) -> HashMap<String, usize> {
        let in_use = self.in_use.lock();
        let available = |count: &u32| saturate::to_usize(self.tenant_limit.saturating_sub(*count));
        in_use.by_tenant.iter().map(|(tenant, count)| (tenant.clone(), available(count))).collect()
    }

    fn admits(&self, in_use: &InUse, declared: &Declaration) -> bool {
        let of_action = in_use.by_action.get(&declared.key).copied().unwrap_or(0);
        let limit = declared.spec.max_concurrency;
        in_use.total < self.total_limit && limit.is_none_or(|limit| of_action < limit)
    }
}

/// Returns `percent` percent of `of`, but at least 1.
pub(crate) fn percent_of(of: u32, percent: u32) -> u32 {
    let part = u64::from(of) * u64::from(percent.min(100)) / 100;
    saturate::to_u32(part).max(1)
}

impl Drop for ConcurrencyPermit {
    fn drop(&mut self) {
        let mut in_use = self.limiter.in_use.lock();
        in_use.total -= 1;
        decrement(&mut in_use.by_action, &self.action);
        decrement(&mut in_use.by_tenant, self.tenant.as_str());
    }
}

fn decrement<K, Q>(counts: &mut HashMap<K, u32>, name: &Q)
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

    fn declared(spec: ActionSpec) -> Declaration {
        let key = ActionKey { action: spec.name.clone(), tenant: None };
        Declaration::new(key, Arc::new(spec))
    }

    #[test]
    fn limits_apply_and_dropped_permits_are_released() {
        let limiter = Arc::new(ConcurrencyLimiter::new(4, 50));
        let limited = declared(ActionSpec::new("limited").max_concurrency(1));
        let other = declared(ActionSpec::new("b"));
        let first = limiter.try_acquire(&limited, "acme").unwrap();
        assert!(limiter.try_acquire(&limited, "other").is_none());
        assert!(!limiter.has_capacity(&limited) && limiter.has_capacity(&other));
        let second = limiter.try_acquire(&other, "acme").unwrap();
        assert!(limiter.try_acquire(&other, "acme").is_none(), "half of four is two");
        let _third = limiter.try_acquire(&other, "other").unwrap();
        assert_eq!((limiter.available(), limiter.available_by_tenant()["acme"]), (1, 0));
        drop((first, second));
        assert!(limiter.try_acquire(&limited, "acme").is_some());
        assert_eq!(limiter.available_by_tenant().len(), 1);
    }

    #[test]
    fn a_tenant_share_is_at_least_one() {
        assert_eq!((percent_of(1, 75), percent_of(8, 75), percent_of(8, 100)), (1, 6, 8));
    }
}
