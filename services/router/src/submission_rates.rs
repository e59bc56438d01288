//! How many submissions a second a tenant and a user may make.
//!
//! Each router admits its share of what a limit allows: an equal part, or what the other routers leave free,
//! whichever is more. They report to each other once a second what they admitted.

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

pub(crate) use reports::exchange;
pub use reports::{AdmissionApi, OtherRouters};

/// Tenants, and users, whose rates are known at most; one that is forgotten begins anew.
const MAX_KNOWN: usize = 100_000;
/// Submissions at once: as many as are allowed in this many seconds.
const BURST_SECONDS: u32 = 2;
/// The most that another router has reported counts for this long, so that floods which come in pulses do not get
/// the whole rate at each router again and again.
const REPORT_LIFE: Duration = Duration::from_secs(10);
/// Less than this part of a router's share is not reported.
const REPORTED_PART: u64 = 8;

type Entries = Cache<Name, Arc<Mutex<Entry>>>;

/// A user, or a tenant as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Name {
    tenant: String,
    /// Empty for the tenant as a whole: no user has an empty name.
    user: String,
}

/// The rates at which tenants and users submit, whichever way their submissions come.
pub(crate) struct SubmissionRates {
    limits: LimitsByTenant,
    tenants: Entries,
    users: Entries,
    /// Routers that are alive, with this one.
    routers: AtomicU32,
    /// Those of which something was admitted since the last report; empty where there is one router.
    active: Mutex<Vec<(Name, Arc<Mutex<Entry>>)>>,
}

/// One user, or tenant.
#[derive(Debug)]
struct Entry {
    limiter: RateLimiter,
    /// Since the last report.
    admitted: u32,
    of_others: Vec<OfOther>,
}

/// The most that another router has admitted in a second lately.
#[derive(Debug)]
struct OfOther {
    router: Arc<str>,
    count: u32,
    reported_at: Timestamp,
}

impl Entry {
    fn new() -> Self {
        Self { limiter: RateLimiter::new(0, 1), admitted: 0, of_others: Vec::new() }
    }

    /// How many submissions a second this router may admit, of `whole`.
    fn share(&mut self, whole: u32, routers: u32, now: Timestamp) -> u32 {
        self.of_others.retain(|other| now.since(other.reported_at) < REPORT_LIFE);
        let of_others = self.of_others.iter().map(|other| other.count);
        let free = whole.saturating_sub(of_others.fold(0, u32::saturating_add));
        free.max(whole.div_ceil(routers.max(1)))
    }

    fn note_other(&mut self, router: &Arc<str>, count: u32, now: Timestamp) {
        let is_over = |other: &OfOther| now.since(other.reported_at) >= REPORT_LIFE;
        self.of_others
            .retain(|other| other.router != *router || (other.count > count && !is_over(other)));
        if self.of_others.iter().all(|other| other.router != *router) {
            self.of_others.push(OfOther { router: router.clone(), count, reported_at: now });
        }
    }
}

impl SubmissionRates {
    pub(crate) fn new(limits: LimitsByTenant) -> Self {
        Self {
            limits,
            tenants: Cache::new(MAX_KNOWN),
            users: Cache::new(MAX_KNOWN),
            routers: AtomicU32::new(1),
            active: Mutex::default(),
        }
    }

    /// Waits until one more submission is admitted, for work that is done for its caller in a loop.
    pub(crate) async fn wait(&self, principal: &Principal, clock: &dyn Clock) {
        while let Err(excess) = self.try_admit(principal, clock.now()) {
            sleep(excess.wait).await;
        }
    }

    /// Admits one more submission, or names the option that bounds them and when to retry.
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
        // The user first: what is refused there takes nothing of the tenant's.
        for (entries, user, limit) in [
            (&self.users, user.as_str(), TenantLimit::SubmissionsPerUser),
            (&self.tenants, "", TenantLimit::SubmissionsPerTenant),
        ] {
            if limits.get(limit) > 0 {
                let name = Name { tenant: tenant.clone(), user: user.to_owned() };
                self.admit_by(entries, name, limits, limit, now)?;
            }
        }
        Ok(())
    }

    fn admit_by(
        &self,
        entries: &Entries,
        name: Name,
        limits: TenantLimits,
        limit: TenantLimit,
        now: Timestamp,
    ) -> Result<(), Excess> {
        let shared = entry(entries, &name);
        let mut entry = shared.lock();
        let per_second = u32::try_from(limits.get(limit)).unwrap_or(u32::MAX);
        let routers = self.routers.load(Ordering::Relaxed);
        let share = entry.share(per_second, routers, now);
        entry.limiter.set_rate(share, share.saturating_mul(BURST_SECONDS));
        let admitted = entry.limiter.admit(now);
        let (used, of) = entry.limiter.used_of_burst(now);
        self.limits.note_use(limit, used, of);
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

    /// Notes how many routers are alive, with this one.
    fn note_routers(&self, alive: u32) {
        self.routers.store(alive.max(1), Ordering::Relaxed);
    }

    /// Notes what another router has admitted of a user, or of a tenant if `user` is empty.
    fn note_other(&self, router: &Arc<str>, name: &Name, count: u32, now: Timestamp) {
        let entries = if name.user.is_empty() { &self.tenants } else { &self.users };
        entry(entries, name).lock().note_other(router, count, now);
    }

    /// Takes what was admitted since the last call, of those with more than a small part of a limit.
    fn take_admitted(&self) -> Vec<(Name, u32)> {
        let active = std::mem::take(&mut *self.active.lock());
        let routers = u64::from(self.routers.load(Ordering::Relaxed));
        let admitted = active.into_iter().filter_map(|(name, entry)| {
            let admitted = std::mem::take(&mut entry.lock().admitted);
            let limit = match name.user.as_str() {
                "" => TenantLimit::SubmissionsPerTenant,
                _ => TenantLimit::SubmissionsPerUser,
            };
            let whole = self.limits.of(&name.tenant).get(limit);
            let is_reported = u64::from(admitted) * routers * REPORTED_PART > whole;
            is_reported.then_some((name, admitted))
        });
        admitted.collect()
    }
}

/// The entry of this name, made if it is missing.
fn entry(entries: &Entries, name: &Name) -> Arc<Mutex<Entry>> {
    let new = || Ok::<_, Infallible>(Arc::new(Mutex::new(Entry::new())));
    match entries.get_or_insert_with(name, new) {
        Ok(entry) => entry,
        Err(never) => match never {},
    }
}

/// A submission beyond a rate.
struct Excess {
    limit: TenantLimit,
    per_second: u32,
    /// Of those, at this router.
    share: u32,
    wait: Duration,
}

#[cfg(test)]
mod tests;
