//! How many submissions a second a tenant and a user may make.

use std::{convert::Infallible, sync::Arc, time::Duration};

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use streamer_auth::Principal;
use streamer_core::{Clock, RateLimiter, RequestError, Timestamp};
use streamer_rpc::status;
use tokio::time::sleep;
use tonic::Status;

/// Tenants, and users, whose rates are known at most; one that is forgotten begins anew.
const MAX_KNOWN: usize = 100_000;
/// Submissions at once: as many as are allowed in this many seconds.
const BURST_SECONDS: u32 = 2;

/// Submissions a second; 0 means no limit.
#[derive(Clone, Copy, Debug)]
pub struct SubmissionLimits {
    /// Of one tenant (`limits.submissions_per_second_per_tenant`).
    pub of_tenant: u32,
    /// Of one user (`limits.submissions_per_second_per_user`).
    pub of_user: u32,
}

type Limiters = Cache<String, Arc<Mutex<RateLimiter>>>;

/// The rates at which tenants and users submit, whichever way their submissions come.
pub(crate) struct SubmissionRates {
    limits: SubmissionLimits,
    tenants: Limiters,
    users: Limiters,
}

impl SubmissionRates {
    pub(crate) fn new(limits: SubmissionLimits) -> Self {
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
        self.try_admit(principal, now).map_err(|Excess { option, per_second, wait }| {
            let message = format!("more than {per_second} submissions a second");
            status(&RequestError::limited(option, &message, Some(wait)))
        })
    }

    fn try_admit(&self, principal: &Principal, now: Timestamp) -> Result<(), Excess> {
        let Principal { tenant, user, .. } = principal;
        // The user first: what is refused there takes nothing of the tenant's.
        if self.limits.of_user > 0 {
            // Neither has control characters.
            let name = format!("{tenant}\n{user}");
            let option = "limits.submissions_per_second_per_user";
            admit(&self.users, &name, self.limits.of_user, now, option)?;
        }
        if self.limits.of_tenant > 0 {
            let option = "limits.submissions_per_second_per_tenant";
            admit(&self.tenants, tenant, self.limits.of_tenant, now, option)?;
        }
        Ok(())
    }
}

/// A submission beyond a rate.
struct Excess {
    option: &'static str,
    per_second: u32,
    wait: Duration,
}

fn admit(
    limiters: &Limiters,
    name: &str,
    per_second: u32,
    now: Timestamp,
    option: &'static str,
) -> Result<(), Excess> {
    let new = || {
        let burst = per_second.saturating_mul(BURST_SECONDS);
        Ok::<_, Infallible>(Arc::new(Mutex::new(RateLimiter::new(per_second, burst))))
    };
    let limiter = match limiters.get_or_insert_with(name, new) {
        Ok(limiter) => limiter,
        Err(never) => match never {},
    };
    let admitted = limiter.lock().admit(now);
    admitted.map_err(|wait| Excess { option, per_second, wait })
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn users_and_tenants_have_rates_of_their_own() {
        let rates = SubmissionRates::new(SubmissionLimits { of_tenant: 3, of_user: 2 });
        let at = Timestamp::from_millis;
        let admitted = |tenant, user, count: u32| {
            (0..count).filter(|_| rates.admit(&principal(tenant, user), at(0)).is_ok()).count()
        };
        assert_eq!(admitted("acme", "ann", 10), 4);
        assert_eq!(admitted("acme", "bob", 10), 2, "what is left of the tenant");
        assert_eq!(admitted("globex", "ann", 10), 4);
        let refused = rates.admit(&principal("acme", "ann"), at(0)).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.message().contains("limits.submissions_per_second_per_user"));
        assert!(refused.get_details_retry_info().is_some());
        assert!(rates.admit(&principal("acme", "ann"), at(1000)).is_ok());
    }

    #[test]
    fn zero_means_no_limit() {
        let rates = SubmissionRates::new(SubmissionLimits { of_tenant: 0, of_user: 0 });
        let admit = || rates.admit(&principal("acme", "ann"), Timestamp::default()).is_ok();
        assert!((0..100_000).all(|_| admit()));
    }
}
