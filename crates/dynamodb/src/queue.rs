//! What waits. The index is spread over shards; in each, requests stand in the order tenant, action,
//! priority, due time, and reading skips what is not asked for.

use std::collections::VecDeque;

use aws_sdk_dynamodb::types::{ReturnConsumedCapacity, Select};
use futures_util::future::try_join_all;
use streamer_core::{Timestamp, Uid};
use streamer_store::{
    DuePage, DueQuery, DueRequest, QueueAhead, QueueStats, RequestRecord, StoreError,
};

use crate::{
    calls::{number_of, text_of},
    client::Dynamo,
    error::{damaged, store_error},
    expression::{Expression, number, text},
    item::RequestItem,
    requests::by_uid,
};

/// Between the fields of a rank. No tenant or action has control characters.
const SEPARATOR: char = '\t';
/// Comes right after everything that begins with a field and the separator.
const AFTER_SEPARATOR: char = '\n';
const HIGHEST_PRIORITY: i32 = 9;
/// Rows of the index read at once: somewhat more than are asked for, within these bounds.
const MIN_PAGE: usize = 32;
const MAX_PAGE: usize = 256;
/// Requests counted at most: a longer queue is only said to be as long as this.
const MAX_COUNTED: u64 = 5_000;
/// Groups of tenant, action and priority that are looked into for the oldest request at most.
const MAX_GROUPS: usize = 100;
/// Tenants whose queues are counted at most.
const MAX_TENANTS: usize = 16;

/// What a rank says.
#[derive(Clone, Debug)]
struct Row {
    rank: String,
    tenant: String,
    action: String,
    priority: i32,
    not_before: i64,
    uid: Uid,
}

fn rank(tenant: &str, action: &str, priority: i32, not_before: i64, uid: &str) -> String {
    // Of two times the earlier one sorts first, as text of one length does.
    let time = not_before.max(0);
    format!("{}{time:015}{SEPARATOR}{uid}", group(tenant, action, priority))
}

/// What all ranks of one tenant, action and priority begin with. One character says the priority,
/// the highest first; what would be lower than the lowest sorts behind it.
fn group(tenant: &str, action: &str, priority: i32) -> String {
    let turned = u8::try_from(HIGHEST_PRIORITY - priority).unwrap_or(0);
    let turned = char::from(b'0' + turned);
    format!("{tenant}{SEPARATOR}{action}{SEPARATOR}{turned}{SEPARATOR}")
}

impl Row {
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

/// Moves forward through one shard of the index.
struct Cursor<'a> {
    dynamo: &'a Dynamo,
    shard: String,
    page: usize,
    rows: VecDeque<Row>,
    /// Nothing comes after the rows that are here.
    exhausted: bool,
}

impl Cursor<'_> {
    /// The first row at or after this key.
    async fn seek(&mut self, from: &str) -> Result<Option<&Row>, StoreError> {
        while self.rows.front().is_some_and(|row| row.rank.as_str() < from) {
            self.rows.pop_front();
        }
        if self.rows.is_empty() && !self.exhausted {
            self.read(from).await?;
        }
        Ok(self.rows.front())
    }

    async fn read(&mut self, from: &str) -> Result<(), StoreError> {
        let doing = "reading the queue";
        let mut condition =
            Expression::default().when("queue_shard", "=", text(self.shard.as_str()));
        if !from.is_empty() {
            condition = condition.when("queue_rank", ">=", text(from));
        }
        let page = self
            .dynamo
            .client
            .query()
            .table_name(&self.dynamo.tables.requests)
            .index_name("queue")
            .set_key_condition_expression(condition.condition())
            .set_expression_attribute_names(condition.names())
            .set_expression_attribute_values(condition.values())
            .limit(i32::try_from(self.page).unwrap_or(i32::MAX))
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await
            .map_err(|error| store_error(doing, &error))?;
        self.dynamo.metrics.note_read(page.consumed_capacity());
        self.exhausted = page.last_evaluated_key.is_none();
        for item in page.items() {
            let rank = text_of(item, "queue_rank")?;
            let row =
                Row::parse(rank).ok_or_else(|| damaged(doing, format!("{rank:?} is no rank")))?;
            self.rows.push_back(row);
        }
        Ok(())
    }

    /// Takes due rows of one tenant and action, at most so many.
    async fn take_due(
        &mut self,
        (tenant, action): (&str, &str),
        now: i64,
        limit: usize,
        due: &mut Vec<DueRequest>,
    ) -> Result<(), StoreError> {
        let mut from = format!("{tenant}{SEPARATOR}{action}{SEPARATOR}");
        let mut taken = 0;
        while taken < limit {
            let Some(row) = self.seek(&from).await? else { return Ok(()) };
            if row.tenant != tenant || row.action != action {
                return Ok(());
            }
            if row.not_before <= now {
                due.push(row.due());
                from = after(&row.rank);
                taken += 1;
            } else {
                from = group(tenant, action, row.priority - 1);
            }
        }
        Ok(())
    }
}

/// The key right after this one.
fn after(rank: &str) -> String {
    format!("{rank}\0")
}

/// What all ranks of a tenant begin with.
pub(crate) fn of_tenant(tenant: &str) -> String {
    format!("{tenant}{SEPARATOR}")
}

