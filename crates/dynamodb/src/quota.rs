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
use quick_cache::sync::Cache;
use streamer_core::TenantLimit;
use streamer_store::{Owner, Quota, QuotaUse, StoreError};

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
/// Shortest time from the beginning of one count to the next: the larger of this and the time that the count
/// took, multiplied.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_OF_COUNT: u32 = 20;

/// What is known of the queues of tenants.
pub(crate) struct QueueCounts {
    tenants: Cache<String, Arc<Mutex<TenantCount>>>,
    /// By tenant and user, with a control character between them.
    users: Cache<String, Arc<Mutex<UserCount>>>,
}

impl Default for QueueCounts {
    fn default() -> Self {
        Self { tenants: Cache::new(MAX_TENANTS), users: Cache::new(MAX_USERS) }
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
    /// The last count failed.
    has_failed: bool,
    /// How many counts have begun.
    generation: u64,
    next_count: Option<Instant>,
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
        let counted_of_user = self.of_users.get(user_name).copied().unwrap_or_default();
        let unknown_of_user = user.added + if self.is_counting { user.added_before } else { 0 };
        let used = QuotaUse {
            queued_of_tenant: self.counted + self.uncounted + self.added + 1,
            queued_of_user: counted_of_user + unknown_of_user + 1,
            stored_bytes_of_tenant: 0,
        };
        let outcome = match quota.exceeded_by(used) {
            Some(limit) => Err(limit),
            None => Ok(used),
        };
        if outcome.is_ok() {
            self.added += 1;
            user.added += 1;
        }
        let is_far = |added: u64, counted: u64, limit: u64| {
            limit > 0 && added > limit.saturating_sub(counted) / COUNTED_PART
        };
        let wanted = self.has_failed
            || outcome.is_err()
            || is_far(self.added, self.counted, quota.queued_of_tenant)
            || is_far(user.added, counted_of_user, quota.queued_of_user);
        let count = wanted && !self.is_counting && self.next_count.is_none_or(|next| next <= now);
        if count {
            self.is_counting = true;
            self.generation += 1;
            self.uncounted = std::mem::take(&mut self.added);
        }
        Decision { outcome, count }
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
        let pause = now.saturating_duration_since(began).saturating_mul(INTERVAL_OF_COUNT);
        self.next_count = Some(began + pause.max(MIN_INTERVAL));
        let uncounted = std::mem::take(&mut self.uncounted);
        let Some(mut of_users) = counted else {
            self.added += uncounted;
            return;
        };
        self.counted = of_users.values().sum();
        of_users.retain(|_, count| *count > quota.queued_of_user / KEPT_PART);
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
        let decision = tenant.lock().admit(&owner.user, &mut user.lock(), quota, now);
        if decision.count {
            let (dynamo, name, quota) = (self.clone(), owner.tenant.clone(), *quota);
            tokio::spawn(async move {
                let counted = dynamo.count_queued(&name, quota.queued_of_tenant).await;
                if let Err(error) = &counted {
                    tracing::warn!(%error, "could not count a tenant's queue");
                }
                tenant.lock().finish(counted.ok(), &quota, now, Instant::now());
            });
        }
        decision.outcome
    }

    /// Counts what each user of a tenant has queued, up to about `limit` in all, if there is a limit.
    async fn count_queued(
        &self,
        tenant: &str,
        limit: u64,
    ) -> Result<HashMap<String, u64>, StoreError> {
        let limit =
            if limit == 0 { u64::MAX } else { limit.div_ceil(u64::from(self.queue_shards)) };
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
                *counted.entry(text_of(item, "user")?.to_owned()).or_default() += 1;
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

        fn admit(&mut self, user: &'static str) -> Decision {
            let of_user = self.users.entry(user).or_default();
            self.tenant.admit(user, of_user, &QUOTA, self.now)
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
        let mut subject = Subject::new();
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
        let mut subject = Subject::new();
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
    fn a_count_that_fails_loses_nothing_of_the_tenant_and_is_not_repeated_at_once() {
        let mut subject = Subject::new();
        subject.until_counting("ann");
        subject.tenant.finish(None, &QUOTA, subject.now, subject.now);
        assert_eq!((subject.tenant.added, subject.tenant.is_counting), (6, false));
        assert!(!subject.admit("ann").count);
        subject.now += MIN_INTERVAL;
        assert!(subject.admit("ann").count);
    }
}
