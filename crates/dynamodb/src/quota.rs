//! How many requests a tenant and its users have queued. No item holds these numbers, because every submission
//! would have to write it. A process counts the rows of the tenant in the queue's index, adds what it submits
//! itself, and counts again when that could reach a limit.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use aws_sdk_dynamodb::types::ReturnConsumedCapacity;
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use quick_cache::sync::Cache;
use streamer_core::TenantLimit;
use streamer_store::{Owner, Quota, QuotaUse, StoreError};
use streamer_telemetry::Metrics;
use tokio::sync::Semaphore;

use crate::{
    calls::text_of,
    client::Dynamo,
    error::store_error,
    expression::{Expression, text},
    queue::of_tenant,
};

/// Tenants, and users, that are known at most; of one that is forgotten, what it submits counts anew.
const MAX_TENANTS: usize = 10_000;
const MAX_USERS: usize = 100_000;
/// A tenant is counted when the process has submitted this part of what it may still have, for it or for a user.
const COUNTED_PART: u64 = 8;
/// Of users that have less than this part of their limit, nothing is kept.
const KEPT_PART: u64 = 16;
/// Shortest time from the beginning of one count to the next: this, and the time that the count took, multiplied:
/// by the first number, or by the second when a submission would be refused only because of what this process
/// submitted since the count, which may have left the queue.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_OF_COUNT: u32 = 20;
const INTERVAL_OF_DOUBTFUL_COUNT: u32 = 2;
const MAX_INTERVAL: Duration = Duration::from_secs(20);
/// The same after a count that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// While later counts fail, a count holds for this long.
const COUNT_LIFE: Duration = Duration::from_secs(60);
/// Counts at the same time; a submission that finds none free leaves the count to a later one.
const MAX_COUNTS: usize = 4;
/// Rows that are counted of a tenant without a limit of its own.
const MAX_COUNTED: u64 = 1_000_000;
/// Counts that fail are logged once in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// What is known of the queues of tenants.
pub(crate) struct QueueCounts {
    tenants: Cache<String, Arc<Mutex<TenantCount>>>,
    /// By tenant and user, with a control character between them.
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
                "Counts of a tenant's queued requests that failed; until one succeeds, its limits hold in part",
            ),
            logged_at: Mutex::default(),
        }
    }

    fn note_failed(&self, error: &StoreError) {
        self.failed.inc();
        let now = Instant::now();
        let mut logged_at = self.logged_at.lock();
        if logged_at.is_none_or(|at| now - at >= LOG_INTERVAL) {
            *logged_at = Some(now);
            tracing::warn!(%error, "could not count a tenant's queue, whose limits hold in part");
        }
    }
}

#[derive(Debug, Default)]
struct TenantCount {
    counted: u64,
    /// Of those that have much.
    of_users: HashMap<String, u64>,
    /// Submitted here since the last count began.
    added: u64,
    /// While it is being counted: submitted here before that, since the count before.
    uncounted: u64,
    is_counting: bool,
    /// The last count failed. Until one succeeds nothing is refused because of what this process submitted, which
    /// may have left the queue long ago.
    has_failed: bool,
    /// When the last count that succeeded began.
    counted_at: Option<Instant>,
    /// How many counts have begun.
    generation: u64,
    /// When the last count began, and how long it took.
    last_count: Option<(Instant, Duration)>,
}

#[derive(Debug, Default)]
struct UserCount {
    generation: u64,
    /// Submitted here in this generation, and in the one before.
    added: u64,
    added_before: u64,
}

/// What a submission may do.
#[derive(Debug, PartialEq)]
struct Decision {
    outcome: Result<QuotaUse, TenantLimit>,
    /// The tenant has to be counted.
    count: bool,
}