/// The key after everything of a tenant.
fn after_tenant(tenant: &str) -> String {
    format!("{tenant}{AFTER_SEPARATOR}")
}

/// The first tenant at or after this key, in any shard.
async fn next_tenant(cursors: &mut [Cursor<'_>], from: &str) -> Result<Option<String>, StoreError> {
    let firsts = try_join_all(cursors.iter_mut().map(|cursor| cursor.seek(from))).await?;
    Ok(firsts.into_iter().flatten().map(|row| row.tenant.clone()).min())
}

impl Dynamo {
    /// Puts a request where those that wait are found.
    pub(crate) fn enter_queue(&self, item: &mut RequestItem, now: Timestamp) {
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

    /// Cursors for reading about so many rows.
    fn cursors(&self, wanted: usize) -> Vec<Cursor<'_>> {
        let page = wanted.saturating_add(8).clamp(MIN_PAGE, MAX_PAGE);
        let cursor =
            |shard| Cursor { dynamo: self, shard, page, rows: VecDeque::new(), exhausted: false };
        self.shards().map(cursor).collect()
    }

    pub(crate) async fn due(&self, query: &DueQuery) -> Result<DuePage, StoreError> {
        let mut page = DuePage::default();
        let mut cursors = self.cursors(query.per_tenant);
        let mut actions = query.actions.clone();
        actions.sort();
        let mut from = query.after_tenant.as_deref().map_or(String::new(), after_tenant);
        for _ in 0..query.tenants {
            let Some(tenant) = next_tenant(&mut cursors, &from).await? else {
                page.next_tenant = None;
                return Ok(page);
            };
            let limit = query.limits.get(&tenant).map_or(query.per_tenant, |limit| *limit);
            let first = page.requests.len();
            let choice = self.crowd.choice(limit);
            if limit > 0 {
                for action in &actions {
                    if query.blocked.contains(&(tenant.clone(), action.clone())) {
                        continue;
                    }
                    let found = try_join_all(cursors.iter_mut().map(async |cursor| {
                        let mut due = Vec::new();
                        let of = (tenant.as_str(), action.as_str());
                        cursor.take_due(of, query.now.as_millis(), choice, &mut due).await?;
                        Ok::<_, StoreError>(due)
                    }))
                    .await?;
                    page.requests.extend(found.into_iter().flatten());
                }
            }
            let of_tenant = &mut page.requests[first..];
            of_tenant.sort_by_cached_key(|request| {
                let turn = request.not_before.as_millis() + self.crowd.reluctance_ms(request.uid);
                (-request.priority, turn, request.uid)
            });
            page.requests.truncate(first + limit);
            from = after_tenant(&tenant);
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
            from = after_tenant(&tenant);
            let own = tenant == record.owner.tenant;
            let others = usize::try_from(ahead.others).unwrap_or(usize::MAX);
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
        let mut rows = Vec::new();
        for item in found.iter().flatten() {
            rows.push((number_of(item, "expire_at")?, text_of(item, "uid")?.to_owned()));
        }
        rows.sort();
        rows.truncate(limit);
        let uids = rows.iter().map(|(_, uid)| uid.clone()).collect();
        let mut items = by_uid(self.get_many(uids).await?);
        let mut records = Vec::new();
        for (_, uid) in rows {
            // The index may show what has gone on since.
            let Some(item) = items.remove(&uid) else { continue };
            let waits = item.expire_at.is_some_and(|at| at <= now.as_millis());
            if waits {
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
            let page = self
                .client
                .query()
                .table_name(&self.tables.requests)
                .index_name("queue")
                .select(Select::Count)
                .set_key_condition_expression(condition.condition())
                .set_expression_attribute_names(condition.names())
                .set_expression_attribute_values(condition.values())
                .set_exclusive_start_key(start)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map_err(|error| store_error("counting the queue", &error))?;
            self.metrics.note_read(page.consumed_capacity());
            counted += u64::try_from(page.count).unwrap_or(0);
            start = page.last_evaluated_key;
            if counted >= MAX_COUNTED || start.is_none() {
                return Ok(counted);
            }
        }
    }
}

/// Due rows of a tenant for the record's action that come before it.
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
        let Some(row) = cursor.seek(&from).await? else { break };
        if row.tenant != tenant || row.action != record.action || row.priority < record.priority {
            break;
        }
        let before = (-row.priority, row.not_before, row.uid) < own;
        if row.not_before <= now.as_millis() && before {
            counted += 1;
            from = after(&row.rank);
        } else {
            from = group(tenant, &record.action, row.priority - 1);
        }
    }
    Ok(counted as u64)
}

/// The first of each group is its oldest.
async fn oldest_due(cursor: &mut Cursor<'_>, now: i64) -> Result<Option<i64>, StoreError> {
    let mut oldest = None;
    let mut from = String::new();
    for _ in 0..MAX_GROUPS {
        let Some(row) = cursor.seek(&from).await? else { break };
        if row.not_before <= now {
            oldest = Some(oldest.map_or(row.not_before, |known: i64| known.min(row.not_before)));
        }
        from = group(&row.tenant, &row.action, row.priority - 1);
    }
    Ok(oldest)
}
