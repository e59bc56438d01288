//! The stream of the requests table as a trigger: what is queued is told to one of the processors,
//! beside hints and polls. Its shards are leased between them; where one goes on after another, it
//! begins after the last record that the other has noted.

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
use streamer_store::{QueueTrigger, StoreError, Told, WaitingRequest};
use tokio::{sync::Notify, task::JoinHandle, time::sleep};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    calls::{number_of, numbers, text_of},
    client::Dynamo,
    error::{damaged, store_error},
    expression::{Attributes, Expression, key, number, text},
};

const SHARD: &str = "shard";
const READER: &str = "reader";
/// A shard belongs to its reader for so long after it said so last.
const LEASE: Duration = Duration::from_secs(10);
/// Shards are shared out anew, and their leases renewed, so often.
const SHARE_OUT: Duration = Duration::from_secs(3);
/// A shard may be read five times a second, by all readers together.
const PAUSE: Duration = Duration::from_millis(400);
/// Records that one call answers at most.
const PAGE: usize = 1000;
/// Shards are listed anew when one has ended, and after so long: all processors together may do so ten
/// times a second.
const LIST_AGAIN: Duration = Duration::from_secs(30);
/// DynamoDB keeps records for a day; so are the notes of shards that have ended.
const REMEMBER: Duration = Duration::from_secs(2 * 24 * 3600);

/// Follows the stream.
pub(crate) struct StreamTrigger {
    dynamo: Dynamo,
    client: Client,
}

/// The shards of the stream.
struct Listed {
    arn: String,
    shards: Vec<Shard>,
}

/// What is noted of a shard.
#[derive(Clone, Debug, Default)]
struct Note {
    holder: String,
    alive_until: i64,
    /// Sequence number of the last record that was told.
    position: Option<String>,
    ended: bool,
}

impl Note {
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

impl StreamTrigger {
    pub(crate) fn new(dynamo: Dynamo, client: Client) -> Self {
        Self { dynamo, client }
    }

    async fn stream_arn(&self) -> Result<String, StoreError> {
        let doing = "looking for the stream";
        let table = self
            .dynamo
            .client
            .describe_table()
            .table_name(&self.dynamo.tables.requests)
            .send()
            .await
            .map_err(|error| store_error(doing, &error))?;
        let arn = table.table.and_then(|table| table.latest_stream_arn);
        arn.ok_or_else(|| damaged(doing, "the requests table has no stream"))
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
                .map_err(|error| store_error("reading the stream's shards", &error))?;
            let Some(description) = found.stream_description else { return Ok(shards) };
            shards.extend(description.shards.unwrap_or_default());
            start = description.last_evaluated_shard_id;
            if start.is_none() {
                return Ok(shards);
            }
        }
    }

