//! Queue of requests. Its index is distributed over shards. In each shard, requests are ordered by action, tenant,
//! priority, user and due time, and reads skip the items that they do not need. Requests that are delayed are in
//! partitions of their own until they are released.

mod ahead;
mod delayed;
mod due;

use std::collections::{BTreeMap, VecDeque};

use aws_sdk_dynamodb::types::Select;
use futures_util::future::{try_join, try_join_all};
use streamer_core::{Timestamp, Uid, saturate};
use streamer_store::{ActionQueue, DueRequest, QueueStats, RequestRecord, StoreError};

use crate::{
    client::Dynamo,
    expression::{Expression, number, text},
    item::{RequestItem, by_uid},
    item_ops::{number_of, text_of},
};

/// Separator of the fields of a rank. Tenants, users and actions contain no control characters.
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
/// Maximum number of requests of one action to count in a shard.
const MAX_COUNTED_PER_ACTION: u64 = 1_000;
/// Maximum number of groups of action, tenant, priority and user to search for the oldest request, and of actions to
/// count, in a shard.
const MAX_GROUPS: usize = 100;
/// Maximum length of a user's name in a rank, in bytes. A sort key has at most 1,024 bytes. Users whose names begin
/// with the same bytes share their turns.
const MAX_USER_BYTES: usize = 256;

/// Partitions of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Partition {
    /// Requests that were due when they were queued, or were released since then.
    Ready,
    /// Requests that were delayed when they were queued.
    Delayed,
}

impl Partition {
    /// Returns the partition key of a shard.
    pub(crate) fn key(self, shard: u64) -> String {
        match self {
            Self::Ready => format!("r{shard}"),
            Self::Delayed => format!("d{shard}"),
        }
    }
}

/// Item of the index, parsed from its rank.
#[derive(Clone, Debug)]
struct IndexItem {
    rank: String,
    action: String,
    tenant: String,
    priority: i32,
    user: String,
    not_before: i64,
    uid: Uid,
}

fn rank(item: &RequestItem) -> String {
    // Padded to a fixed length, so that earlier times sort first.
    let time = item.not_before.max(0);
    let user = first_bytes(&item.user, MAX_USER_BYTES);
    let user = user_prefix(&item.action, &item.tenant, item.priority, user);
    format!("{user}{time:015}{SEPARATOR}{}", item.uid)
}

/// Returns the longest prefix with at most `max` bytes.
fn first_bytes(text: &str, max: usize) -> &str {
    text.get(..text.floor_char_boundary(max)).unwrap_or(text)
}

/// Returns the prefix of all ranks of an action.
fn action_prefix(action: &str) -> String {
    format!("{action}{SEPARATOR}")
}

/// Returns the prefix of all ranks of an action and tenant.
pub(crate) fn tenant_prefix(action: &str, tenant: &str) -> String {
    format!("{action}{SEPARATOR}{tenant}{SEPARATOR}")
}

/// Returns the prefix of all ranks of an action, tenant and priority. One character encodes the priority, such that the
/// highest priority sorts first; a priority below the lowest sorts last.
fn priority_prefix(action: &str, tenant: &str, priority: i32) -> String {
    let inverted = u8::try_from(HIGHEST_PRIORITY - priority).unwrap_or(0);
    let inverted = char::from(b'0' + inverted);
    format!("{}{inverted}{SEPARATOR}", tenant_prefix(action, tenant))
}

/// Returns the prefix of all ranks of an action, tenant, priority and user.
fn user_prefix(action: &str, tenant: &str, priority: i32, user: &str) -> String {
    format!("{}{user}{SEPARATOR}", priority_prefix(action, tenant, priority))
}

/// Returns the key that follows all ranks with the given prefix, which ends with the separator.
fn key_after_prefix(prefix: &str) -> String {
    format!("{}{AFTER_SEPARATOR}", prefix.trim_end_matches(SEPARATOR))
}

/// Returns the key that directly follows `rank`.
fn key_after(rank: &str) -> String {
    format!("{rank}\0")
}

impl IndexItem {
    fn parse(rank: &str) -> Option<Self> {
        let mut fields = rank.split(SEPARATOR);
        let (action, tenant) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        let priority = HIGHEST_PRIORITY - fields.next()?.parse::<i32>().ok()?;
        let user = fields.next()?.to_owned();
        let not_before = fields.next()?.parse().ok()?;
        let uid = fields.next()?.parse().ok()?;
        Some(Self { rank: rank.to_owned(), action, tenant, priority, user, not_before, uid })
    }

    fn due(&self) -> DueRequest {
        DueRequest {
            uid: self.uid,
            action: self.action.clone(),
            tenant: self.tenant.clone(),
            user: self.user.clone(),
            priority: self.priority,
            not_before: Timestamp::from_millis(self.not_before),
        }
    }

    fn is_of(&self, action: &str, tenant: &str) -> bool {
        self.action == action && self.tenant == tenant
    }
}

/// Cursor that moves forward through one partition of the index.
struct Cursor<'a> {
    dynamo: &'a Dynamo,
    partition: String,
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
            let mut next = self.read(from).await?;
            // A page may contain only damaged items.
            while self.items.is_empty() && !self.exhausted {
                next = self.read(&next).await?;
            }
        }
        Ok(self.items.front())
    }

    /// Reads a page of items at or after the key `from`. Returns the key after them.
    async fn read(&mut self, from: &str) -> Result<String, StoreError> {
        let mut next = from.to_owned();
        let doing = "reading the queue";
        let mut condition =
            Expression::default().when("queue_shard", "=", text(self.partition.as_str()));
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
            next = key_after(rank);
            match IndexItem::parse(rank) {
                Some(item) => self.items.push_back(item),
                // One damaged item must not hide all others.
                None => tracing::error!(rank, "an item of the queue has an invalid rank"),
            }
        }
        Ok(next)
    }
}