impl TenantCount {
    /// Counts one more request of a user, if the quota allows it.
    fn admit(
        &mut self,
        user_name: &str,
        user: &mut UserCount,
        quota: &Quota,
        now: Instant,
    ) -> Decision {
        user.enter(self.generation, self.is_counting);
        let counted = QuotaUse {
            queued_of_tenant: self.counted + 1,
            queued_of_user: self.of_users.get(user_name).copied().unwrap_or_default() + 1,
            stored_bytes_of_tenant: 0,
        };
        let unknown_of_user = user.added + if self.is_counting { user.added_before } else { 0 };
        let used = QuotaUse {
            queued_of_tenant: counted.queued_of_tenant + self.uncounted + self.added,
            queued_of_user: counted.queued_of_user + unknown_of_user,
            ..counted
        };
        let exceeded = quota.exceeded_by(used);
        let refused = if self.has_failed {
            let is_recent = self.counted_at.is_some_and(|at| now - at < COUNT_LIFE);
            quota.exceeded_by(counted).filter(|_| is_recent)
        } else {
            exceeded
        };
        let outcome = refused.map_or(Ok(used), Err);
        if outcome.is_ok() {
            self.added += 1;
            user.added += 1;
        }
        let is_far = |added: u64, counted: u64, limit: u64| {
            limit > 0 && added > limit.saturating_sub(counted) / COUNTED_PART
        };
        let is_wanted = self.generation == 0
            || self.has_failed
            || exceeded.is_some()
            || is_far(self.added, counted.queued_of_tenant - 1, quota.queued_of_tenant)
            || is_far(user.added, counted.queued_of_user - 1, quota.queued_of_user);
        let is_doubtful = exceeded.is_some() && quota.exceeded_by(counted).is_none();
        let count = is_wanted && !self.is_counting && self.is_due(is_doubtful, now);
        Decision { outcome, count }
    }

    fn is_due(&self, is_doubtful: bool, now: Instant) -> bool {
        let Some((began, took)) = self.last_count else { return true };
        let times = if is_doubtful { INTERVAL_OF_DOUBTFUL_COUNT } else { INTERVAL_OF_COUNT };
        let interval = if self.has_failed {
            RETRY_INTERVAL
        } else {
            took.saturating_mul(times).clamp(MIN_INTERVAL, MAX_INTERVAL)
        };
        // Others need the permits too.
        now.saturating_duration_since(began) >= interval.max(took.saturating_mul(2))
    }

    fn begin(&mut self) {
        self.is_counting = true;
        self.generation += 1;
        self.uncounted = std::mem::take(&mut self.added);
    }

    /// Ends a count that took from `began` to `now`.
    fn finish(
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
        let Some(mut of_users) = counted else {
            self.added += uncounted;
            return;
        };
        self.counted = of_users.values().sum();
        self.counted_at = Some(began);
        let least = quota.queued_of_user / KEPT_PART;
        of_users.retain(|_, count| quota.queued_of_user > 0 && *count > least);
        self.of_users = of_users;
    }
}

impl UserCount {
    fn enter(&mut self, generation: u64, is_counting: bool) {
        if self.generation == generation {
            return;
        }
        let is_next = self.generation + 1 == generation;
        self.added_before = if is_next && is_counting { self.added } else { 0 };
        self.added = 0;
        self.generation = generation;
    }
}

/// The entry of this name, made if there is none.
fn entry<T: Default>(cache: &Cache<String, Arc<Mutex<T>>>, name: &str) -> Arc<Mutex<T>> {
    match cache.get_or_insert_with(name, || Ok::<_, Infallible>(Arc::default())) {
        Ok(entry) => entry,
        Err(never) => match never {},
    }
}