    /// The shards as they were lately.
    async fn listed<'a>(
        &self,
        listed: &'a mut Option<(Timestamp, Listed)>,
        now: Timestamp,
    ) -> Result<&'a Listed, StoreError> {
        let fresh = listed.take().filter(|(at, _)| now.since(*at) < LIST_AGAIN);
        let fresh = match fresh {
            Some(fresh) => fresh,
            None => {
                let arn = self.stream_arn().await?;
                let shards = self.shards(&arn).await?;
                (now, Listed { arn, shards })
            }
        };
        Ok(&listed.insert(fresh).1)
    }

    async fn notes(&self) -> Result<BTreeMap<String, Note>, StoreError> {
        let items = self.dynamo.fleet(SHARD).await?;
        let noted = items
            .iter()
            .filter_map(|item| Some((text_of(item, "name").ok()?.to_owned(), Note::of(item)?)));
        Ok(noted.collect())
    }

    /// Takes a shard, or keeps it; not when somebody else has it.
    async fn lease(
        &self,
        shard: &str,
        holder: &str,
        known: Option<&Note>,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let update = Expression::default()
            .set("holder", text(holder))
            .set("alive_until", number(now.plus(LEASE).as_millis()));
        let update = match known {
            None => update.when_missing("holder"),
            Some(known) => update.when("holder", "=", text(known.holder.as_str())).when(
                "alive_until",
                "=",
                number(known.alive_until),
            ),
        };
        self.note(shard, update).await
    }

    /// Lets others take a shard, if it is still this reader's.
    async fn release(&self, shard: &str, holder: &str) -> Result<(), StoreError> {
        let update =
            Expression::default().set("alive_until", number(0)).when("holder", "=", text(holder));
        self.note(shard, update).await?;
        Ok(())
    }

    /// Notes how far a shard has been told, if it is still this reader's.
    async fn progress(
        &self,
        shard: &str,
        holder: &str,
        position: Option<&str>,
        ended: bool,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let mut update = Expression::default()
            .set("alive_until", number(now.plus(LEASE).as_millis()))
            .when("holder", "=", text(holder));
        if let Some(position) = position {
            update = update.set("position", text(position));
        }
        if ended {
            let seconds = now.plus(REMEMBER).as_millis() / 1000;
            update =
                update.set("ended", text("yes")).set(crate::tables::TIME_TO_LIVE, number(seconds));
        }
        self.note(shard, update).await
    }

    /// Whether the conditions held.
    async fn note(&self, shard: &str, update: Expression) -> Result<bool, StoreError> {
        let (table, key) = (&self.dynamo.tables.fleet, key([("kind", SHARD), ("name", shard)]));
        self.dynamo.update_item("leasing a shard", table, key, &update).await
    }

    /// After this record, or from the first one that there still is.
    async fn iterator(
        &self,
        arn: &str,
        shard: &str,
        position: Option<&str>,
    ) -> Result<Option<String>, StoreError> {
        let ask = |position: Option<&str>| {
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
        let found = match ask(position).await {
            // What was noted is older than a day.
            Err(error) if error.code() == Some("TrimmedDataAccessException") => ask(None).await,
            found => found,
        };
        let found = found.map_err(|error| store_error("reading the stream", &error))?;
        Ok(found.shard_iterator)
    }

    /// Takes this reader's share of the shards, and reads them.
    async fn share_out(
        self: &Arc<Self>,
        reader: &Reader,
        reading: &mut HashMap<String, AbortOnDropHandle<()>>,
        listed: &mut Option<(Timestamp, Listed)>,
    ) -> Result<(), StoreError> {
        let now = reader.clock.now();
        self.dynamo.keep_alive(READER, &reader.name, now.plus(LEASE)).await?;
        let readers = numbers(&self.dynamo.fleet(READER).await?, "name", "alive_until");
        let alive = readers.values().filter(|until| **until > now.as_millis()).count().max(1);
        for (name, until) in &readers {
            if now.minus(REMEMBER).as_millis() > *until {
                self.dynamo.forget_member(READER, name, *until).await?;
            }
        }
        let Listed { arn, shards } = self.listed(listed, now).await?;
        let notes = self.notes().await?;
        let known: BTreeSet<&str> = shards.iter().filter_map(Shard::shard_id).collect();
        let has_ended = |id: &str| notes.get(id).is_some_and(|note| note.ended);
        // A shard comes after the one that it was split from.
        let open: Vec<&Shard> = shards
            .iter()
            .filter(|shard| !shard.shard_id().is_none_or(has_ended))
            .filter(|shard| {
                let parent = shard.parent_shard_id();
                parent.is_none_or(|parent| !known.contains(parent) || has_ended(parent))
            })
            .collect();
        reading.retain(|_, task| !task.is_finished());
        let share = open.len().div_ceil(alive);
        // Others have come, and get what is too much.
        while reading.len() > share
            && let Some(id) = reading.keys().next().cloned()
        {
            drop(reading.remove(&id));
            self.release(&id, &reader.name).await?;
        }
        for shard in open {
            let Some(id) = shard.shard_id() else { continue };
            let note = notes.get(id);
            let mine = note.is_some_and(|note| note.holder == reader.name);
            let free = note.is_none_or(|note| note.alive_until <= now.as_millis());
            if reading.contains_key(id) || !(mine || free) || reading.len() >= share {
                continue;
            }
            if !self.lease(id, &reader.name, note, now).await? {
                continue;
            }
            let position = note.and_then(|note| note.position.clone());
            let task = self.read(reader.clone(), arn.clone(), id.to_owned(), position);
            reading.insert(id.to_owned(), AbortOnDropHandle::new(task));
        }
        // What comes after a shard that has ended is not in the list yet.
        let goes_on = |id: &str| shards.iter().any(|shard| shard.parent_shard_id() == Some(id));
        if known.iter().any(|id| has_ended(id) && !goes_on(id)) {
            *listed = None;
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
                tracing::warn!(%error, shard, "stopped reading a shard of the stream");
            }
        })
    }

    /// Reads a shard to its end, or until it is another's.
    async fn read_shard(
        &self,
        reader: &Reader,
        arn: &str,
        shard: &str,
        mut position: Option<String>,
    ) -> Result<(), StoreError> {
        let mut iterator = self.iterator(arn, shard, position.as_deref()).await?;
        let mut noted = reader.clock.now();
        loop {
            let Some(current) = iterator.take() else {
                let now = reader.clock.now();
                self.progress(shard, &reader.name, position.as_deref(), true, now).await?;
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
                    sleep(PAUSE).await;
                    iterator = self.iterator(arn, shard, position.as_deref()).await?;
                    continue;
                }
                Err(error) => return Err(store_error("reading the stream", &error)),
            };
            if let Some(last) = records.last().and_then(|record| record.dynamodb.as_ref()) {
                position = last.sequence_number.clone();
            }
            let whole_page = records.len() >= PAGE;
            for waiting in waiting(&records) {
                (reader.told)(waiting);
            }
            let now = reader.clock.now();
            if now.since(noted) >= SHARE_OUT {
                noted = now;
                let position = position.as_deref();
                if !self.progress(shard, &reader.name, position, false, now).await? {
                    return Ok(());
                }
            }
            if !whole_page {
                // There is no call that waits for records.
                sleep(PAUSE).await;
            }
        }
    }
}