/// Returns the first item at or after the key `from` in any of the partitions.
async fn first_item(
    cursors: &mut [Cursor<'_>],
    from: &str,
) -> Result<Option<IndexItem>, StoreError> {
    let firsts = try_join_all(cursors.iter_mut().map(|cursor| cursor.seek(from))).await?;
    let first = firsts.into_iter().flatten().min_by(|one, other| one.rank.cmp(&other.rank));
    Ok(first.cloned())
}

impl Dynamo {
    /// Sets the attributes that put a request into the indexes of the queue.
    pub(crate) fn set_queue_attributes(&self, item: &mut RequestItem, now: Timestamp) {
        let shard = self.shard_of(&item.uid);
        item.tenant_shard = format!("{}{SEPARATOR}{shard}", item.tenant);
        item.queue_rank = Some(rank(item));
        let delayed = item.not_before > now.as_millis();
        let partition = if delayed { Partition::Delayed } else { Partition::Ready };
        item.queue_shard = Some(partition.key(shard));
        item.delay_until = delayed.then_some(item.not_before);
        item.delay_shard = delayed.then(|| shard.to_string());
        item.expire_at = [item.deadline, item.close_by].into_iter().flatten().min();
        item.expiry_shard = item.expire_at.map(|_| shard.to_string());
    }

    pub(crate) fn shard_of(&self, uid: &str) -> u64 {
        let spread = uid.parse::<Uid>().map_or(0, Uid::spread);
        spread % u64::from(self.queue_shards.max(1))
    }

    pub(crate) fn shards(&self) -> impl Iterator<Item = String> + use<> {
        (0..self.queue_shards.max(1)).map(|shard| shard.to_string())
    }

    /// Returns the keys of all partitions of the given kind.
    pub(crate) fn partitions(&self, partition: Partition) -> impl Iterator<Item = String> + use<> {
        (0..self.queue_shards.max(1)).map(move |shard| partition.key(shard.into()))
    }

    /// Returns cursors through the requests that are ready. They read somewhat more than `wanted` items at once.
    fn cursors(&self, wanted: usize) -> Vec<Cursor<'_>> {
        let page = wanted.saturating_add(8).clamp(MIN_PAGE_ITEMS, MAX_PAGE_ITEMS);
        let cursor = |partition| Cursor {
            dynamo: self,
            partition,
            page,
            items: VecDeque::new(),
            exhausted: false,
        };
        self.partitions(Partition::Ready).map(cursor).collect()
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

    pub(crate) async fn stats(&self) -> Result<QueueStats, StoreError> {
        let mut cursors = self.cursors(MAX_PAGE_ITEMS);
        let counts = try_join_all(cursors.iter_mut().map(count_by_action));
        let delayed = self.partitions(Partition::Delayed);
        let delayed = try_join_all(delayed.map(|partition| self.count(partition)));
        let (counts, delayed) = try_join(counts, delayed).await?;
        let mut stats = QueueStats::default();
        for (action, queue) in counts.into_iter().flatten() {
            stats.queued += queue.queued;
            stats.oldest_due =
                [stats.oldest_due, Some(queue.oldest_due)].into_iter().flatten().min();
            let all = stats.by_action.entry(action).or_insert(ActionQueue { queued: 0, ..queue });
            all.queued += queue.queued;
            all.oldest_due = all.oldest_due.min(queue.oldest_due);
        }
        stats.queued = stats.queued.saturating_add(delayed.into_iter().sum()).min(MAX_COUNTED);
        Ok(stats)
    }

    async fn count(&self, partition: String) -> Result<u64, StoreError> {
        let condition = Expression::default().when("queue_shard", "=", text(partition));
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

/// Counts the items of a partition by action: each up to [`MAX_COUNTED_PER_ACTION`], and with the earliest due time of
/// the first [`MAX_GROUPS`] groups. The first item of each group has the earliest due time of the group.
async fn count_by_action(
    cursor: &mut Cursor<'_>,
) -> Result<BTreeMap<String, ActionQueue>, StoreError> {
    let mut counts: BTreeMap<String, ActionQueue> = BTreeMap::new();
    let (mut groups, mut total) = (0, 0);
    let mut from = String::new();
    while let Some(item) = cursor.seek(&from).await? {
        if counts.len() >= MAX_GROUPS && !counts.contains_key(&item.action) {
            break;
        }
        let oldest_due = Timestamp::from_millis(item.not_before);
        let count =
            counts.entry(item.action.clone()).or_insert(ActionQueue { queued: 0, oldest_due });
        count.oldest_due = count.oldest_due.min(oldest_due);
        if count.queued < MAX_COUNTED_PER_ACTION && total < MAX_COUNTED {
            count.queued += 1;
            total += 1;
            from = key_after(&item.rank);
        } else if groups < MAX_GROUPS {
            groups += 1;
            let group = user_prefix(&item.action, &item.tenant, item.priority, &item.user);
            from = key_after_prefix(&group);
        } else {
            from = key_after_prefix(&action_prefix(&item.action));
        }
    }
    Ok(counts)
}
