//! Queue of requests. Its index is distributed over shards. In each shard, requests are ordered by tenant, action,
//! priority and due time, and reads skip the items that they do not need.

use std::collections::VecDeque;

use aws_sdk_dynamodb::types::Select;
use futures_util::future::try_join_all;
use streamer_core::{Timestamp, Uid, saturate};
use streamer_store::{
    DuePage, DueQuery, DueRequest, QueueAhead, QueueStats, RequestRecord, StoreError,
};

use crate::{
    client::Dynamo,
    error::corrupt,
    expression::{Expression, number, text},
    item::{RequestItem, by_uid},
    item_ops::{number_of, text_of},
};

/// Separator of the fields of a rank. Tenants and actions contain no control characters.
const SEPARATOR: char = '\t';
/// Replacement for the separator in a key that sorts after all keys with the same field.
const AFTER_SEPARATOR: char = '\n';
/// Highest priority of a request.
const HIGHEST_PRIORITY: i32 = 9;
/// Minimum number of index items to read at once.
const MIN_PAGE_ITEMS: usize = 32;
/// Maximum number of index items to read at once.
const MAX_PAGE_ITEMS: usize = 256;
/// Maximum number of requests to count; a longer queue is reported with this length.
const MAX_COUNTED: u64 = 5_000;
/// Maximum number of groups of tenant, action and priority to search for the oldest request.
const MAX_GROUPS: usize = 100;
/// Maximum number of tenants whose queues are counted.
const MAX_TENANTS: usize = 16;

/// Item of the index, parsed from its rank.
#[derive(Clone, Debug)]
struct IndexItem {
    rank: String,
    tenant: String,
    action: String,
    priority: i32,
    not_before: i64,
    uid: Uid,
}

fn rank(tenant: &str, action: &str, priority: i32, not_before: i64, uid: &str) -> String {
    // Padded to a fixed length, so that earlier times sort first.
    let time = not_before.max(0);
    format!("{}{time:015}{SEPARATOR}{uid}", group_prefix(tenant, action, priority))
}

/// Returns the prefix of all ranks of one tenant, action and priority. One character encodes the priority, such that
/// the highest priority sorts first; a priority below the lowest sorts last.
fn group_prefix(tenant: &str, action: &str, priority: i32) -> String {
    let inverted = u8::try_from(HIGHEST_PRIORITY - priority).unwrap_or(0);
    let inverted = char::from(b'0' + inverted);
    format!("{tenant}{SEPARATOR}{action}{SEPARATOR}{inverted}{SEPARATOR}")
}

impl IndexItem {
    fn parse(rank: &str) -> Option<Self> {
        let mut fields = rank.split(SEPARATOR);
        let (tenant, action) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        let priority = HIGHEST_PRIORITY - fields.next()?.parse::<i32>().ok()?;
        let not_before = fields.next()?.parse().ok()?;
        let uid = fields.next()?.parse().ok()?;
        Some(Self { rank: rank.to_owned(), tenant, action, priority, not_before, uid })
    }

    fn due(&self) -> DueRequest {
        DueRequest {
            uid: self.uid,
            action: self.action.clone(),
            tenant: self.tenant.clone(),
            priority: self.priority,
            not_before: Timestamp::from_millis(self.not_before),
        }
    }
}

/// Cursor that moves forward through one shard of the index.
struct Cursor<'a> {
    dynamo: &'a Dynamo,
    shard: String,
    page: usize,
    items: VecDeque<IndexItem>,
    /// Whether no items follow those in `items`.
    exhausted: bool,
}

