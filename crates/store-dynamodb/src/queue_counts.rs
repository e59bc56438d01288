//! Counts of the queued requests of tenants and users, and decisions about submissions. `quota.rs` reads the counts.

use std::{
    collections::{BTreeSet, HashMap},
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use quick_cache::sync::Cache;
use streamer_core::TenantLimit;
use streamer_store::{Owner, Quota, QuotaUsage, StoreError};
use streamer_telemetry::Metrics;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Maximum number of cached tenants. After an eviction, submissions are counted from zero.
const MAX_TENANTS: usize = 10_000;
/// Maximum number of cached users. After an eviction, submissions are counted from zero.
const MAX_USERS: usize = 100_000;
/// Divisor of the remaining quota of a tenant or user. The tenant is counted again when this process has submitted more
/// requests than the quotient.
const RECOUNT_DIVISOR: u64 = 8;
/// Divisor of the limit of a user. A count stores only the users with more requests than the quotient.
const MIN_USER_DIVISOR: u64 = 16;
/// Lower bound of the interval between the starts of two counts of a tenant.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// Factor by which the duration of a count is multiplied to obtain the interval between the starts of two counts.
const INTERVAL_FACTOR: u32 = 20;
/// Factor used instead of [`INTERVAL_FACTOR`] when a submission would be rejected only because of submissions of this
/// process since the last count, which may have left the queue.
const DOUBTFUL_INTERVAL_FACTOR: u32 = 2;
/// Upper bound of the interval between the starts of two counts of a tenant.
const MAX_INTERVAL: Duration = Duration::from_secs(20);
/// Interval between the starts of a failed count and the next count.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Time for which a count is valid while later counts fail.
const COUNT_LIFETIME: Duration = Duration::from_secs(60);
/// Maximum number of concurrent counts; a submission for which no permit is available leaves the count to a later
/// submission.
const MAX_COUNTS: usize = 4;
/// Minimum interval between log messages about failed counts.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Counts of the queues of tenants.
pub(crate) struct QueueCounts {
    /// Counts of tenants, by name.
    tenants: Cache<String, Arc<Mutex<TenantCount>>>,
    /// Counts of users; the key consists of the tenant and the user, separated by a control character.
    users: Cache<String, Arc<Mutex<UserCount>>>,
    counts: Arc<Semaphore>,
    failed: Counter,
    logged_at: Mutex<Option<Instant>>,
}

impl QueueCounts {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            tenants: Cache::new(MAX_TENANTS),
            users: Cache::new(MAX_USERS),
            counts: Arc::new(Semaphore::new(MAX_COUNTS)),
            failed: metrics.counter(
                "streamer_dynamodb_failed_queue_counts",
                "Failed counts of a tenant's queue, which leave its limits partly enforced",
            ),
            logged_at: Mutex::default(),
        }
    }

    pub(crate) fn of_tenant(&self, tenant: &str) -> Arc<Mutex<TenantCount>> {
        entry(&self.tenants, tenant)
    }

    pub(crate) fn of_user(&self, owner: &Owner) -> Arc<Mutex<UserCount>> {
        entry(&self.users, &format!("{}\n{}", owner.tenant, owner.user))
    }

    /// Returns a permit for one more concurrent count, if one is available.
    pub(crate) fn try_acquire_permit(&self) -> Option<OwnedSemaphorePermit> {
        self.counts.clone().try_acquire_owned().ok()
    }

    pub(crate) fn record_failure(&self, error: &StoreError) {
        self.failed.inc();
        let now = Instant::now();
        let mut logged_at = self.logged_at.lock();
        if logged_at.is_none_or(|at| now - at >= LOG_INTERVAL) {
            *logged_at = Some(now);
            tracing::warn!(
                %error,
                "failed to count a tenant's queue; its limits are only partly enforced"
            );
        }
    }
}

/// Maximum number of actions of a tenant whose queues are counted. Beyond it, the action that sorts first is not counted
/// until a request for it is submitted again.
const MAX_ACTIONS: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct TenantCount {
    /// Actions for which requests were submitted in this process.
    actions: BTreeSet<String>,
    /// Number of requests in the last count.
    counted: u64,
    /// Number of requests in the last count of each user with many requests.
    by_user: HashMap<String, u64>,
    /// Number of requests submitted in this process since the last count started.
    added: u64,
    /// While a count is in progress: number of requests submitted in this process between the start of the previous
    /// count and the start of this count.
    uncounted: u64,
    is_counting: bool,
    /// Whether the last count failed. Until a count succeeds, nothing is rejected because of submissions of this
    /// process, which may have left the queue long ago.
    has_failed: bool,
    /// Time at which the last successful count started.
    counted_at: Option<Instant>,
    /// Number of counts that were started.
    generation: u64,
    /// Time at which the last finished count started, and its duration.
    last_count: Option<(Instant, Duration)>,
}

#[derive(Debug, Default)]
pub(crate) struct UserCount {
    generation: u64,
    /// Number of requests submitted in this process in the current generation.
    added: u64,
    /// Number of requests submitted in this process in the previous generation.
    added_before: u64,
}

