//! How much tenants and users may use, and how much of it they do use.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::RwLock;

/// What is limited for each tenant or each user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TenantLimit {
    /// Submissions a second of a tenant.
    SubmissionsPerTenant,
    /// Submissions a second of a user.
    SubmissionsPerUser,
    /// Requests of a tenant that are queued.
    QueuedPerTenant,
    /// Requests of a user that are queued.
    QueuedPerUser,
    /// Open watches of a tenant.
    WatchesPerTenant,
    /// Open watches of a user.
    WatchesPerUser,
    /// Bytes of a tenant in the store.
    StoredBytesPerTenant,
}

impl TenantLimit {
    /// Every limit.
    pub const ALL: [Self; 7] = [
        Self::SubmissionsPerTenant,
        Self::SubmissionsPerUser,
        Self::QueuedPerTenant,
        Self::QueuedPerUser,
        Self::WatchesPerTenant,
        Self::WatchesPerUser,
        Self::StoredBytesPerTenant,
    ];

    /// The option that sets it.
    #[must_use]
    pub const fn option(self) -> &'static str {
        match self {
            Self::SubmissionsPerTenant => "limits.submissions_per_second_per_tenant",
            Self::SubmissionsPerUser => "limits.submissions_per_second_per_user",
            Self::QueuedPerTenant => "limits.queued_requests_per_tenant",
            Self::QueuedPerUser => "limits.queued_requests_per_user",
            Self::WatchesPerTenant => "limits.watches_per_tenant",
            Self::WatchesPerUser => "limits.watches_per_user",
            Self::StoredBytesPerTenant => "limits.stored_bytes_per_tenant",
        }
    }
}

/// The limits of one tenant and of each of its users. 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantLimits([u64; TenantLimit::ALL.len()]);

impl TenantLimits {
    /// Takes each limit from `limit`.
    #[must_use]
    pub fn new(limit: impl Fn(TenantLimit) -> u64) -> Self {
        Self(TenantLimit::ALL.map(limit))
    }

    /// One of them; 0 means no limit.
    #[must_use]
    pub const fn get(&self, limit: TenantLimit) -> u64 {
        self.0[limit as usize]
    }
}

/// The limits of all tenants, which can be replaced while the server runs. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct LimitsByTenant(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    table: RwLock<Table>,
    highest_use: [HighestUse; TenantLimit::ALL.len()],
}

#[derive(Debug, Default)]
struct Table {
    common: TenantLimits,
    of_tenants: HashMap<String, TenantLimits>,
}

/// The highest share of a limit that was used, in millionths: since the last rotation, and before it.
#[derive(Debug, Default)]
struct HighestUse {
    current: AtomicU64,
    previous: AtomicU64,
}

const MILLION: u64 = 1_000_000;

impl LimitsByTenant {
    /// `common` for all but the tenants that have limits of their own.
    #[must_use]
    pub fn new(common: TenantLimits, of_tenants: HashMap<String, TenantLimits>) -> Self {
        let limits = Self::default();
        limits.replace(common, of_tenants);
        limits
    }

    /// Sets all of them anew.
    pub fn replace(&self, common: TenantLimits, of_tenants: HashMap<String, TenantLimits>) {
        *self.0.table.write() = Table { common, of_tenants };
    }

    /// Those of one tenant and its users.
    #[must_use]
    pub fn of(&self, tenant: &str) -> TenantLimits {
        let table = self.0.table.read();
        *table.of_tenants.get(tenant).unwrap_or(&table.common)
    }

    /// Notes that a tenant or user uses this much of a limit.
    pub fn note_use(&self, limit: TenantLimit, used: u64, of: u64) {
        let Some(share) = used.saturating_mul(MILLION).checked_div(of) else { return };
        let current = &self.0.highest_use[limit as usize].current;
        // Reading is cheaper than writing, and the highest share seldom changes.
        if share > current.load(Ordering::Relaxed) {
            current.fetch_max(share, Ordering::Relaxed);
        }
    }

    /// The highest share of a limit that a tenant or user has used between the last two calls of
    /// [`Self::rotate_use`], or since.
    #[must_use]
    pub fn highest_use(&self, limit: TenantLimit) -> f64 {
        let HighestUse { current, previous } = &self.0.highest_use[limit as usize];
        let share = current.load(Ordering::Relaxed).max(previous.load(Ordering::Relaxed));
        #[expect(clippy::cast_precision_loss, reason = "a share for people to look at")]
        let share = share as f64;
        share / 1e6
    }

    /// Forgets what was used before the last call.
    pub fn rotate_use(&self) {
        for HighestUse { current, previous } in &self.0.highest_use {
            previous.store(current.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_without_limits_of_their_own_have_the_common_ones() {
        let common = TenantLimits::new(|_| 10);
        let limits = LimitsByTenant::new(common, HashMap::new());
        let shared = limits.clone();
        assert_eq!(shared.of("acme").get(TenantLimit::QueuedPerUser), 10);
        let of_acme = TenantLimits::new(|limit| u64::from(limit == TenantLimit::WatchesPerUser));
        limits.replace(common, HashMap::from([("acme".to_owned(), of_acme)]));
        assert_eq!(shared.of("acme"), of_acme);
        assert_eq!(shared.of("globex"), common);
    }

    #[test]
    fn the_highest_use_is_forgotten_after_two_rotations() {
        let limits = LimitsByTenant::default();
        let highest = || limits.highest_use(TenantLimit::QueuedPerTenant);
        limits.note_use(TenantLimit::QueuedPerTenant, 1, 4);
        limits.note_use(TenantLimit::QueuedPerTenant, 3, 4);
        limits.note_use(TenantLimit::QueuedPerTenant, 2, 4);
        limits.note_use(TenantLimit::QueuedPerTenant, 9, 0);
        assert!((highest() - 0.75).abs() < 1e-9);
        limits.rotate_use();
        assert!((highest() - 0.75).abs() < 1e-9);
        limits.rotate_use();
        assert!(highest() < 1e-9);
    }
}