impl Cursor<'_> {
    /// Returns the first item at or after the key `from`.
    async fn seek(&mut self, from: &str) -> Result<Option<&IndexItem>, StoreError> {
        while self.items.front().is_some_and(|item| item.rank.as_str() < from) {
            self.items.pop_front();
        }
        if self.items.is_empty() && !self.exhausted {
            self.read(from).await?;
        }
        Ok(self.items.front())
    }

    async fn read(&mut self, from: &str) -> Result<(), StoreError> {
        let doing = "reading the queue";
        let mut condition =
            Expression::default().when("queue_shard", "=", text(self.shard.as_str()));
        if !from.is_empty() {
            condition = condition.when("queue_rank", ">=", text(from));
        }
        let query = self
            .dynamo
            .query(&self.dynamo.tables.requests, Some("queue"), &condition)
            .limit(saturate::to_i32(self.page));
        let page = self.dynamo.read_page(doing, query).await?;
        self.exhausted = page.last_evaluated_key.is_none();
        for item in page.items() {
            let rank = text_of(item, "queue_rank")?;
            let item = IndexItem::parse(rank)
                .ok_or_else(|| corrupt(doing, format!("invalid rank {rank:?}")))?;
            self.items.push_back(item);
        }
        Ok(())
    }

    /// Moves up to `limit` due items of one tenant and action to `due`.
    async fn pop_due(
        &mut self,
        (tenant, action): (&str, &str),
        now: i64,
        limit: usize,
        due: &mut Vec<DueRequest>,
    ) -> Result<(), StoreError> {
        let mut from = format!("{tenant}{SEPARATOR}{action}{SEPARATOR}");
        let mut taken = 0;
        while taken < limit {
            let Some(item) = self.seek(&from).await? else { return Ok(()) };
            if item.tenant != tenant || item.action != action {
                return Ok(());
            }
            if item.not_before <= now {
                due.push(item.due());
                from = key_after(&item.rank);
                taken += 1;
            } else {
                from = group_prefix(tenant, action, item.priority - 1);
            }
        }
        Ok(())
    }
}

/// Returns the key that directly follows `rank`.
fn key_after(rank: &str) -> String {
    format!("{rank}\0")
}

/// Returns the prefix of all ranks of a tenant.
pub(crate) fn tenant_prefix(tenant: &str) -> String {
    format!("{tenant}{SEPARATOR}")
}

/// Returns the key that follows all ranks of a tenant.
fn key_after_tenant(tenant: &str) -> String {
    format!("{tenant}{AFTER_SEPARATOR}")
}