/// Decision about a submission.
#[derive(Debug, PartialEq)]
pub(crate) struct Decision {
    pub(crate) outcome: Result<QuotaUsage, TenantLimit>,
    /// Whether the tenant must be counted.
    pub(crate) count: bool,
}

impl TenantCount {
    /// Admits and counts one more request of a user, if the quota allows it.
    pub(crate) fn admit(
        &mut self,
        user_name: &str,
        user: &mut UserCount,
        quota: &Quota,
        now: Instant,
    ) -> Decision {
        user.advance_to(self.generation, self.is_counting);
        let counted = QuotaUsage {
            queued_of_tenant: self.counted + 1,
            queued_of_user: self.by_user.get(user_name).copied().unwrap_or_default() + 1,
            stored_bytes_of_tenant: 0,
        };
        let uncounted_of_user = user.added + if self.is_counting { user.added_before } else { 0 };
        let used = QuotaUsage {
            queued_of_tenant: counted.queued_of_tenant + self.uncounted + self.added,
            queued_of_user: counted.queued_of_user + uncounted_of_user,
            ..counted
        };
        let exceeded = quota.exceeded_by(used);
        let rejected = if self.has_failed {
            let is_recent = self.counted_at.is_some_and(|at| now - at < COUNT_LIFETIME);
            quota.exceeded_by(counted).filter(|_| is_recent)
        } else {
            exceeded
        };
        let outcome = rejected.map_or(Ok(used), Err);
        if outcome.is_ok() {
            self.added += 1;
            user.added += 1;
        }
        let has_grown = |added: u64, counted: u64, limit: u64| {
            limit > 0 && added > limit.saturating_sub(counted) / RECOUNT_DIVISOR
        };
        let needs_count = self.generation == 0
            || self.has_failed
            || exceeded.is_some()
            || has_grown(self.added, counted.queued_of_tenant - 1, quota.queued_of_tenant)
            || has_grown(user.added, counted.queued_of_user - 1, quota.queued_of_user);
        let is_doubtful = exceeded.is_some() && quota.exceeded_by(counted).is_none();
        let count = needs_count && !self.is_counting && self.is_due(is_doubtful, now);
        Decision { outcome, count }
    }

    fn is_due(&self, is_doubtful: bool, now: Instant) -> bool {
        let Some((began, took)) = self.last_count else { return true };
        let times = if is_doubtful { DOUBTFUL_INTERVAL_FACTOR } else { INTERVAL_FACTOR };
        let interval = if self.has_failed {
            RETRY_INTERVAL
        } else {
            took.saturating_mul(times).clamp(MIN_INTERVAL, MAX_INTERVAL)
        };
        // Other tenants also need the permits.
        now.saturating_duration_since(began) >= interval.max(took.saturating_mul(2))
    }

    /// Adds an action whose queue is counted from now on.
    pub(crate) fn add_action(&mut self, action: &str) {
        if self.actions.contains(action) {
            return;
        }
        if self.actions.len() >= MAX_ACTIONS {
            self.actions.pop_first();
        }
        self.actions.insert(action.to_owned());
    }

    /// Returns the actions whose queues are counted.
    pub(crate) fn actions(&self) -> Vec<String> {
        self.actions.iter().cloned().collect()
    }

    pub(crate) fn begin(&mut self) {
        self.is_counting = true;
        self.generation += 1;
        self.uncounted = std::mem::take(&mut self.added);
    }

    /// Records a count that lasted from `began` to `now`.
    pub(crate) fn finish(
        &mut self,
        counted: Option<HashMap<String, u64>>,
        quota: &Quota,
        began: Instant,
        now: Instant,
    ) {
        self.is_counting = false;
        self.has_failed = counted.is_none();
        self.last_count = Some((began, now.saturating_duration_since(began)));
        let uncounted = std::mem::take(&mut self.uncounted);
        let Some(mut by_user) = counted else {
            self.added += uncounted;
            return;
        };
        self.counted = by_user.values().sum();
        self.counted_at = Some(began);
        let least = quota.queued_of_user / MIN_USER_DIVISOR;
        by_user.retain(|_, count| quota.queued_of_user > 0 && *count > least);
        self.by_user = by_user;
    }
}

impl UserCount {
    fn advance_to(&mut self, generation: u64, is_counting: bool) {
        if self.generation == generation {
            return;
        }
        let is_next = self.generation + 1 == generation;
        self.added_before = if is_next && is_counting { self.added } else { 0 };
        self.added = 0;
        self.generation = generation;
    }
}