impl Dynamo {
    /// Admits one more queued request, as far as is known.
    pub(crate) fn admit_queued(
        &self,
        owner: &Owner,
        quota: &Quota,
    ) -> Result<QuotaUse, TenantLimit> {
        if quota.queued_of_tenant == 0 && quota.queued_of_user == 0 {
            return Ok(QuotaUse::default());
        }
        let tenant = entry(&self.queue_counts.tenants, &owner.tenant);
        let user = entry(&self.queue_counts.users, &format!("{}\n{}", owner.tenant, owner.user));
        let now = Instant::now();
        let mut known = tenant.lock();
        let Decision { outcome, count } = known.admit(&owner.user, &mut user.lock(), quota, now);
        if count && let Ok(permit) = self.queue_counts.counts.clone().try_acquire_owned() {
            known.begin();
            drop(known);
            let (dynamo, name, quota) = (self.clone(), owner.tenant.clone(), *quota);
            tokio::spawn(async move {
                let _permit = permit;
                let counted = dynamo.count_queued(&name, quota.queued_of_tenant).await;
                if let Err(error) = &counted {
                    dynamo.queue_counts.note_failed(error);
                }
                tenant.lock().finish(counted.ok(), &quota, now, Instant::now());
            });
        }
        outcome
    }

    /// Counts what each user of a tenant has queued, up to about `limit` in all, if there is a limit.
    async fn count_queued(
        &self,
        tenant: &str,
        limit: u64,
    ) -> Result<HashMap<String, u64>, StoreError> {
        let limit = if limit == 0 { MAX_COUNTED } else { limit };
        let limit = limit.div_ceil(u64::from(self.queue_shards));
        let counts = self.shards().map(|shard| self.count_queued_in(shard, tenant, limit));
        let mut counted: HashMap<String, u64> = HashMap::new();
        for (user, count) in try_join_all(counts).await?.into_iter().flatten() {
            *counted.entry(user).or_default() += count;
        }
        Ok(counted)
    }