/// Returns the first tenant at or after the key `from`, in any shard.
async fn next_tenant(cursors: &mut [Cursor<'_>], from: &str) -> Result<Option<String>, StoreError> {
    let firsts = try_join_all(cursors.iter_mut().map(|cursor| cursor.seek(from))).await?;
    Ok(firsts.into_iter().flatten().map(|item| item.tenant.clone()).min())
}

impl Dynamo {
    /// Sets the attributes that put a request into the indexes of the queue.
    pub(crate) fn set_queue_attributes(&self, item: &mut RequestItem, now: Timestamp) {
        let shard = self.shard_of(&item.uid).to_string();
        item.tenant_shard = format!("{}{SEPARATOR}{shard}", item.tenant);
        item.queue_rank =
            Some(rank(&item.tenant, &item.action, item.priority, item.not_before, &item.uid));
        let delayed = item.not_before > now.as_millis();
        item.delay_until = delayed.then_some(item.not_before);
        item.delay_shard = delayed.then(|| shard.clone());
        item.expire_at = [item.deadline, item.close_by].into_iter().flatten().min();
        item.expiry_shard = item.expire_at.map(|_| shard.clone());
        item.queue_shard = Some(shard);
    }

    pub(crate) fn shard_of(&self, uid: &str) -> u64 {
        let spread = uid.parse::<Uid>().map_or(0, Uid::spread);
        spread % u64::from(self.queue_shards.max(1))
    }

    pub(crate) fn shards(&self) -> impl Iterator<Item = String> + use<> {
        (0..self.queue_shards.max(1)).map(|shard| shard.to_string())
    }

    /// Returns cursors that read somewhat more than `wanted` items at once.
    fn cursors(&self, wanted: usize) -> Vec<Cursor<'_>> {
        let page = wanted.saturating_add(8).clamp(MIN_PAGE_ITEMS, MAX_PAGE_ITEMS);
        let cursor =
            |shard| Cursor { dynamo: self, shard, page, items: VecDeque::new(), exhausted: false };
        self.shards().map(cursor).collect()
    }

    pub(crate) async fn due(&self, query: &DueQuery) -> Result<DuePage, StoreError> {
        let mut page = DuePage::default();
        let mut cursors = self.cursors(query.per_tenant);
        let mut actions = query.actions.clone();
        actions.sort();
        let mut from = query.after_tenant.as_deref().map_or(String::new(), key_after_tenant);
        for _ in 0..query.tenants {
            let Some(tenant) = next_tenant(&mut cursors, &from).await? else {
                page.next_tenant = None;
                return Ok(page);
            };
            let limit = query.limits.get(&tenant).map_or(query.per_tenant, |limit| *limit);
            let first = page.requests.len();
            let candidates = self.claim_jitter.read_limit(limit);
            if limit > 0 {
                for action in &actions {
                    if query.blocked.contains(&(tenant.clone(), action.clone())) {
                        continue;
                    }
                    let found = try_join_all(cursors.iter_mut().map(async |cursor| {
                        let mut due = Vec::new();
                        let of = (tenant.as_str(), action.as_str());
                        cursor.pop_due(of, query.now.as_millis(), candidates, &mut due).await?;
                        Ok::<_, StoreError>(due)
                    }))
                    .await?;
                    page.requests.extend(found.into_iter().flatten());
                }
            }
            let of_tenant = &mut page.requests[first..];
            of_tenant.sort_by_cached_key(|request| {
                let jitter_ms = self.claim_jitter.jitter_ms(request.uid);
                let order = request.not_before.as_millis() + jitter_ms;
                (-request.priority, order, request.uid)
            });
            page.requests.truncate(first + limit);
            from = key_after_tenant(&tenant);
            page.next_tenant = Some(tenant);
        }
        Ok(page)
    }

    pub(crate) async fn ahead(
        &self,
        record: &RequestRecord,
        now: Timestamp,
        limit: usize,
    ) -> Result<QueueAhead, StoreError> {
        let mut ahead = QueueAhead::default();
        let mut cursors = self.cursors(limit);
        let mut from = String::new();
        for _ in 0..MAX_TENANTS {
            let Some(tenant) = next_tenant(&mut cursors, &from).await? else { break };
            from = key_after_tenant(&tenant);
            let own = tenant == record.owner.tenant;
            let others = saturate::to_usize(ahead.others);
            let left = if own { limit } else { limit.saturating_sub(others) };
            if left == 0 {
                continue;
            }
            let counted = try_join_all(
                cursors.iter_mut().map(|cursor| count_ahead(cursor, record, &tenant, now, left)),
            );
            let found = counted.await?.into_iter().sum::<u64>().min(left as u64);
            if own {
                ahead.own = found;
            } else {
                ahead.others += found;
            }
        }
        Ok(ahead)
    }

    pub(crate) async fn next_due(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError> {
        let firsts = try_join_all(self.shards().map(|shard| self.next_due_in(shard, now))).await?;
        Ok(firsts.into_iter().flatten().min().map(Timestamp::from_millis))
    }

    async fn next_due_in(&self, shard: String, now: Timestamp) -> Result<Option<i64>, StoreError> {
        let condition = Expression::default().when("delay_shard", "=", text(shard)).when(
            "delay_until",
            ">",
            number(now.as_millis()),
        );
        let items = self.query_index(&self.tables.requests, "delayed", condition, 1).await?;
        items.first().map(|item| number_of(item, "delay_until")).transpose()
    }

    pub(crate) async fn overdue(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError> {
        let found = try_join_all(self.shards().map(|shard| {
            let condition = Expression::default().when("expiry_shard", "=", text(shard)).when(
                "expire_at",
                "<=",
                number(now.as_millis()),
            );
            self.query_index(&self.tables.requests, "expiring", condition, limit)
        }))
        .await?;
        let mut overdue = Vec::new();
        for item in found.iter().flatten() {
            overdue.push((number_of(item, "expire_at")?, text_of(item, "uid")?.to_owned()));
        }
        overdue.sort();
        overdue.truncate(limit);
        let uids = overdue.iter().map(|(_, uid)| uid.clone()).collect();
        let mut items = by_uid(self.get_many(uids).await?);
        let mut records = Vec::new();
        for (_, uid) in overdue {
            // The index may contain a request whose state has changed in the meantime.
            let Some(item) = items.remove(&uid) else { continue };
            let is_overdue = item.expire_at.is_some_and(|at| at <= now.as_millis());
            if is_overdue {
                records.push(item.to_record()?);
            }
        }
        Ok(records)
    }

    pub(crate) async fn stats(&self, now: Timestamp) -> Result<QueueStats, StoreError> {
        let counts = try_join_all(self.shards().map(|shard| self.count(shard))).await?;
        let queued = counts.into_iter().sum::<u64>().min(MAX_COUNTED);
        if queued == 0 {
            return Ok(QueueStats::default());
        }
        let mut cursors = self.cursors(1);
        let oldest =
            try_join_all(cursors.iter_mut().map(|cursor| oldest_due(cursor, now.as_millis())));
        let oldest = oldest.await?.into_iter().flatten().min();
        Ok(QueueStats { queued, oldest_due: oldest.map(Timestamp::from_millis) })
    }

    async fn count(&self, shard: String) -> Result<u64, StoreError> {
        let condition = Expression::default().when("queue_shard", "=", text(shard));
        let mut counted = 0;
        let mut start = None;
        loop {
            let query = self
                .query(&self.tables.requests, Some("queue"), &condition)
                .select(Select::Count)
                .set_exclusive_start_key(start);
            let page = self.read_page("counting the queue", query).await?;
            counted += saturate::to_u64(page.count);
            start = page.last_evaluated_key;
            if counted >= MAX_COUNTED || start.is_none() {
                return Ok(counted);
            }
        }
    }
}

/// Counts the due items of `tenant` for the action of `record` that precede `record` in the queue.
async fn count_ahead(
    cursor: &mut Cursor<'_>,
    record: &RequestRecord,
    tenant: &str,
    now: Timestamp,
    limit: usize,
) -> Result<u64, StoreError> {
    let mut from = format!("{tenant}{SEPARATOR}{}{SEPARATOR}", record.action);
    let own = (-record.priority, record.not_before.as_millis(), record.uid);
    let mut counted = 0;
    while counted < limit {
        let Some(item) = cursor.seek(&from).await? else { break };
        if item.tenant != tenant || item.action != record.action || item.priority < record.priority
        {
            break;
        }
        let before = (-item.priority, item.not_before, item.uid) < own;
        if item.not_before <= now.as_millis() && before {
            counted += 1;
            from = key_after(&item.rank);
        } else {
            from = group_prefix(tenant, &record.action, item.priority - 1);
        }
    }
    Ok(counted as u64)
}

/// Returns the earliest due time up to `now`. The first item of each group has the earliest due time of the group.
async fn oldest_due(cursor: &mut Cursor<'_>, now: i64) -> Result<Option<i64>, StoreError> {
    let mut oldest = None;
    let mut from = String::new();
    for _ in 0..MAX_GROUPS {
        let Some(item) = cursor.seek(&from).await? else { break };
        if item.not_before <= now {
            oldest = Some(oldest.map_or(item.not_before, |known: i64| known.min(item.not_before)));
        }
        from = group_prefix(&item.tenant, &item.action, item.priority - 1);
    }
    Ok(oldest)
}
