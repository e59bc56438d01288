//! Notifies processors of queued requests through the stream of the requests table, in addition to hints and polling.
//! Each queued request is reported to one processor. Processors lease the shards of the stream; a new reader of a shard
//! starts after the last position that the previous reader stored.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use aws_sdk_dynamodb::error::ProvideErrorMetadata;
use aws_sdk_dynamodbstreams::{
    Client,
    types::{AttributeValue, Record, Shard, ShardIteratorType},
};
use streamer_core::{Clock, Timestamp, Uid};
use streamer_store::{QueueCallback, QueueNotifier, QueuedRequest, StoreError};
use tokio::{sync::Notify, task::JoinHandle, time::sleep};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    client::Dynamo,
    error::{corrupt, store_error},
    expression::{Attributes, Expression, key, number, text},
    item_ops::{number_of, numbers_by_name, text_of},
};

const SHARD_KIND: &str = "shard";
const READER_KIND: &str = "reader";
/// Duration of a shard's lease after its last renewal.
const SHARD_LEASE: Duration = Duration::from_secs(10);
/// Interval at which shards are rebalanced and their leases renewed.
const REBALANCE_INTERVAL: Duration = Duration::from_secs(3);
/// Interval between reads of a shard. Shards are leased, because DynamoDB throttles reads of a shard by more
/// than two readers at the same time.
const POLL_INTERVAL: Duration = Duration::from_millis(400);
/// Maximum number of records in one response.
const MAX_RECORDS: usize = 1000;
/// Maximum age of the shard list, which is also renewed when a shard has ended. All processors together can list shards
/// ten times per second.
const MAX_LIST_AGE: Duration = Duration::from_secs(30);
/// Time for which the state of an ended shard, or of a reader, is kept. DynamoDB keeps stream records for one day.
const SHARD_STATE_TTL: Duration = Duration::from_secs(2 * 24 * 3600);

/// Reads the stream and reports queued requests.
pub(crate) struct StreamNotifier {
    dynamo: Dynamo,
    client: Client,
}

/// List of the shards of the stream.
struct ShardList {
    arn: String,
    shards: Vec<Shard>,
}

/// Stored state of a shard.
#[derive(Clone, Debug, Default)]
struct ShardState {
    holder: String,
    alive_until: i64,
    /// Sequence number of the last reported record.
    position: Option<String>,
    ended: bool,
}

impl ShardState {
    fn of(item: &Attributes) -> Option<Self> {
        let text = |name: &str| text_of(item, name).ok().map(str::to_owned);
        Some(Self {
            holder: text("holder")?,
            alive_until: number_of(item, "alive_until").ok()?,
            position: text("position"),
            ended: text("ended").is_some(),
        })
    }
}

impl StreamNotifier {
    pub(crate) fn new(dynamo: Dynamo, client: Client) -> Self {
        Self { dynamo, client }
    }

    async fn stream_arn(&self) -> Result<String, StoreError> {
        let doing = "finding the stream";
        let table = self
            .dynamo
            .client
            .describe_table()
            .table_name(&self.dynamo.tables.requests)
            .send()
            .await
            .map_err(|error| store_error(doing, &error))?;
        let arn = table.table.and_then(|table| table.latest_stream_arn);
        arn.ok_or_else(|| corrupt(doing, "the requests table has no stream"))
    }

    async fn shards(&self, arn: &str) -> Result<Vec<Shard>, StoreError> {
        let mut shards = Vec::new();
        let mut start = None;
        loop {
            let found = self
                .client
                .describe_stream()
                .stream_arn(arn)
                .set_exclusive_start_shard_id(start)
                .send()
                .await
                .map_err(|error| store_error("reading the stream shards", &error))?;
            let Some(description) = found.stream_description else { return Ok(shards) };
            shards.extend(description.shards.unwrap_or_default());
            start = description.last_evaluated_shard_id;
            if start.is_none() {
                return Ok(shards);
            }
        }
    }

