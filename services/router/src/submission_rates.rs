//! Submission rate limits of tenants and users.
//!
//! Each router admits its share of a limit: an equal part, or the part that the other routers do not use,
//! whichever is larger. Once per second, routers report to each other the number of submissions that they admitted.

mod reports;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use streamer_auth::Principal;
use streamer_core::{
    Clock, LimitsByTenant, RateLimiter, RequestError, TenantLimit, TenantLimits, Timestamp,
    saturate,
};
use streamer_rpc::status;
use tokio::time::sleep;
use tonic::Status;

pub(crate) use reports::exchange_reports;
pub use reports::{AdmissionApi, PeerRouters};

/// Maximum number of tenants, and of users, whose rates are tracked. After its eviction, a tenant or user restarts
/// with a full burst.
const MAX_TRACKED: usize = 100_000;
/// Burst size, as a multiple of the rate per second.
const BURST_SECONDS: u32 = 2;
/// Validity period of the highest count that another router has reported. The period is long enough that recurring
/// bursts do not receive the whole rate at every router each time.
const REPORT_TTL: Duration = Duration::from_secs(10);
/// Divisor of a router's share of a limit. Counts up to the quotient are not reported.
const REPORT_DIVISOR: u64 = 8;

type Entries = Cache<RateKey, Arc<Mutex<Entry>>>;

/// Key of a rate: a user, or a tenant as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RateKey {
    tenant: String,
    /// User name; empty for the tenant as a whole, because no user has an empty name.
    user: String,
}

/// Limits the rates at which tenants and users submit requests, across all APIs.
pub(crate) struct SubmissionRates {
    limits: LimitsByTenant,
    tenants: Entries,
    users: Entries,
    /// Number of healthy routers, including this one.
    routers: AtomicU32,
    /// Entries with submissions admitted since the last report; empty if there is only one router.
    active: Mutex<Vec<(RateKey, Arc<Mutex<Entry>>)>>,
}

/// Submission rate of one user or tenant.
#[derive(Debug)]
struct Entry {
    limiter: RateLimiter,
    /// Number of submissions admitted since the last report.
    admitted: u32,
    reports: Vec<Report>,
}

/// Highest recent number of submissions that a different router admitted in one second.
#[derive(Debug)]
struct Report {
    router: Arc<str>,
    count: u32,
    reported_at: Timestamp,
}

impl Entry {
    fn new() -> Self {
        Self { limiter: RateLimiter::new(0, 1), admitted: 0, reports: Vec::new() }
    }

    /// Returns the part of `limit` that this router may admit, in submissions per second.
    fn share(&mut self, limit: u32, routers: u32, now: Timestamp) -> u32 {
        self.reports.retain(|report| now.since(report.reported_at) < REPORT_TTL);
        let counts = self.reports.iter().map(|report| report.count);
        let free = limit.saturating_sub(counts.fold(0, u32::saturating_add));
        free.max(limit.div_ceil(routers.max(1)))
    }

    fn record_report(&mut self, router: &Arc<str>, count: u32, now: Timestamp) {
        let is_expired = |report: &Report| now.since(report.reported_at) >= REPORT_TTL;
        self.reports.retain(|report| {
            report.router != *router || (report.count > count && !is_expired(report))
        });
        if self.reports.iter().all(|report| report.router != *router) {
            self.reports.push(Report { router: router.clone(), count, reported_at: now });
        }
    }
}

impl SubmissionRates {
    pub(crate) fn new(limits: LimitsByTenant) -> Self {
        Self {
            limits,
            tenants: Cache::new(MAX_TRACKED),
            users: Cache::new(MAX_TRACKED),
            routers: AtomicU32::new(1),
            active: Mutex::default(),
        }
    }

    /// Waits until the limits admit one more submission. Used by batch operations on behalf of a caller.
    pub(crate) async fn wait(&self, principal: &Principal, clock: &dyn Clock) {
        while let Err(excess) = self.try_admit(principal, clock.now()) {
            sleep(excess.wait).await;
        }
    }

