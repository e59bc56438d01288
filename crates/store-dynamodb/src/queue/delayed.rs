//! Releases delayed requests.

use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, future::try_join_all, stream};
use streamer_core::Timestamp;
use streamer_store::{ReleasedRequests, StoreError};
use tokio::time::Instant;

use super::{Partition, rank};
use crate::{
    client::Dynamo,
    conditional_update::ConditionalUpdate,
    expression::{Expression, number, text},
    item::RequestItem,
    item_ops::{number_of, text_of},
};

/// Number of delayed requests to read first, in each shard.
const FIRST_READ: usize = 8;
/// Number of requests that are released concurrently.
const CONCURRENT_UPDATES: usize = 16;
/// Interval between searches for requests that an earlier version has queued.
const EARLIER_VERSION_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of requests of an earlier version that are moved at once, per shard.
const MAX_MOVED: usize = 100;

impl Dynamo {
    /// Moves up to `limit` delayed requests that are due to the ready requests, earliest first.
    pub(crate) async fn release_delayed(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<ReleasedRequests, StoreError> {
        let moved = self.move_from_earlier_version(now).await?;
        let mut delayed = self.first_delayed(FIRST_READ.min(limit.saturating_add(1))).await?;
        // Usually, few requests are due at the same time.
        if delayed.iter().all(|(until, _)| *until <= now.as_millis()) && !delayed.is_empty() {
            delayed = self.first_delayed(limit.saturating_add(1)).await?;
        }
        let due = delayed.partition_point(|(until, _)| *until <= now.as_millis()).min(limit);
        let next_due = delayed.get(due).map(|(until, _)| Timestamp::from_millis(*until));
        delayed.truncate(due);
        let releases = stream::iter(delayed)
            .map(|(until, uid)| async move { self.release(&uid, until, now).await });
        let () = releases.buffer_unordered(CONCURRENT_UPDATES).try_collect().await?;
        Ok(ReleasedRequests { count: due + moved, next_due })
    }

    /// Returns the due time and the UID of delayed requests, earliest first: at least `count` of them, if there are as many.
    async fn first_delayed(&self, count: usize) -> Result<Vec<(i64, String)>, StoreError> {
        let found = try_join_all(self.shards().map(|shard| {
            let condition = Expression::default().when("delay_shard", "=", text(shard));
            self.query_index(&self.tables.requests, "delayed", condition, count)
        }))
        .await?;
        let mut delayed = Vec::new();
        for item in found.iter().flatten() {
            delayed.push((number_of(item, "delay_until")?, text_of(item, "uid")?.to_owned()));
        }
        delayed.sort();
        Ok(delayed)
    }

    /// Releases a request, unless it was released, claimed or ended in the meantime.
    async fn release(&self, uid: &str, until: i64, now: Timestamp) -> Result<(), StoreError> {
        let shard = self.shard_of(uid);
        let expression = Expression::default()
            .set("queue_shard", text(Partition::Ready.key(shard)))
            .remove(&["delay_shard", "delay_until"])
            .when("queue_shard", "=", text(Partition::Delayed.key(shard)))
            .when("delay_until", "=", number(until));
        let released = self.update_request("releasing a delayed request", uid, expression).await?;
        if let ConditionalUpdate::ConditionFailed(Some(item)) = released {
            self.move_item(&item, now).await?;
        }
        Ok(())
    }

    /// Moves a request that an earlier version has queued. Returns whether it was such a request.
    async fn move_item(&self, item: &RequestItem, now: Timestamp) -> Result<bool, StoreError> {
        let Some(partition) = &item.queue_shard else { return Ok(false) };
        // An earlier version used the number of the shard.
        if partition.parse::<u64>().is_err() {
            return Ok(false);
        }
        // A request without a delay is due for every clock.
        let is_delayed = item.delay_until.is_some_and(|until| until > now.as_millis());
        let kind = if is_delayed { Partition::Delayed } else { Partition::Ready };
        let mut expression = Expression::default()
            .set("queue_shard", text(kind.key(self.shard_of(&item.uid))))
            .set("queue_rank", text(rank(item)))
            .when("queue_shard", "=", text(partition.as_str()));
        if !is_delayed {
            expression = expression.remove(&["delay_shard", "delay_until"]);
        }
        self.update_request("moving a queued request", &item.uid, expression).await?;
        Ok(true)
    }

    /// Moves requests that an earlier version has queued, whose ranks and partitions are different. Returns their
    /// number.
    async fn move_from_earlier_version(&self, now: Timestamp) -> Result<usize, StoreError> {
        {
            let mut search_at = self.search_earlier_version_at.lock();
            if search_at.is_some_and(|at| at > Instant::now()) {
                return Ok(0);
            }
            *search_at = Some(Instant::now() + EARLIER_VERSION_INTERVAL);
        }
        let moved = self.move_page_from_earlier_version(now).await;
        // The search continues at once after a page with requests, and after an error.
        if !matches!(moved, Ok(0)) {
            *self.search_earlier_version_at.lock() = None;
        }
        moved
    }

    async fn move_page_from_earlier_version(&self, now: Timestamp) -> Result<usize, StoreError> {
        let found = try_join_all(self.shards().map(|partition| {
            let condition = Expression::default().when("queue_shard", "=", text(partition));
            self.query_index(&self.tables.requests, "queue", condition, MAX_MOVED)
        }))
        .await?;
        let uids: Result<Vec<String>, _> =
            found.iter().flatten().map(|item| text_of(item, "uid").map(str::to_owned)).collect();
        let items = self.get_many(uids?).await?;
        let moves = stream::iter(items).map(|item| async move { self.move_item(&item, now).await });
        let moved: Vec<bool> = moves.buffer_unordered(CONCURRENT_UPDATES).try_collect().await?;
        let count = moved.into_iter().filter(|is_moved| *is_moved).count();
        if count > 0 {
            tracing::info!(count, "moved requests that an earlier version has queued");
        }
        Ok(count)
    }
}