    /// Returns the shard list, renewed if it is older than its maximum age.
    async fn shard_list<'a>(
        &self,
        shard_list: &'a mut Option<(Timestamp, ShardList)>,
        now: Timestamp,
    ) -> Result<&'a ShardList, StoreError> {
        let fresh = shard_list.take().filter(|(at, _)| now.since(*at) < MAX_LIST_AGE);
        let fresh = match fresh {
            Some(fresh) => fresh,
            None => {
                let arn = self.stream_arn().await?;
                let shards = self.shards(&arn).await?;
                (now, ShardList { arn, shards })
            }
        };
        Ok(&shard_list.insert(fresh).1)
    }

    async fn shard_states(&self) -> Result<BTreeMap<String, ShardState>, StoreError> {
        let items = self.dynamo.list_members(SHARD_KIND).await?;
        let states = items.iter().filter_map(|item| {
            Some((text_of(item, "name").ok()?.to_owned(), ShardState::of(item)?))
        });
        Ok(states.collect())
    }

    /// Acquires or renews the lease of a shard, unless the lease changed since `known` was read.
    async fn lease(
        &self,
        shard: &str,
        holder: &str,
        known: Option<&ShardState>,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let update = Expression::default()
            .set("holder", text(holder))
            .set("alive_until", number(now.plus(SHARD_LEASE).as_millis()));
        let update = match known {
            None => update.when_missing("holder"),
            Some(known) => update.when("holder", "=", text(known.holder.as_str())).when(
                "alive_until",
                "=",
                number(known.alive_until),
            ),
        };
        self.update_shard(shard, update).await
    }

    /// Releases the lease of a shard, if this reader still holds it.
    async fn release(&self, shard: &str, holder: &str) -> Result<(), StoreError> {
        let update =
            Expression::default().set("alive_until", number(0)).when("holder", "=", text(holder));
        self.update_shard(shard, update).await?;
        Ok(())
    }

    /// Stores the position in a shard, if this reader still holds its lease.
    async fn store_position(
        &self,
        shard: &str,
        holder: &str,
        position: Option<&str>,
        ended: bool,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let mut update = Expression::default()
            .set("alive_until", number(now.plus(SHARD_LEASE).as_millis()))
            .when("holder", "=", text(holder));
        if let Some(position) = position {
            update = update.set("position", text(position));
        }
        if ended {
            let seconds = now.plus(SHARD_STATE_TTL).as_millis() / 1000;
            update =
                update.set("ended", text("yes")).set(crate::tables::TIME_TO_LIVE, number(seconds));
        }
        self.update_shard(shard, update).await
    }

    /// Updates the state of a shard. Returns whether the conditions were met.
    async fn update_shard(&self, shard: &str, update: Expression) -> Result<bool, StoreError> {
        let (table, key) =
            (&self.dynamo.tables.fleet, key([("kind", SHARD_KIND), ("name", shard)]));
        self.dynamo.update_item("leasing a shard", table, key, &update).await
    }

    /// Returns an iterator that starts after `position`; `None` for the oldest available record.
    async fn iterator(
        &self,
        arn: &str,
        shard: &str,
        position: Option<&str>,
    ) -> Result<Option<String>, StoreError> {
        let request_iterator = |position: Option<&str>| {
            let from = match position {
                Some(_) => ShardIteratorType::AfterSequenceNumber,
                None => ShardIteratorType::TrimHorizon,
            };
            self.client
                .get_shard_iterator()
                .stream_arn(arn)
                .shard_id(shard)
                .shard_iterator_type(from)
                .set_sequence_number(position.map(str::to_owned))
                .send()
        };
        let found = match request_iterator(position).await {
            // The stored position is older than a day.
            Err(error) if error.code() == Some("TrimmedDataAccessException") => {
                request_iterator(None).await
            }
            found => found,
        };
        let found = found.map_err(|error| store_error("reading the stream", &error))?;
        Ok(found.shard_iterator)
    }

    /// Acquires this reader's share of the shards, and starts to read them.
    async fn rebalance(
        self: &Arc<Self>,
        reader: &Reader,
        reading: &mut HashMap<String, AbortOnDropHandle<()>>,
        shard_list: &mut Option<(Timestamp, ShardList)>,
    ) -> Result<(), StoreError> {
        let now = reader.clock.now();
        self.dynamo.renew_member(READER_KIND, &reader.name, now.plus(SHARD_LEASE)).await?;
        let readers =
            numbers_by_name(&self.dynamo.list_members(READER_KIND).await?, "name", "alive_until");
        let alive = readers.values().filter(|until| **until > now.as_millis()).count().max(1);
        for (name, until) in &readers {
            if now.minus(SHARD_STATE_TTL).as_millis() > *until {
                self.dynamo.remove_member(READER_KIND, name, *until).await?;
            }
        }
        let ShardList { arn, shards } = self.shard_list(shard_list, now).await?;
        let shard_states = self.shard_states().await?;
        let known: BTreeSet<&str> = shards.iter().filter_map(Shard::shard_id).collect();
        let has_ended = |id: &str| shard_states.get(id).is_some_and(|state| state.ended);
        // A shard may be read only after its parent has ended.
        let readable: Vec<&Shard> = shards
            .iter()
            .filter(|shard| !shard.shard_id().is_none_or(has_ended))
            .filter(|shard| {
                let parent = shard.parent_shard_id();
                parent.is_none_or(|parent| !known.contains(parent) || has_ended(parent))
            })
            .collect();
        reading.retain(|_, task| !task.is_finished());
        let share = readable.len().div_ceil(alive);
        // Shards beyond the share are released for other readers.
        while reading.len() > share
            && let Some(id) = reading.keys().next().cloned()
        {
            drop(reading.remove(&id));
            self.release(&id, &reader.name).await?;
        }
        for shard in readable {
            let Some(id) = shard.shard_id() else { continue };
            let state = shard_states.get(id);
            let is_own = state.is_some_and(|state| state.holder == reader.name);
            let is_free = state.is_none_or(|state| state.alive_until <= now.as_millis());
            if reading.contains_key(id) || !(is_own || is_free) || reading.len() >= share {
                continue;
            }
            if !self.lease(id, &reader.name, state, now).await? {
                continue;
            }
            let position = state.and_then(|state| state.position.clone());
            let task = self.read(reader.clone(), arn.clone(), id.to_owned(), position);
            reading.insert(id.to_owned(), AbortOnDropHandle::new(task));
        }
        // The list does not yet contain the children of an ended shard.
        let has_child = |id: &str| shards.iter().any(|shard| shard.parent_shard_id() == Some(id));
        if known.iter().any(|id| has_ended(id) && !has_child(id)) {
            *shard_list = None;
        }
        Ok(())
    }

    fn read(
        self: &Arc<Self>,
        reader: Reader,
        arn: String,
        shard: String,
        position: Option<String>,
    ) -> JoinHandle<()> {
        let trigger = self.clone();
        tokio::spawn(async move {
            if let Err(error) = trigger.read_shard(&reader, &arn, &shard, position).await {
                tracing::warn!(%error, shard, "failed to read a stream shard");
            }
        })
    }

    /// Reads a shard until it ends, or until the lease is lost.
    async fn read_shard(
        &self,
        reader: &Reader,
        arn: &str,
        shard: &str,
        mut position: Option<String>,
    ) -> Result<(), StoreError> {
        let mut iterator = self.iterator(arn, shard, position.as_deref()).await?;
        let mut stored_at = reader.clock.now();
        loop {
            let Some(current) = iterator.take() else {
                let now = reader.clock.now();
                self.store_position(shard, &reader.name, position.as_deref(), true, now).await?;
                reader.shard_ended.notify_one();
                return Ok(());
            };
            let found = self.client.get_records().shard_iterator(current).send().await;
            let records = match found {
                Ok(found) => {
                    iterator = found.next_shard_iterator;
                    found.records.unwrap_or_default()
                }
                Err(error)
                    if matches!(
                        error.code(),
                        Some("ExpiredIteratorException" | "TrimmedDataAccessException")
                    ) =>
                {
                    sleep(POLL_INTERVAL).await;
                    iterator = self.iterator(arn, shard, position.as_deref()).await?;
                    continue;
                }
                Err(error) => return Err(store_error("reading the stream", &error)),
            };
            if let Some(last) = records.last().and_then(|record| record.dynamodb.as_ref()) {
                position = last.sequence_number.clone();
            }
            let is_full_page = records.len() >= MAX_RECORDS;
            for request in queued_requests(&records) {
                (reader.notify)(request);
            }
            let now = reader.clock.now();
            if now.since(stored_at) >= REBALANCE_INTERVAL {
                stored_at = now;
                let position = position.as_deref();
                if !self.store_position(shard, &reader.name, position, false, now).await? {
                    return Ok(());
                }
            }
            if !is_full_page {
                // DynamoDB has no call that waits for records.
                sleep(POLL_INTERVAL).await;
            }
        }
    }
}

