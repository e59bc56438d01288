//! Counts and limits the open watches of tenants and users.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;

use crate::{LimitsByTenant, RequestError, TenantLimit};

/// Minimum number of entries at which unused entries are removed. They are removed when the number of entries has
/// doubled since the last removal.
const MIN_SWEEP: usize = 64;

/// Retry delay for a caller that has too many open watches. Watches of a broken connection may still be counted for
/// some time.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Counts the open watches of all tenants and users in this process.
#[derive(Debug)]
pub struct OpenWatches {
    limits: LimitsByTenant,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    tenants: HashMap<Arc<str>, Weak<TenantWatches>>,
    users: HashMap<(Arc<str>, Arc<str>), Weak<UserWatches>>,
    sweep_at: usize,
}

#[derive(Debug)]
struct TenantWatches {
    name: Arc<str>,
    open: AtomicU64,
}

/// Counts the open watches of one user.
#[derive(Debug)]
pub struct UserWatches {
    limits: LimitsByTenant,
    tenant: Arc<TenantWatches>,
    open: AtomicU64,
}

/// Permit for one watch. The watch counts as open until the permit is dropped.
#[derive(Debug)]
pub struct WatchPermit(Arc<UserWatches>);

impl OpenWatches {
    /// Creates an instance that enforces `limits`, without open watches.
    #[must_use]
    pub fn new(limits: LimitsByTenant) -> Self {
        Self { limits, entries: Mutex::default() }
    }

    /// Returns the counter of the given user.
    #[must_use]
    pub fn of(&self, tenant: &str, user: &str) -> Arc<UserWatches> {
        let (tenant, user): (Arc<str>, Arc<str>) = (tenant.into(), user.into());
        let mut entries = self.entries.lock();
        let key = (tenant.clone(), user);
        if let Some(found) = entries.users.get(&key).and_then(Weak::upgrade) {
            return found;
        }
        if entries.users.len() >= entries.sweep_at.max(MIN_SWEEP) {
            entries.users.retain(|_, entry| entry.strong_count() > 0);
            entries.tenants.retain(|_, entry| entry.strong_count() > 0);
            entries.sweep_at = entries.users.len() * 2;
        }
        let existing = entries.tenants.get(&tenant).and_then(Weak::upgrade);
        let tenant = existing.unwrap_or_else(|| {
            let created = Arc::new(TenantWatches { name: tenant.clone(), open: AtomicU64::new(0) });
            entries.tenants.insert(tenant, Arc::downgrade(&created));
            created
        });
        let limits = self.limits.clone();
        let created = Arc::new(UserWatches { limits, tenant, open: AtomicU64::new(0) });
        entries.users.insert(key, Arc::downgrade(&created));
        created
    }
}

impl UserWatches {
    /// Opens a watch, if the limits allow it.
    ///
    /// # Errors
    /// Returns a `RATE_LIMITED` error with the name of the option that sets the exceeded limit.
    pub fn open(self: &Arc<Self>) -> Result<WatchPermit, RequestError> {
        // Created before the check, because dropping it after an error decrements the counters.
        let watch = WatchPermit(self.clone());
        let of_user = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        let of_tenant = self.tenant.open.fetch_add(1, Ordering::Relaxed) + 1;
        let limits = self.limits.of(&self.tenant.name);
        for (limit, open, scope) in [
            (TenantLimit::WatchesPerUser, of_user, "user"),
            (TenantLimit::WatchesPerTenant, of_tenant, "tenant"),
        ] {
            let allowed = limits.get(limit);
            self.limits.record_usage(limit, open.min(allowed), allowed);
            if allowed > 0 && open > allowed {
                let message = format!("a {scope} must have at most {allowed} open watches");
                return Err(RequestError::limited(limit.option(), &message, Some(RETRY_AFTER)));
            }
        }
        Ok(watch)
    }
}

impl Drop for WatchPermit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.tenant.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TenantLimits;

    fn watches() -> OpenWatches {
        let limits = TenantLimits::new(|limit| match limit {
            TenantLimit::WatchesPerTenant => 3,
            TenantLimit::WatchesPerUser => 2,
            _ => 0,
        });
        OpenWatches::new(LimitsByTenant::new(limits, HashMap::new()))
    }

    #[test]
    fn users_and_tenants_have_separate_limits() {
        let watches = watches();
        let ann = watches.of("acme", "ann");
        let first = ann.open().unwrap();
        let second = watches.of("acme", "ann").open().unwrap();
        let error = ann.open().unwrap_err();
        assert!(error.message.contains("limits.watches_per_user"), "{error}");
        let bob = watches.of("acme", "bob");
        let third = bob.open().unwrap();
        let error = bob.open().unwrap_err();
        assert!(error.message.contains("limits.watches_per_tenant"), "{error}");
        assert!(watches.of("globex", "ann").open().is_ok());
        drop(first);
        let fourth = bob.open().unwrap();
        assert!(ann.open().is_err());
        drop((second, third, fourth));
        assert!(ann.open().is_ok());
    }

    #[test]
    fn entries_of_users_without_watches_are_removed() {
        let watches = watches();
        let ann = watches.of("acme", "ann");
        for number in 0..10_000 {
            drop(watches.of(&format!("t{number}"), "ann").open().unwrap());
        }
        let entries = watches.entries.lock();
        assert!(entries.users.len() <= 2 * MIN_SWEEP && entries.tenants.len() <= 2 * MIN_SWEEP);
        drop(entries);
        let _open = ann.open().unwrap();
        assert_eq!(watches.of("acme", "ann").open.load(Ordering::Relaxed), 1);
    }
}