/// Who reads.
#[derive(Clone)]
struct Reader {
    name: String,
    clock: Arc<dyn Clock>,
    told: Told,
    /// Those that come after it can be read.
    shard_ended: Arc<Notify>,
}

#[async_trait]
impl QueueTrigger for StreamTrigger {
    async fn follow(
        self: Arc<Self>,
        name: String,
        clock: Arc<dyn Clock>,
        told: Told,
        shutdown: CancellationToken,
    ) {
        let reader = Reader { name, clock, told, shard_ended: Arc::default() };
        let mut reading = HashMap::new();
        let mut listed = None;
        loop {
            if let Err(error) = self.share_out(&reader, &mut reading, &mut listed).await {
                tracing::warn!(%error, "cannot share out the shards of the stream");
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = reader.shard_ended.notified() => listed = None,
                () = sleep(SHARE_OUT) => {}
            }
        }
    }
}

/// Those requests that were queued by these records and have not gone on in them.
fn waiting(records: &[Record]) -> Vec<WaitingRequest> {
    let mut latest: BTreeMap<&str, &HashMap<String, AttributeValue>> = BTreeMap::new();
    for record in records {
        let image = record.dynamodb.as_ref().and_then(|change| change.new_image.as_ref());
        if let Some(image) = image
            && let Some(uid) = image_text(image, "uid")
        {
            latest.insert(uid, image);
        }
    }
    latest.into_values().filter_map(waiting_request).collect()
}

fn waiting_request(image: &HashMap<String, AttributeValue>) -> Option<WaitingRequest> {
    if image_text(image, "state")? != "QUEUED" {
        return None;
    }
    let Some(AttributeValue::N(not_before)) = image.get("not_before") else { return None };
    Some(WaitingRequest {
        uid: image_text(image, "uid")?.parse::<Uid>().ok()?,
        action: image_text(image, "action")?.to_owned(),
        tenant: image_text(image, "tenant")?.to_owned(),
        not_before: Timestamp::from_millis(not_before.parse().ok()?),
    })
}

fn image_text<'a>(image: &'a HashMap<String, AttributeValue>, name: &str) -> Option<&'a str> {
    image.get(name)?.as_s().ok().map(String::as_str)
}
