//! Limits of tenants and users, and their usage.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::RwLock;

/// Limit that applies to each tenant or each user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TenantLimit {
    /// Maximum number of submissions per second of a tenant.
    SubmissionsPerTenant,
    /// Maximum number of submissions per second of a user.
    SubmissionsPerUser,
    /// Maximum number of queued requests of a tenant.
    QueuedPerTenant,
    /// Maximum number of queued requests of a user.
    QueuedPerUser,
    /// Maximum number of open watches of a tenant.
    WatchesPerTenant,
    /// Maximum number of open watches of a user.
    WatchesPerUser,
    /// Maximum number of stored bytes of a tenant.
    StoredBytesPerTenant,
}

impl TenantLimit {
    /// All limits.
    pub const ALL: [Self; 7] = [
        Self::SubmissionsPerTenant,
        Self::SubmissionsPerUser,
        Self::QueuedPerTenant,
        Self::QueuedPerUser,
        Self::WatchesPerTenant,
        Self::WatchesPerUser,
        Self::StoredBytesPerTenant,
    ];

    /// Returns the name of the option that sets the limit.
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

/// Limits of one tenant and of each of its users. 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantLimits([u64; TenantLimit::ALL.len()]);

impl TenantLimits {
    /// Creates limits with the values that `limit` returns.
    #[must_use]
    pub fn new(limit: impl Fn(TenantLimit) -> u64) -> Self {
        Self(TenantLimit::ALL.map(limit))
    }

    /// Returns the value of a limit; 0 means no limit.
    #[must_use]
    pub const fn get(&self, limit: TenantLimit) -> u64 {
        self.0[limit as usize]
    }
}

/// Limits of all tenants. The limits can be replaced while the server runs. Clones share the limits.
#[derive(Clone, Debug, Default)]
pub struct LimitsByTenant(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    table: RwLock<Table>,
    highest_usage: [HighestUse; TenantLimit::ALL.len()],
}

#[derive(Debug, Default)]
struct Table {
    default: TenantLimits,
    overrides: HashMap<String, TenantLimits>,
}

/// Highest share of a limit that a tenant or user has used, in millionths of the limit.
#[derive(Debug, Default)]
struct HighestUse {
    /// Highest share since the last rotation.
    current: AtomicU64,
    /// Highest share in the interval before the last rotation.
    previous: AtomicU64,
}

const MILLION: u64 = 1_000_000;

impl LimitsByTenant {
    /// Creates limits that apply `default` to the tenants that are not in `overrides`.
    #[must_use]
    pub fn new(default: TenantLimits, overrides: HashMap<String, TenantLimits>) -> Self {
        let limits = Self::default();
        limits.replace(default, overrides);
        limits
    }

    /// Replaces the limits of all tenants.
    pub fn replace(&self, default: TenantLimits, overrides: HashMap<String, TenantLimits>) {
        *self.0.table.write() = Table { default, overrides };
    }

    /// Returns the limits of the given tenant and its users.
    #[must_use]
    pub fn of(&self, tenant: &str) -> TenantLimits {
        let table = self.0.table.read();
        *table.overrides.get(tenant).unwrap_or(&table.default)
    }

    /// Records that a tenant or user uses `used` of `limit`, whose value is `of`.
    pub fn record_usage(&self, limit: TenantLimit, used: u64, of: u64) {
        let Some(share) = used.saturating_mul(MILLION).checked_div(of) else { return };
        let current = &self.0.highest_usage[limit as usize].current;
        // A read is cheaper than a write, and the highest share rarely changes.
        if share > current.load(Ordering::Relaxed) {
            current.fetch_max(share, Ordering::Relaxed);
        }
    }

    /// Returns the highest share of a limit that a tenant or user has used since the second-to-last call of
    /// [`Self::rotate_use`].
    #[must_use]
    pub fn highest_usage(&self, limit: TenantLimit) -> f64 {
        let HighestUse { current, previous } = &self.0.highest_usage[limit as usize];
        let share = current.load(Ordering::Relaxed).max(previous.load(Ordering::Relaxed));
        #[expect(clippy::cast_precision_loss, reason = "a share for display")]
        let share = share as f64;
        share / 1e6
    }

    /// Discards the usage that was recorded before the previous call.
    pub fn rotate_use(&self) {
        for HighestUse { current, previous } in &self.0.highest_usage {
            previous.store(current.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_without_overrides_have_the_default_limits() {
        let default = TenantLimits::new(|_| 10);
        let limits = LimitsByTenant::new(default, HashMap::new());
        let shared = limits.clone();
        assert_eq!(shared.of("acme").get(TenantLimit::QueuedPerUser), 10);
        let overridden = TenantLimits::new(|limit| u64::from(limit == TenantLimit::WatchesPerUser));
        limits.replace(default, HashMap::from([("acme".to_owned(), overridden)]));
        assert_eq!(shared.of("acme"), overridden);
        assert_eq!(shared.of("globex"), default);
    }

    #[test]
    fn the_highest_use_is_discarded_after_two_rotations() {
        let limits = LimitsByTenant::default();
        let highest = || limits.highest_usage(TenantLimit::QueuedPerTenant);
        limits.record_usage(TenantLimit::QueuedPerTenant, 1, 4);
        limits.record_usage(TenantLimit::QueuedPerTenant, 3, 4);
        limits.record_usage(TenantLimit::QueuedPerTenant, 2, 4);
        limits.record_usage(TenantLimit::QueuedPerTenant, 9, 0);
        assert!((highest() - 0.75).abs() < 1e-9);
        limits.rotate_use();
        assert!((highest() - 0.75).abs() < 1e-9);
        limits.rotate_use();
        assert!(highest() < 1e-9);
    }
}