/// Returns the entry with the given name, and creates it if it does not exist.
fn entry<T: Default>(cache: &Cache<String, Arc<Mutex<T>>>, name: &str) -> Arc<Mutex<T>> {
    match cache.get_or_insert_with(name, || Ok::<_, Infallible>(Arc::default())) {
        Ok(entry) => entry,
        Err(never) => match never {},
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUOTA: Quota =
        Quota { queued_of_tenant: 80, queued_of_user: 40, stored_bytes_of_tenant: 0 };

    struct Fixture {
        tenant: TenantCount,
        users: HashMap<&'static str, UserCount>,
        now: Instant,
    }

    impl Fixture {
        fn new() -> Self {
            Self { tenant: TenantCount::default(), users: HashMap::new(), now: Instant::now() }
        }

        /// Returns a fixture whose tenant was counted once, as by the engine.
        fn counted() -> Self {
            let mut fixture = Self::new();
            assert!(fixture.admit("eve").count, "an unknown tenant is counted");
            fixture.finish(&[]);
            fixture
        }

        fn admit(&mut self, user: &'static str) -> Decision {
            let of_user = self.users.entry(user).or_default();
            let decision = self.tenant.admit(user, of_user, &QUOTA, self.now);
            if decision.count {
                self.tenant.begin();
            }
            decision
        }

        /// Submits until a count is needed; returns the number of admitted requests.
        fn admit_until_count(&mut self, user: &'static str) -> usize {
            let mut admitted = 0;
            loop {
                let Decision { outcome, count } = self.admit(user);
                admitted += usize::from(outcome.is_ok());
                if count {
                    return admitted;
                }
                assert!(admitted < 1000, "the tenant is never counted");
            }
        }

        fn finish(&mut self, counted: &[(&str, u64)]) {
            let counted = counted.iter().map(|(user, count)| ((*user).to_owned(), *count));
            self.tenant.finish(Some(counted.collect()), &QUOTA, self.now, self.now);
            self.now += MIN_INTERVAL;
        }
    }

    #[test]
    fn a_tenant_is_counted_more_often_near_a_limit() {
        let mut fixture = Fixture::counted();
        assert_eq!(fixture.admit_until_count("ann"), 6);
        fixture.finish(&[("ann", 6)]);
        assert_eq!(fixture.admit_until_count("ann"), 5);
        fixture.finish(&[("ann", 37), ("bob", 1)]);
        assert_eq!(fixture.admit_until_count("ann"), 1);
        fixture.finish(&[("ann", 38)]);
        // The requests have left the queue meanwhile.
        assert_eq!(fixture.admit_until_count("bob"), 6);
        fixture.finish(&[]);
        assert_eq!(fixture.admit_until_count("ann"), 6);
    }

    #[test]
    fn submissions_during_a_count_are_included() {
        let mut fixture = Fixture::counted();
        assert_eq!(fixture.admit_until_count("ann"), 6);
        let admitted = (0..100).filter(|_| fixture.admit("ann").outcome.is_ok()).count();
        assert_eq!(admitted, 34);
        assert_eq!(fixture.admit("ann").outcome, Err(TenantLimit::QueuedPerUser));
        let admitted = (0..100).filter(|_| fixture.admit("bob").outcome.is_ok()).count();
        assert_eq!(admitted, 40);
        assert_eq!(fixture.admit("eve").outcome, Err(TenantLimit::QueuedPerTenant));
        // The count does not include submissions after its start.
        fixture.finish(&[("ann", 6)]);
        assert_eq!(fixture.admit("eve").outcome, Err(TenantLimit::QueuedPerTenant));
        fixture.finish(&[]);
        assert!(fixture.admit("eve").outcome.is_ok());
    }

    #[test]
    fn while_counts_fail_only_the_last_successful_one_rejects() {
        let mut fixture = Fixture::counted();
        fixture.admit_until_count("ann");
        fixture.tenant.finish(None, &QUOTA, fixture.now, fixture.now);
        let admitted = (0..100).filter(|_| fixture.admit("ann").outcome.is_ok()).count();
        assert_eq!(admitted, 100);
        assert!(!fixture.tenant.is_counting, "the count is not repeated at once");
        fixture.now += RETRY_INTERVAL;
        assert!(fixture.admit("ann").count);
        fixture.finish(&[("ann", 40)]);
        let rejected = Err(TenantLimit::QueuedPerUser);
        assert_eq!(fixture.admit("ann").outcome, rejected);
        // A count that shows a full queue is valid for a while.
        fixture.tenant.finish(None, &QUOTA, fixture.now, fixture.now);
        assert_eq!(fixture.admit("ann").outcome, rejected);
        assert!(fixture.admit("bob").outcome.is_ok());
        fixture.now += COUNT_LIFETIME;
        assert!(fixture.admit("ann").outcome.is_ok());
    }

    #[test]
    fn a_slow_count_is_repeated_early_when_the_rejection_is_doubtful() {
        let is_repeated = |counted: u64| {
            let mut fixture = Fixture::counted();
            fixture.admit_until_count("ann");
            let (began, took) = (fixture.now, Duration::from_millis(900));
            let counted = HashMap::from([("ann".to_owned(), counted)]);
            fixture.now += took;
            fixture.tenant.finish(Some(counted), &QUOTA, began, fixture.now);
            // The requests submitted since then have left the queue, or not.
            let rejected = (0..100).find(|_| fixture.admit("ann").outcome.is_err());
            assert!(rejected.is_some());
            fixture.now += took;
            fixture.admit("ann").count
        };
        assert!(is_repeated(0));
        assert!(!is_repeated(40));
    }
}
