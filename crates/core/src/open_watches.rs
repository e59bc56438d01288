//! How many watches tenants and users have open.

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

/// Unused entries are removed when there are twice as many entries as after the last removal, and at least this
/// many.
const MIN_SWEEP: usize = 64;

/// How long a caller that has too many should wait. Those of a connection that broke off may count for a while.
const PAUSE: Duration = Duration::from_secs(1);

/// Counts watches in this process.
#[derive(Debug)]
pub struct OpenWatches {
    limits: LimitsByTenant,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    tenants: HashMap<Arc<str>, Weak<OfTenant>>,
    users: HashMap<(Arc<str>, Arc<str>), Weak<WatchesOfUser>>,
    sweep_at: usize,
}

#[derive(Debug)]
struct OfTenant {
    name: Arc<str>,
    open: AtomicU64,
}

/// The watches of one user.
#[derive(Debug)]
pub struct WatchesOfUser {
    limits: LimitsByTenant,
    tenant: Arc<OfTenant>,
    open: AtomicU64,
}

/// A watch that counts as open until this is dropped.
#[derive(Debug)]
pub struct OpenWatch(Arc<WatchesOfUser>);

impl OpenWatches {
    /// Makes the counts, all zero.
    #[must_use]
    pub fn new(limits: LimitsByTenant) -> Self {
        Self { limits, entries: Mutex::default() }
    }

    /// Returns the watches of one user.
    #[must_use]
    pub fn of(&self, tenant: &str, user: &str) -> Arc<WatchesOfUser> {
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
        let known = entries.tenants.get(&tenant).and_then(Weak::upgrade);
        let of_tenant = known.unwrap_or_else(|| {
            let made = Arc::new(OfTenant { name: tenant.clone(), open: AtomicU64::new(0) });
            entries.tenants.insert(tenant, Arc::downgrade(&made));
            made
        });
        let limits = self.limits.clone();
        let made = Arc::new(WatchesOfUser { limits, tenant: of_tenant, open: AtomicU64::new(0) });
        entries.users.insert(key, Arc::downgrade(&made));
        made
    }
}

impl WatchesOfUser {
    /// Opens one more, if the limits allow it.
    ///
    /// # Errors
    /// `RATE_LIMITED` with the option that limits them.
    pub fn open(self: &Arc<Self>) -> Result<OpenWatch, RequestError> {
        // From here on it is counted, and its end takes it back.
        let watch = OpenWatch(self.clone());
        let of_user = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        let of_tenant = self.tenant.open.fetch_add(1, Ordering::Relaxed) + 1;
        let limits = self.limits.of(&self.tenant.name);
        for (limit, open, whose) in [
            (TenantLimit::WatchesPerUser, of_user, "user"),
            (TenantLimit::WatchesPerTenant, of_tenant, "tenant"),
        ] {
            let allowed = limits.get(limit);
            self.limits.note_use(limit, open.min(allowed), allowed);
            if allowed > 0 && open > allowed {
                let message = format!("more than {allowed} open watches of one {whose}");
                return Err(RequestError::limited(limit.option(), &message, Some(PAUSE)));
            }
        }
        Ok(watch)
    }
}

impl Drop for OpenWatch {
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
    fn users_and_tenants_have_limits_of_their_own() {
        let watches = watches();
        let ann = watches.of("acme", "ann");
        let first = ann.open().unwrap();
        let second = watches.of("acme", "ann").open().unwrap();
        let refused = ann.open().unwrap_err();
        assert!(refused.message.contains("limits.watches_per_user"), "{refused}");
        let bob = watches.of("acme", "bob");
        let third = bob.open().unwrap();
        let refused = bob.open().unwrap_err();
        assert!(refused.message.contains("limits.watches_per_tenant"), "{refused}");
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
