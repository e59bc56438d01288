//! Submission rate limits of tenants and users.
//!
//! Each router admits its share of a limit: an equal part, or the part that the other routers do not use,
//! whichever is larger. Routers report to each other once a second how much they admitted.

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
};
use streamer_rpc::status;
use tokio::time::sleep;
use tonic::Status;

pub(crate) use reports::exchange_reports;
pub use reports::{AdmissionApi, PeerRouters};

/// Maximum number of tenants, and of users, whose rates are tracked. An evicted one restarts with a full burst.
const MAX_TRACKED: usize = 100_000;
/// Burst size, in seconds of the rate.
const BURST_SECONDS: u32 = 2;
/// The highest count that another router has reported is valid for this long, so that recurring bursts do not get
/// the whole rate at each router each time.
const REPORT_TTL: Duration = Duration::from_secs(10);
/// A count of at most the share of a router divided by this is not reported.
const REPORT_DIVISOR: u64 = 8;

type Entries = Cache<RateKey, Arc<Mutex<Entry>>>;

/// A user, or a tenant as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RateKey {
    tenant: String,
    /// Empty for the tenant as a whole: no user has an empty name.
    user: String,
}

/// Rates at which tenants and users submit, over all APIs.
pub(crate) struct SubmissionRates {
    limits: LimitsByTenant,
    tenants: Entries,
    users: Entries,
    /// Healthy routers, including this one.
    routers: AtomicU32,
    /// Entries with submissions admitted since the last report; empty if there is only one router.
    active: Mutex<Vec<(RateKey, Arc<Mutex<Entry>>)>>,
}

/// Rate of one user or tenant.
#[derive(Debug)]
struct Entry {
    limiter: RateLimiter,
    /// Admitted since the last report.
    admitted: u32,
    reports: Vec<Report>,
}

/// The highest recent count of a different router, admitted in a second.
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

    /// Returns how many submissions of `limit` per second this router may admit.
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

    /// Waits until one more submission is admitted, for batch operations on behalf of a caller.
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
        // The user first: a submission rejected there does not consume the tenant's rate.
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
        let per_second = u32::try_from(limits.get(limit)).unwrap_or(u32::MAX);
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

    /// Records the count of a different router for a user, or for a tenant if `user` is empty.
    fn record_report(&self, router: &Arc<str>, name: &RateKey, count: u32, now: Timestamp) {
        let entries = if name.user.is_empty() { &self.tenants } else { &self.users };
        get_or_create(entries, name).lock().record_report(router, count, now);
    }

    /// Returns and resets the counts since the last call, without those that are a small part of a limit.
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

/// Returns the entry of this name; creates a missing one.
fn get_or_create(entries: &Entries, name: &RateKey) -> Arc<Mutex<Entry>> {
    let new = || Ok::<_, Infallible>(Arc::new(Mutex::new(Entry::new())));
    match entries.get_or_insert_with(name, new) {
        Ok(entry) => entry,
        Err(never) => match never {},
    }
}

/// A submission that exceeds a rate.
struct Excess {
    limit: TenantLimit,
    per_second: u32,
    /// The part of `per_second` of this router.
    share: u32,
    wait: Duration,
}

#[cfg(test)]
mod tests;