/// Reader of the stream.
#[derive(Clone)]
struct Reader {
    name: String,
    clock: Arc<dyn Clock>,
    notify: QueueCallback,
    /// Notified when a shard has ended, so that its children can be read.
    shard_ended: Arc<Notify>,
}

#[async_trait]
impl QueueNotifier for StreamNotifier {
    async fn follow(
        self: Arc<Self>,
        name: String,
        clock: Arc<dyn Clock>,
        notify: QueueCallback,
        shutdown: CancellationToken,
    ) {
        let reader = Reader { name, clock, notify, shard_ended: Arc::default() };
        let mut reading = HashMap::new();
        let mut shard_list = None;
        loop {
            if let Err(error) = self.rebalance(&reader, &mut reading, &mut shard_list).await {
                tracing::warn!(%error, "failed to rebalance the stream shards");
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = reader.shard_ended.notified() => shard_list = None,
                () = sleep(REBALANCE_INTERVAL) => {}
            }
        }
    }
}

/// Returns the requests that are queued according to their latest record.
fn queued_requests(records: &[Record]) -> Vec<QueuedRequest> {
    let mut latest: BTreeMap<&str, &HashMap<String, AttributeValue>> = BTreeMap::new();
    for record in records {
        let image = record.dynamodb.as_ref().and_then(|change| change.new_image.as_ref());
        if let Some(image) = image
            && let Some(uid) = image_text(image, "uid")
        {
            latest.insert(uid, image);
        }
    }
    latest.into_values().filter_map(queued_request).collect()
}

fn queued_request(image: &HashMap<String, AttributeValue>) -> Option<QueuedRequest> {
    if image_text(image, "state")? != "QUEUED" {
        return None;
    }
    let delay_until = image.get("delay_until").and_then(|until| until.as_n().ok());
    let not_before = match delay_until {
        Some(until) => Some(Timestamp::from_millis(until.parse().ok()?)),
        None => None,
    };
    Some(QueuedRequest {
        uid: image_text(image, "uid")?.parse::<Uid>().ok()?,
        action: image_text(image, "action")?.to_owned(),
        tenant: image_text(image, "tenant")?.to_owned(),
        user: image_text(image, "user")?.to_owned(),
        not_before,
    })
}

fn image_text<'a>(image: &'a HashMap<String, AttributeValue>, name: &str) -> Option<&'a str> {
    image.get(name)?.as_s().ok().map(String::as_str)
}
