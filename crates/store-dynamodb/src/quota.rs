//! Counts the queued requests of tenants and users. The numbers are not stored in an item, because every submission
//! would have to write it. Instead, a process counts the items of the tenant in the index of the queue, adds its own
//! submissions, and counts again when a limit may be reached.

use std::{collections::HashMap, time::Instant};

use futures_util::future::try_join_all;
use streamer_core::TenantLimit;
use streamer_store::{Owner, Quota, QuotaUsage, StoreError};

use crate::{
    client::Dynamo,
    expression::{Expression, text},
    item_ops::text_of,
    queue::{Partition, tenant_prefix},
    queue_counts::Decision,
};

/// Maximum number of index items to count for a tenant without a limit.
const MAX_COUNTED: u64 = 1_000_000;

impl Dynamo {
    /// Admits one more queued request, based on the counts that are known to this process.
    pub(crate) fn admit_queued(
        &self,
        owner: &Owner,
        action: &str,
        quota: &Quota,
    ) -> Result<QuotaUsage, TenantLimit> {
        if quota.queued_of_tenant == 0 && quota.queued_of_user == 0 {
            return Ok(QuotaUsage::default());
        }
        let tenant = self.queue_counts.of_tenant(&owner.tenant);
        let user = self.queue_counts.of_user(owner);
        let now = Instant::now();
        let mut known = tenant.lock();
        known.add_action(action);
        let Decision { outcome, count } = known.admit(&owner.user, &mut user.lock(), quota, now);
        if count && let Some(permit) = self.queue_counts.try_acquire_permit() {
            known.begin();
            let actions = known.actions();
            drop(known);
            let (dynamo, name, quota) = (self.clone(), owner.tenant.clone(), *quota);
            tokio::spawn(async move {
                let _permit = permit;
                let limit = quota.queued_of_tenant;
                let counted = dynamo.count_queued(&name, &actions, limit).await;
                if let Err(error) = &counted {
                    dynamo.queue_counts.record_failure(error);
                }
                tenant.lock().finish(counted.ok(), &quota, now, Instant::now());
            });
        }
        outcome
    }

    /// Counts the queued requests for the given actions of each user of a tenant, up to about `limit` in total. A `limit`
    /// of 0 means no limit.
    async fn count_queued(
        &self,
        tenant: &str,
        actions: &[String],
        limit: u64,
    ) -> Result<HashMap<String, u64>, StoreError> {
        let limit = if limit == 0 { MAX_COUNTED } else { limit };
        let limit = limit.div_ceil(u64::from(self.queue_shards));
        let partitions =
            self.partitions(Partition::Ready).chain(self.partitions(Partition::Delayed));
        let counts =
            partitions.map(|partition| self.count_in_partition(partition, tenant, actions, limit));
        let mut counted: HashMap<String, u64> = HashMap::new();
        for (user, count) in try_join_all(counts).await?.into_iter().flatten() {
            *counted.entry(user).or_default() += count;
        }
        Ok(counted)
    }

    async fn count_in_partition(
        &self,
        partition: String,
        tenant: &str,
        actions: &[String],
        limit: u64,
    ) -> Result<HashMap<String, u64>, StoreError> {
        let mut counted: HashMap<String, u64> = HashMap::new();
        let mut total = 0;
        for action in actions {
            let condition = Expression::default()
                .when("queue_shard", "=", text(partition.as_str()))
                .when_begins("queue_rank", &tenant_prefix(action, tenant));
            self.count_matching(&condition, limit, &mut counted, &mut total).await?;
            if total >= limit.saturating_mul(2) {
                break;
            }
        }
        Ok(counted)
    }

    /// Adds the number of matching items of the queue to the count of each user and to the total.
    async fn count_matching(
        &self,
        condition: &Expression,
        limit: u64,
        counted: &mut HashMap<String, u64>,
        total: &mut u64,
    ) -> Result<(), StoreError> {
        let mut start = None;
        loop {
            let query = self
                .query(&self.tables.requests, Some("queue"), condition)
                .projection_expression("#user")
                .expression_attribute_names("#user", "user")
                .set_exclusive_start_key(start);
            let page = self.read_page("counting a tenant's queue", query).await?;
            for item in page.items() {
                // An index that was created before it included users also has one item for each request.
                let user = text_of(item, "user").unwrap_or_default();
                match counted.get_mut(user) {
                    Some(count) => *count += 1,
                    None => drop(counted.insert(user.to_owned(), 1)),
                }
                *total += 1;
            }
            start = page.last_evaluated_key;
            // Twice the limit, because the requests are not distributed equally over the shards.
            if start.is_none() || *total >= limit.saturating_mul(2) {
                return Ok(());
            }
        }
    }
}
