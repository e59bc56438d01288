//! How many submissions a second a tenant and a user may make.

use std::{convert::Infallible, sync::Arc, time::Duration};

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use streamer_auth::Principal;
use streamer_core::{
    Clock, LimitsByTenant, RateLimiter, RequestError, TenantLimit, TenantLimits, Timestamp,
};
use streamer_rpc::status;
use tokio::time::sleep;
use tonic::Status;

/// Tenants, and users, whose rates are known at most; one that is forgotten begins anew.
const MAX_KNOWN: usize = 100_000;
/// Submissions at once: as many as are allowed in this many seconds.
const BURST_SECONDS: u32 = 2;

type Limiters = Cache<String, Arc<Mutex<RateLimiter>>>;

/// The rates at which tenants and users submit, whichever way their submissions come.
pub(crate) struct SubmissionRates {
    limits: LimitsByTenant,
    tenants: Limiters,
    users: Limiters,
}

impl SubmissionRates {
    pub(crate) fn new(limits: LimitsByTenant) -> Self {
        Self { limits, tenants: Cache::new(MAX_KNOWN), users: Cache::new(MAX_KNOWN) }
    }

    /// Waits until one more submission is admitted, for work that is done for its caller in a loop.
    pub(crate) async fn wait(&self, principal: &Principal, clock: &dyn Clock) {
        while let Err(excess) = self.try_admit(principal, clock.now()) {
            sleep(excess.wait).await;
        }
    }

    /// Admits one more submission, or names the option that bounds them and when to retry.
    pub(crate) fn admit(&self, principal: &Principal, now: Timestamp) -> Result<(), Status> {
        self.try_admit(principal, now).map_err(|Excess { limit, per_second, wait }| {
            let message = format!("more than {per_second} submissions a second");
            status(&RequestError::limited(limit.option(), &message, Some(wait)))
        })
    }

    fn try_admit(&self, principal: &Principal, now: Timestamp) -> Result<(), Excess> {
        let Principal { tenant, user, .. } = principal;
        let limits = self.limits.of(tenant);
        // The user first: what is refused there takes nothing of the tenant's. Neither name has control
        // characters.
        let user = || format!("{tenant}\n{user}");
        self.admit_by(&self.users, user, limits, TenantLimit::SubmissionsPerUser, now)?;
        let tenant = || tenant.clone();
        self.admit_by(&self.tenants, tenant, limits, TenantLimit::SubmissionsPerTenant, now)
    }

    fn admit_by(
        &self,
        limiters: &Limiters,
        name: impl FnOnce() -> String,
        limits: TenantLimits,
        limit: TenantLimit,
        now: Timestamp,
    ) -> Result<(), Excess> {
        let per_second = u32::try_from(limits.get(limit)).unwrap_or(u32::MAX);
        if per_second == 0 {
            return Ok(());
        }
        let burst = per_second.saturating_mul(BURST_SECONDS);
        let new = || Ok::<_, Infallible>(Arc::new(Mutex::new(RateLimiter::new(per_second, burst))));
        let limiter = match limiters.get_or_insert_with(name().as_str(), new) {
            Ok(limiter) => limiter,
            Err(never) => match never {},
        };
        let mut limiter = limiter.lock();
        // The limits may have been replaced.
        limiter.set_rate(per_second, burst);
        let admitted = limiter.admit(now);
        let (used, of) = limiter.used_of_burst(now);
        self.limits.note_use(limit, used, of);
        admitted.map_err(|wait| Excess { limit, per_second, wait })
    }
}

/// A submission beyond a rate.
struct Excess {
    limit: TenantLimit,
    per_second: u32,
    wait: Duration,
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;

    fn principal(tenant: &str, user: &str) -> Principal {
        Principal {
            tenant: tenant.into(),
            user: user.into(),
            permissions: Vec::new(),
            expires_at: Timestamp::default(),
        }
    }

    fn limits(of_tenant: u64, of_user: u64) -> TenantLimits {
        TenantLimits::new(|limit| match limit {
            TenantLimit::SubmissionsPerTenant => of_tenant,
            TenantLimit::SubmissionsPerUser => of_user,
            _ => 0,
        })
    }

    #[test]
    fn users_and_tenants_have_rates_of_their_own() {
        let by_tenant = LimitsByTenant::new(limits(3, 2), HashMap::new());
        let rates = SubmissionRates::new(by_tenant.clone());
        let at = Timestamp::from_millis;
        let admitted_at = |millis, tenant, user| {
            (0..10).filter(|_| rates.admit(&principal(tenant, user), at(millis)).is_ok()).count()
        };
        let admitted = |tenant, user| admitted_at(0, tenant, user);
        assert_eq!(admitted("acme", "ann"), 4);
        assert_eq!(admitted("acme", "bob"), 2, "what is left of the tenant");
        assert_eq!(admitted("globex", "ann"), 4);
        let refused = rates.admit(&principal("acme", "ann"), at(0)).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.message().contains("limits.submissions_per_second_per_user"));
        assert!(refused.get_details_retry_info().is_some());
        assert!(rates.admit(&principal("acme", "ann"), at(1000)).is_ok());
        let of_acme = HashMap::from([("acme".to_owned(), limits(1000, 500))]);
        by_tenant.replace(limits(3, 2), of_acme);
        assert_eq!(admitted_at(3000, "acme", "bob"), 10);
        assert_eq!(admitted_at(3000, "globex", "ann"), 4);
    }

    #[test]
    fn zero_means_no_limit() {
        let rates = SubmissionRates::new(LimitsByTenant::default());
        let admit = || rates.admit(&principal("acme", "ann"), Timestamp::default()).is_ok();
        assert!((0..100_000).all(|_| admit()));
    }
}