    async fn count_queued_in(
        &self,
        shard: String,
        tenant: &str,
        limit: u64,
    ) -> Result<HashMap<String, u64>, StoreError> {
        let condition = Expression::default()
            .when("queue_shard", "=", text(shard))
            .when_begins("queue_rank", &of_tenant(tenant));
        let mut counted: HashMap<String, u64> = HashMap::new();
        let mut total = 0;
        let mut start = None;
        loop {
            let page = self
                .client
                .query()
                .table_name(&self.tables.requests)
                .index_name("queue")
                .projection_expression("#user")
                .set_key_condition_expression(condition.condition())
                .set_expression_attribute_names(condition.names())
                .expression_attribute_names("#user", "user")
                .set_expression_attribute_values(condition.values())
                .set_exclusive_start_key(start)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map_err(|error| store_error("counting a tenant's queue", &error))?;
            self.metrics.note_read(page.consumed_capacity());
            for item in page.items() {
                // An index that was made before it had users still says how many requests there are.
                let user = text_of(item, "user").unwrap_or_default();
                match counted.get_mut(user) {
                    Some(count) => *count += 1,
                    None => drop(counted.insert(user.to_owned(), 1)),
                }
                total += 1;
            }
            start = page.last_evaluated_key;
            // Twice as many: not all shards hold the same number.
            if start.is_none() || total >= limit.saturating_mul(2) {
                return Ok(counted);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUOTA: Quota =
        Quota { queued_of_tenant: 80, queued_of_user: 40, stored_bytes_of_tenant: 0 };

    struct Subject {
        tenant: TenantCount,
        users: HashMap<&'static str, UserCount>,
        now: Instant,
    }

    impl Subject {
        fn new() -> Self {
            Self { tenant: TenantCount::default(), users: HashMap::new(), now: Instant::now() }
        }

        /// As the engine does, which has counted the tenant once.
        fn counted() -> Self {
            let mut subject = Self::new();
            assert!(subject.admit("eve").count, "a tenant that is not known is counted");
            subject.finish(&[]);
            subject
        }

        fn admit(&mut self, user: &'static str) -> Decision {
            let of_user = self.users.entry(user).or_default();
            let decision = self.tenant.admit(user, of_user, &QUOTA, self.now);
            if decision.count {
                self.tenant.begin();
            }
            decision
        }

        /// Submits until a count is wanted; returns how many were admitted.
        fn until_counting(&mut self, user: &'static str) -> usize {
            let mut admitted = 0;
            loop {
                let Decision { outcome, count } = self.admit(user);
                admitted += usize::from(outcome.is_ok());
                if count {
                    return admitted;
                }
                assert!(admitted < 1000, "it is never counted");
            }
        }

        fn finish(&mut self, counted: &[(&str, u64)]) {
            let counted = counted.iter().map(|(user, count)| ((*user).to_owned(), *count));
            self.tenant.finish(Some(counted.collect()), &QUOTA, self.now, self.now);
            self.now += MIN_INTERVAL;
        }
    }

    #[test]
    fn a_tenant_is_counted_the_more_often_the_nearer_a_limit_is() {
        let mut subject = Subject::counted();
        assert_eq!(subject.until_counting("ann"), 6);
        subject.finish(&[("ann", 6)]);
        assert_eq!(subject.until_counting("ann"), 5);
        subject.finish(&[("ann", 37), ("bob", 1)]);
        assert_eq!(subject.until_counting("ann"), 1);
        subject.finish(&[("ann", 38)]);
        // It has left the queue meanwhile.
        assert_eq!(subject.until_counting("bob"), 6);
        subject.finish(&[]);
        assert_eq!(subject.until_counting("ann"), 6);
    }

    #[test]
    fn what_is_submitted_while_it_is_counted_counts_too() {
        let mut subject = Subject::counted();
        assert_eq!(subject.until_counting("ann"), 6);
        let admitted = (0..100).filter(|_| subject.admit("ann").outcome.is_ok()).count();
        assert_eq!(admitted, 34);
        assert_eq!(subject.admit("ann").outcome, Err(TenantLimit::QueuedPerUser));
        let admitted = (0..100).filter(|_| subject.admit("bob").outcome.is_ok()).count();
        assert_eq!(admitted, 40);
        assert_eq!(subject.admit("eve").outcome, Err(TenantLimit::QueuedPerTenant));
        // What came after the count began is not in it.
        subject.finish(&[("ann", 6)]);
        assert_eq!(subject.admit("eve").outcome, Err(TenantLimit::QueuedPerTenant));
        subject.finish(&[]);
        assert!(subject.admit("eve").outcome.is_ok());
    }

    #[test]
    fn while_counts_fail_nothing_is_refused_but_what_the_last_one_refuses() {
        let mut subject = Subject::counted();
        subject.until_counting("ann");
        subject.tenant.finish(None, &QUOTA, subject.now, subject.now);
        let admitted = (0..100).filter(|_| subject.admit("ann").outcome.is_ok()).count();
        assert_eq!(admitted, 100);
        assert!(!subject.tenant.is_counting, "it is not repeated at once");
        subject.now += RETRY_INTERVAL;
        assert!(subject.admit("ann").count);
        subject.finish(&[("ann", 40)]);
        let refused = Err(TenantLimit::QueuedPerUser);
        assert_eq!(subject.admit("ann").outcome, refused);
        // A count that shows a full queue holds for a while.
        subject.tenant.finish(None, &QUOTA, subject.now, subject.now);
        assert_eq!(subject.admit("ann").outcome, refused);
        assert!(subject.admit("bob").outcome.is_ok());
        subject.now += COUNT_LIFE;
        assert!(subject.admit("ann").outcome.is_ok());
    }

    #[test]
    fn a_slow_count_is_repeated_early_when_the_refusal_is_in_doubt() {
        let is_repeated = |counted: u64| {
            let mut subject = Subject::counted();
            subject.until_counting("ann");
            let (began, took) = (subject.now, Duration::from_millis(900));
            let counted = HashMap::from([("ann".to_owned(), counted)]);
            subject.now += took;
            subject.tenant.finish(Some(counted), &QUOTA, began, subject.now);
            // What was submitted since then has left the queue, or not.
            let refused = (0..100).find(|_| subject.admit("ann").outcome.is_err());
            assert!(refused.is_some());
            subject.now += took;
            subject.admit("ann").count
        };
        assert!(is_repeated(0));
        assert!(!is_repeated(40));
    }
}