    /// Admits one submission, or returns a status with the exceeded limit and the retry delay.
    pub(crate) fn admit(&self, principal: &Principal, now: Timestamp) -> Result<(), Status> {
        self.try_admit(principal, now).map_err(|Excess { limit, per_second, share, wait }| {
            let message = if share < per_second {
                format!("more than {per_second} submissions a second, {share} at this router")
            } else {
                format!("more than {per_second} submissions a second")
            };
            status(&RequestError::limited(limit.option(), &message, Some(wait)))
        })
    }

    fn try_admit(&self, principal: &Principal, now: Timestamp) -> Result<(), Excess> {
        let Principal { tenant, user, .. } = principal;
        let limits = self.limits.of(tenant);
        // The user's limit comes first: a submission that exceeds it does not consume the tenant's rate.
        for (entries, user, limit) in [
            (&self.users, user.as_str(), TenantLimit::SubmissionsPerUser),
            (&self.tenants, "", TenantLimit::SubmissionsPerTenant),
        ] {
            if limits.get(limit) > 0 {
                let name = RateKey { tenant: tenant.clone(), user: user.to_owned() };
                self.admit_by(entries, name, limits, limit, now)?;
            }
        }
        Ok(())
    }

    fn admit_by(
        &self,
        entries: &Entries,
        name: RateKey,
        limits: TenantLimits,
        limit: TenantLimit,
        now: Timestamp,
    ) -> Result<(), Excess> {
        let shared = get_or_create(entries, &name);
        let mut entry = shared.lock();
        let per_second = saturate::to_u32(limits.get(limit));
        let routers = self.routers.load(Ordering::Relaxed);
        let share = entry.share(per_second, routers, now);
        entry.limiter.set_rate(share, share.saturating_mul(BURST_SECONDS));
        let admitted = entry.limiter.admit(now);
        let (used, of) = entry.limiter.used_of_burst(now);
        self.limits.record_usage(limit, used, of);
        admitted.map_err(|wait| Excess { limit, per_second, share, wait })?;
        if routers > 1 {
            entry.admitted = entry.admitted.saturating_add(1);
            if entry.admitted == 1 {
                drop(entry);
                self.active.lock().push((name, shared));
            }
        }
        Ok(())
    }

    /// Sets the number of healthy routers, including this one.
    fn set_router_count(&self, healthy: u32) {
        self.routers.store(healthy.max(1), Ordering::Relaxed);
    }

    /// Records the count that a different router reported for a user, or for a tenant if `name.user` is empty.
    fn record_report(&self, router: &Arc<str>, name: &RateKey, count: u32, now: Timestamp) {
        let entries = if name.user.is_empty() { &self.tenants } else { &self.users };
        get_or_create(entries, name).lock().record_report(router, count, now);
    }

    /// Returns and resets the counts since the last call. Omits counts that are a small part of a limit.
    fn take_admitted(&self) -> Vec<(RateKey, u32)> {
        let active = std::mem::take(&mut *self.active.lock());
        let routers = u64::from(self.routers.load(Ordering::Relaxed));
        let admitted = active.into_iter().filter_map(|(name, entry)| {
            let admitted = std::mem::take(&mut entry.lock().admitted);
            let limit = match name.user.as_str() {
                "" => TenantLimit::SubmissionsPerTenant,
                _ => TenantLimit::SubmissionsPerUser,
            };
            let limit = self.limits.of(&name.tenant).get(limit);
            let is_reported = u64::from(admitted) * routers * REPORT_DIVISOR > limit;
            is_reported.then_some((name, admitted))
        });
        admitted.collect()
    }
}

/// Returns the entry with the given name, and creates it if it does not exist.
fn get_or_create(entries: &Entries, name: &RateKey) -> Arc<Mutex<Entry>> {
    let new = || Ok::<_, Infallible>(Arc::new(Mutex::new(Entry::new())));
    match entries.get_or_insert_with(name, new) {
        Ok(entry) => entry,
        Err(never) => match never {},
    }
}

/// Describes a submission that exceeds a rate limit.
struct Excess {
    limit: TenantLimit,
    per_second: u32,
    /// This router's share of `per_second`.
    share: u32,
    wait: Duration,
}

#[cfg(test)]
mod tests;
