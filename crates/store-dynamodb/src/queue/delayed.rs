//! Releases delayed requests.

use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, future::try_join_all, stream};
use streamer_core::{RequestState, Timestamp};
use streamer_store::{ReleasedRequests, StoreError};
use tokio::time::Instant;

use super::{Partition, rank};
use crate::{
    client::Dynamo,
    expression::{Expression, number, text},
    item_ops::{number_of, text_of},
};

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
        let read = limit.saturating_add(1);
        let found = try_join_all(self.shards().map(|shard| {
            let condition = Expression::default().when("delay_shard", "=", text(shard));
            self.query_index(&self.tables.requests, "delayed", condition, read)
        }))
        .await?;
        let mut delayed = Vec::new();
        for item in found.iter().flatten() {
            delayed.push((number_of(item, "delay_until")?, text_of(item, "uid")?.to_owned()));
        }
        delayed.sort();
        let due = delayed.partition_point(|(until, _)| *until <= now.as_millis()).min(limit);
        let next_due = delayed.get(due).map(|(until, _)| Timestamp::from_millis(*until));
        delayed.truncate(due);
        let releases = stream::iter(delayed)
            .map(|(until, uid)| async move { self.release(&uid, until).await });
        let () = releases.buffer_unordered(CONCURRENT_UPDATES).try_collect().await?;
        Ok(ReleasedRequests { count: due + moved, next_due })
    }

    /// Releases a request, unless it was released, claimed or ended in the meantime.
    async fn release(&self, uid: &str, until: i64) -> Result<(), StoreError> {
        let expression = Expression::default()
            .set("queue_shard", text(Partition::Ready.key(self.shard_of(uid))))
            .remove(&["delay_shard", "delay_until"])
            .when("state", "=", text(RequestState::Queued.as_str()))
            .when("delay_until", "=", number(until));
        self.update_request("releasing a delayed request", uid, expression).await?;
        Ok(())
    }

    /// Moves requests that an earlier version has queued, whose ranks and partitions are different. Returns their
    /// number.
    async fn move_from_earlier_version(&self, now: Timestamp) -> Result<usize, StoreError> {
        {
            let mut searched_at = self.earlier_version_searched_at.lock();
            let is_due = searched_at.is_none_or(|at| at.elapsed() >= EARLIER_VERSION_INTERVAL);
            if !is_due {
                return Ok(0);
            }
            *searched_at = Some(Instant::now());
        }
        let found = try_join_all(self.shards().map(|partition| {
            let condition = Expression::default().when("queue_shard", "=", text(partition));
            self.query_index(&self.tables.requests, "queue", condition, MAX_MOVED)
        }))
        .await?;
        let uids: Result<Vec<String>, _> =
            found.iter().flatten().map(|item| text_of(item, "uid").map(str::to_owned)).collect();
        let items = self.get_many(uids?).await?;
        let count = items.len();
        for item in items {
            let Some(partition) = item.queue_shard.clone() else { continue };
            let is_delayed = item.not_before > now.as_millis();
            let kind = if is_delayed { Partition::Delayed } else { Partition::Ready };
            let mut expression = Expression::default()
                .set("queue_shard", text(kind.key(self.shard_of(&item.uid))))
                .set("queue_rank", text(rank(&item)))
                .when("queue_shard", "=", text(partition));
            if !is_delayed {
                expression = expression.remove(&["delay_shard", "delay_until"]);
            }
            self.update_request("moving a queued request", &item.uid, expression).await?;
        }
        if count > 0 {
            tracing::info!(count, "moved requests that an earlier version has queued");
        }
        Ok(count)
    }
}
