//! The log of a request: appending to it, with the change of state, and reading it.

use std::time::Duration;

use aws_sdk_dynamodb::error::ProvideErrorMetadata;
use aws_sdk_dynamodb::types::{
    AttributeValue, ConditionCheck, Put, ReturnConsumedCapacity,
    ReturnValuesOnConditionCheckFailure, TransactWriteItem, Update,
};
use prost::Message;
use streamer_core::{Timestamp, Uid};
use streamer_store::{Append, Appended, EventPage, StoreError, Writer};

use crate::{
    client::{Dynamo, Patience},
    error::{cancelled, damaged, store_error},
    expression::{Expression, key, number, text},
    item::{
        Blob, Kept, RequestItem, RequestState, StoredEvent, StoredKind, StoredValue, encode,
        latest_progress, size,
    },
    requests::{Updated, only_busy, reasons},
};

/// Events stay in the request's item up to so many bytes: every write pays for the whole item, and
/// moving them out costs as much as several writes.
const MAX_EVENTS_BYTES: i64 = 2048;
/// Events of one part: an item holds 400 KB.
const PART_BYTES: usize = 350 * 1024;
/// Events of one transaction, which could hold 4 MB: all of it goes to one partition, which takes
/// 1,000 units a second and some more for a while.
const TRANSACTION_BYTES: usize = 1024 * 1024;
/// Checkpoints up to this stay in the request's item.
const INLINE_CHECKPOINT_BYTES: usize = 512;
/// What belongs to a request goes after it: DynamoDB removes items within days, in no order.
const PARTS_LATER: Duration = Duration::from_secs(7 * 24 * 3600);
const CHECKPOINT: &str = "checkpoint";
/// Looks at a log that changes while it is read, before it is called damaged.
const MAX_TRIES: u32 = 5;
/// Parts of one page at most.
const PAGE_PARTS: i32 = 16;

/// What is to happen to a request.
#[derive(Clone)]
pub(crate) struct Change<'a> {
    pub(crate) writer: Writer,
    pub(crate) events: Vec<StoredEvent>,
    pub(crate) checkpoint: Option<StoredValue>,
    pub(crate) retry_at: Option<Timestamp>,
    pub(crate) now: Timestamp,
    /// Set with it.
    pub(crate) cancel_reason: Option<&'a str>,
}

/// What became of it.
pub(crate) enum Tried {
    /// Done; and why cancellation was asked for, when it was.
    Applied { cancel_reason: Option<String> },
    /// A condition did not hold: the request is like this, if it is there.
    Refused(Option<Box<RequestItem>>),
}

impl Dynamo {
    pub(crate) async fn append(&self, append: &Append) -> Result<Appended, StoreError> {
        let uid = append.uid.to_string();
        let mut events =
            append.events.iter().map(StoredEvent::new).collect::<Result<Vec<_>, _>>()?;
        let mut checkpoint =
            append.checkpoint.clone().map(|data| StoredValue::of("", Some(Blob(data))));
        if let Some(objects) = &self.objects {
            let mut values: Vec<_> = events.iter_mut().filter_map(StoredEvent::value_mut).collect();
            values.extend(checkpoint.as_mut());
            objects.offload(&uid, values).await?;
        }
        let mut change = Change {
            writer: append.writer,
            events,
            checkpoint,
            retry_at: append.retry_at,
            now: append.now,
            cancel_reason: None,
        };
        // What is too large for one transaction goes in several: each is a log that could have been.
        while let Some(first) = self.split(&mut change)? {
            match self.append_change(&uid, &first).await? {
                Appended::Applied { .. } => {}
                other => return Ok(other),
            }
        }
        self.append_change(&uid, &change).await
    }

    /// Takes the first events out of a change that is too large; `None` when it is not.
    fn split<'a>(&self, change: &mut Change<'a>) -> Result<Option<Change<'a>>, StoreError> {
        let mut bytes = 0;
        for position in 0..change.events.len() {
            bytes += size(&encode(&change.events[position])?);
            if bytes > TRANSACTION_BYTES && position > 0 {
                let rest = change.events.split_off(position);
                let events = std::mem::replace(&mut change.events, rest);
                return Ok(Some(Change { events, checkpoint: None, retry_at: None, ..*change }));
            }
        }
        Ok(None)
    }

    async fn append_change(&self, uid: &str, change: &Change<'_>) -> Result<Appended, StoreError> {
        let small = self.bytes_of(&change.events)? <= MAX_EVENTS_BYTES / 2;
        // Usually nobody else has written since, and reading first would be for nothing.
        let mut known = match change.writer {
            Writer::Attempt(_) if small => None,
            _ => match self.get(uid).await? {
                None => return Ok(Appended::NotFound),
                found => found,
            },
        };
        let mut patience = Patience::default();
        loop {
            if let Some(item) = &known
                && let Some(outcome) = self.decide(item, change).await?
            {
                return Ok(outcome);
            }
            known = match self.change(uid, known.as_ref(), change).await? {
                Tried::Applied { cancel_reason } => {
                    return Ok(Appended::Applied { cancel_reason });
                }
                Tried::Refused(None) => return Ok(Appended::NotFound),
                Tried::Refused(Some(item)) => {
                    if known.is_some() {
                        let busy = StoreError::Unavailable {
                            doing: "appending events",
                            reason: "the request changes all the time".into(),
                        };
                        patience.wait(busy).await?;
                    }
                    Some(*item)
                }
            };
        }
    }

    /// Whether a change is done already or must not be done to this request; `None` when it may.
    async fn decide(
        &self,
        item: &RequestItem,
        change: &Change<'_>,
    ) -> Result<Option<Appended>, StoreError> {
        if let (Some(first), Some(last)) = (change.events.first(), change.events.last())
            && last.seq <= item.last_seq
            && self.stored(item, first.seq - 1, change.events.len()).await? == change.events
        {
            return Ok(Some(Appended::Applied { cancel_reason: item.cancel_reason.clone() }));
        }
        let now = change.now.as_millis();
        let may_write = match change.writer {
            Writer::Attempt(attempt) => {
                item.state == RequestState::Running && item.attempt == attempt
            }
            Writer::Queued(attempt) => {
                item.state == RequestState::Queued && item.attempt == attempt
            }
            Writer::ExpiredLease(attempt) => {
                item.state == RequestState::Running
                    && item.attempt == attempt
                    && self.lease_end(item).await? <= now
            }
        };
        let follows = change.events.first().is_none_or(|first| first.seq == item.last_seq + 1);
        if may_write && follows {
            return Ok(None);
        }
        Ok(Some(Appended::Fenced {
            state: item.core_state(),
            attempt: item.attempt,
            last_seq: item.last_seq,
        }))
    }

    /// Tries a change once: on a request that is known to be like this, or else on one whose latest
    /// event is the one before.
    pub(crate) async fn change(
        &self,
        uid: &str,
        known: Option<&RequestItem>,
        change: &Change<'_>,
    ) -> Result<Tried, StoreError> {
        let retries = matches!(
            change.events.last().map(|event| &event.kind),
            Some(StoredKind::Retrying { .. })
        );
        if retries && known.is_none() {
            // Its place in the queue depends on what the request is.
            return Ok(Tried::Refused(self.get(uid).await?.map(Box::new)));
        }
        let added = self.bytes_of(&change.events)?;
        let room = known.is_none_or(|item| item.events_bytes + added <= MAX_EVENTS_BYTES);
        let mut expression = self.conditions(change)?;
        if known.is_none() {
            let most = (MAX_EVENTS_BYTES - added).max(0);
            expression = expression.when("events_bytes", "<=", number(most));
        }
        let large_checkpoint = change.checkpoint.as_ref().is_some_and(is_large);
        let outcome =
            if room && !large_checkpoint && !matches!(change.writer, Writer::ExpiredLease(_)) {
                if !change.events.is_empty() {
                    expression = expression
                        .extend("events", encode(&change.events)?)
                        .add("events_bytes", added);
                }
                if refers_to_object(change) {
                    expression = expression.set("has_parts", AttributeValue::Bool(true));
                }
                self.try_update(uid, self.moves(expression, change, known)?).await?
            } else {
                let Some(item) = known else {
                    // The request has to be known to be changed in a transaction.
                    return Ok(Tried::Refused(self.get(uid).await?.map(Box::new)));
                };
                self.try_transaction(uid, item, room, expression, change).await?
            };
        if let (Tried::Applied { .. }, Some(retention)) = (&outcome, self.retention)
            && change.events.last().is_some_and(is_terminal)
        {
            self.forget_later(uid, known, change.now.plus(retention).plus(PARTS_LATER));
        }
        Ok(outcome)
    }

    /// What must hold for a change.
    fn conditions(&self, change: &Change<'_>) -> Result<Expression, StoreError> {
        let (state, attempt) = match change.writer {
            Writer::Attempt(attempt) | Writer::ExpiredLease(attempt) => {
                (RequestState::Running, attempt)
            }
            Writer::Queued(attempt) => (RequestState::Queued, attempt),
        };
        let mut expression = Expression::default().when("state", "=", encode(&state)?).when(
            "attempt",
            "=",
            number(attempt),
        );
        if let Some(first) = change.events.first() {
            expression = expression.when("last_seq", "=", number(first.seq - 1));
        }
        Ok(expression)
    }

    /// Moves the request to where its last event says it is.
    fn moves(
        &self,
        mut expression: Expression,
        change: &Change<'_>,
        known: Option<&RequestItem>,
    ) -> Result<Expression, StoreError> {
        if let Some(value) = change.checkpoint.as_ref().filter(|value| !is_large(value)) {
            let kept = Kept { value: value.clone(), part: None };
            expression = expression.set("checkpoint", encode(&kept)?);
        }
        if let Some(reason) = change.cancel_reason {
            expression = expression.set("cancel_reason", text(reason));
        }
        let Some(last) = change.events.last() else { return Ok(expression) };
        expression = expression.set("last_seq", number(last.seq));
        let end = |expression: Expression, state| -> Result<Expression, StoreError> {
            let mut expression = expression
                .set("state", encode(&state)?)
                .set("finish_time", number(change.now.as_millis()))
                .remove(&["lease_until", "lease_holder", "worker"]);
            if matches!(change.writer, Writer::Queued(_)) {
                expression = expression.remove(&[
                    "queue_shard",
                    "queue_rank",
                    "delay_shard",
                    "delay_until",
                    "expiry_shard",
                    "expire_at",
                ]);
            }
            if let Some(retention) = self.retention {
                let seconds = change.now.plus(retention).as_millis() / 1000;
                expression = expression.set(crate::tables::TIME_TO_LIVE, number(seconds));
            }
            Ok(expression)
        };
        match &last.kind {
            StoredKind::Succeeded { output, .. } => {
                let output = output.as_ref().map(encode).transpose()?;
                Ok(end(expression, RequestState::Succeeded)?.set_or_remove("output", output))
            }
            StoredKind::Failed { error, output, .. } => {
                let error = error.as_ref().map(encode).transpose()?;
                let output = output.as_ref().map(encode).transpose()?;
                Ok(end(expression, RequestState::Failed)?
                    .set_or_remove("error", error)
                    .set_or_remove("output", output))
            }
            StoredKind::Cancelled { output, .. } => {
                let output = output.as_ref().map(encode).transpose()?;
                Ok(end(expression, RequestState::Cancelled)?.set_or_remove("output", output))
            }
            StoredKind::Retrying { .. } => {
                let retry_at = change.retry_at.unwrap_or(change.now);
                let Some(item) = known else {
                    return Err(damaged("appending events", "the request is not known"));
                };
                let mut queued = item.clone();
                queued.not_before = retry_at.as_millis();
                queued.deadline = None;
                self.enter_queue(&mut queued, change.now);
                let delay_until = queued.delay_until.map(number);
                let expire_at = queued.expire_at.map(number);
                Ok(expression
                    .set("state", encode(&RequestState::Queued)?)
                    .set("not_before", number(retry_at.as_millis()))
                    .remove(&["lease_until", "lease_holder", "worker", "progress"])
                    .set_or_remove("queue_shard", queued.queue_shard.map(text))
                    .set_or_remove("queue_rank", queued.queue_rank.map(text))
                    .set_or_remove("delay_shard", queued.delay_shard.map(text))
                    .set_or_remove("delay_until", delay_until)
                    .set_or_remove("expiry_shard", queued.expiry_shard.map(text))
                    .set_or_remove("expire_at", expire_at))
            }
            _ => Ok(expression),
        }
    }

    async fn try_update(&self, uid: &str, expression: Expression) -> Result<Tried, StoreError> {
        Ok(match self.update_request("appending events", uid, expression).await? {
            Updated::Done(item) => Tried::Applied { cancel_reason: item.cancel_reason },
            Updated::Refused(found) => Tried::Refused(found.map(Box::new)),
        })
    }

    /// The same in a transaction: with events that move into parts, a checkpoint of its own, or the
    /// proof that the holder's lease has ended.
    async fn try_transaction(
        &self,
        uid: &str,
        item: &RequestItem,
        room: bool,
        expression: Expression,
        change: &Change<'_>,
    ) -> Result<Tried, StoreError> {
        let doing = "appending events";
        // The answer tells what was asked for, so that must not change meanwhile.
        let mut expression = expression
            .when_unchanged("cancel_reason", item.cancel_reason.as_deref().map(text))
            .when("last_seq", "=", number(item.last_seq));
        let mut writes = Vec::new();
        if room {
            if !change.events.is_empty() {
                expression = expression
                    .extend("events", encode(&change.events)?)
                    .add("events_bytes", self.bytes_of(&change.events)?);
            }
        } else {
            let moved = item.events.iter().chain(&change.events);
            writes.extend(parts(uid, moved.clone())?);
            let progress = latest_progress(&change.events, item.latest_progress().as_ref());
            let retries = matches!(
                change.events.last().map(|event| &event.kind),
                Some(StoredKind::Retrying { .. })
            );
            expression = expression
                .set("events", AttributeValue::L(Vec::new()))
                .set("events_bytes", number(0));
            if !retries {
                let progress = progress.as_ref().map(encode).transpose()?;
                expression = expression.set_or_remove("progress", progress);
            }
        }
        if let Some(value) = change.checkpoint.as_ref().filter(|value| is_large(value)) {
            let mut part = key([("uid", uid), ("part", CHECKPOINT)]);
            part.insert("data".into(), encode(&value.data)?);
            writes.push((part, false));
            let value = StoredValue { data: None, ..value.clone() };
            let kept = Kept { value, part: Some(CHECKPOINT.into()) };
            expression = expression.set("checkpoint", encode(&kept)?);
        }
        let mut checks = None;
        if matches!(change.writer, Writer::ExpiredLease(_)) {
            expression = expression
                .when_or_missing("lease_until", "<=", number(change.now.as_millis()))
                .when_unchanged("lease_holder", item.lease_holder.as_deref().map(text));
            checks = item.lease_holder.as_deref().map(|holder| {
                let ended = Expression::default().when_or_missing(
                    "alive_until",
                    "<=",
                    number(change.now.as_millis()),
                );
                (holder, ended)
            });
        }
        if !writes.is_empty() || refers_to_object(change) {
            expression = expression.set("has_parts", AttributeValue::Bool(true));
        }
        let expression = self.moves(expression, change, Some(item))?;
        let mut patience = Patience::default();
        loop {
            let update = Update::builder()
                .table_name(&self.tables.requests)
                .set_key(Some(key([("uid", uid)])))
                .set_update_expression(expression.update())
                .set_condition_expression(expression.condition())
                .set_expression_attribute_names(expression.names())
                .set_expression_attribute_values(expression.values())
                .return_values_on_condition_check_failure(
                    ReturnValuesOnConditionCheckFailure::AllOld,
                )
                .build()
                .map_err(|error| damaged(doing, error))?;
            let mut transaction = self
                .client
                .transact_write_items()
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .transact_items(TransactWriteItem::builder().update(update).build());
            for (part, new) in &writes {
                let mut put =
                    Put::builder().table_name(&self.tables.parts).set_item(Some(part.clone()));
                if *new {
                    put = put.condition_expression("attribute_not_exists(uid)");
                }
                let put = put.build().map_err(|error| damaged(doing, error))?;
                transaction =
                    transaction.transact_items(TransactWriteItem::builder().put(put).build());
            }
            if let Some((holder, ended)) = &checks {
                let check = ConditionCheck::builder()
                    .table_name(&self.tables.fleet)
                    .set_key(Some(key([("kind", "holder"), ("name", *holder)])))
                    .set_condition_expression(ended.condition())
                    .set_expression_attribute_names(ended.names())
                    .set_expression_attribute_values(ended.values())
                    .build()
                    .map_err(|error| damaged(doing, error))?;
                transaction = transaction
                    .transact_items(TransactWriteItem::builder().condition_check(check).build());
            }
            let error = match transaction.send().await {
                Ok(done) => {
                    self.metrics.note_write(done.consumed_capacity());
                    let asked = change.cancel_reason.map(str::to_owned);
                    let cancel_reason = asked.or_else(|| item.cancel_reason.clone());
                    return Ok(Tried::Applied { cancel_reason });
                }
                Err(error) => error,
            };
            let error = match reasons(&error) {
                Some(reasons) if only_busy(reasons) => cancelled(doing, reasons),
                Some(_) => return Ok(Tried::Refused(self.get(uid).await?.map(Box::new))),
                None => store_error(doing, error),
            };
            patience.wait(error).await?;
        }
    }

    pub(crate) async fn read_events(
        &self,
        uid: Uid,
        after_seq: i64,
        max_events: usize,
        max_bytes: usize,
    ) -> Result<EventPage, StoreError> {
        let mut page = EventPage { events: Vec::new(), more: false };
        let uid = uid.to_string();
        let mut bytes = 0;
        let mut after = after_seq;
        let mut tries = 0;
        // First the item, then the parts: events only ever move from the one to the others.
        let Some(mut item) = self.get(&uid).await? else { return Ok(page) };
        loop {
            let (events, more) = self.events_after(&item, after).await?;
            let mut wanted = Vec::new();
            let (mut full, mut gap) = (false, after < item.last_seq && events.is_empty() && !more);
            for mut event in events {
                if event.seq <= after || event.seq > item.last_seq {
                    continue;
                }
                gap = event.seq != after + 1;
                full = page.events.len() + wanted.len() >= max_events
                    || (bytes >= max_bytes && !(page.events.is_empty() && wanted.is_empty()));
                if gap || full {
                    break;
                }
                after = event.seq;
                bytes = bytes.saturating_add(bytes_in(&mut event));
                wanted.push(event);
            }
            let values = wanted.iter_mut().filter_map(StoredEvent::value_mut).collect();
            self.restore(values).await?;
            page.events.extend(wanted.into_iter().map(StoredEvent::into_event));
            if full || (!gap && after >= item.last_seq) {
                page.more = full;
                return Ok(page);
            }
            if gap {
                // Parts that were written while they were read: the item tells what there is now.
                tries += 1;
                item = match self.get(&uid).await? {
                    Some(_) if tries > MAX_TRIES => {
                        let reason = format!("request {uid} has no event {}", after + 1);
                        return Err(damaged("reading events", reason));
                    }
                    Some(item) => item,
                    None => return Ok(page),
                };
            }
        }
    }

    /// Events after this one, as far as one call reads, and whether parts hold more.
    async fn events_after(
        &self,
        item: &RequestItem,
        after: i64,
    ) -> Result<(Vec<StoredEvent>, bool), StoreError> {
        let here = item.events.first().is_some_and(|first| first.seq <= after.saturating_add(1));
        if here || after >= item.last_seq {
            return Ok((item.events.clone(), false));
        }
        let (mut events, next) = self.read_parts(&item.uid, after, None).await?;
        if next.is_none() {
            events.extend(item.events.iter().cloned());
        }
        Ok((events, next.is_some()))
    }

    /// Some parts with events after `after`, in order, and where to go on.
    async fn read_parts(
        &self,
        uid: &str,
        after: i64,
        start: Option<crate::expression::Attributes>,
    ) -> Result<(Vec<StoredEvent>, Option<crate::expression::Attributes>), StoreError> {
        let doing = "reading events";
        let page = self
            .client
            .query()
            .table_name(&self.tables.parts)
            .key_condition_expression("uid = :u AND part BETWEEN :f AND :t")
            .expression_attribute_values(":u", text(uid))
            .expression_attribute_values(":f", text(part_name(after.saturating_add(1))))
            .expression_attribute_values(":t", text(part_name(i64::MAX)))
            .consistent_read(true)
            .limit(PAGE_PARTS)
            .set_exclusive_start_key(start)
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await
            .map_err(|error| store_error(doing, error))?;
        self.metrics.note_read(page.consumed_capacity());
        let mut events = Vec::new();
        for mut item in page.items.unwrap_or_default() {
            let list = item.remove("events").unwrap_or(AttributeValue::L(Vec::new()));
            let list: Vec<StoredEvent> =
                serde_dynamo::from_attribute_value(list).map_err(|error| damaged(doing, error))?;
            events.extend(list);
        }
        Ok((events, page.last_evaluated_key))
    }

    /// So many events after this one, as they are stored.
    pub(crate) async fn stored(
        &self,
        item: &RequestItem,
        after: i64,
        count: usize,
    ) -> Result<Vec<StoredEvent>, StoreError> {
        let mut events = Vec::new();
        if item.events.first().is_none_or(|first| first.seq > after + 1) {
            let mut start = None;
            loop {
                let (some, next) = self.read_parts(&item.uid, after, start).await?;
                events.extend(some);
                if next.is_none() || events.len() >= count {
                    break;
                }
                start = next;
            }
        }
        events.extend(item.events.iter().cloned());
        events.retain(|event| event.seq > after);
        events.truncate(count);
        Ok(events)
    }

    /// Names of all parts of a request.
    pub(crate) async fn part_names(&self, uid: &str) -> Result<Vec<String>, StoreError> {
        let doing = "reading parts";
        let mut names = Vec::new();
        let mut start = None;
        loop {
            let page = self
                .client
                .query()
                .table_name(&self.tables.parts)
                .key_condition_expression("uid = :u")
                .expression_attribute_values(":u", text(uid))
                .projection_expression("part")
                .consistent_read(true)
                .set_exclusive_start_key(start)
                .send()
                .await
                .map_err(|error| store_error(doing, error))?;
            for item in page.items() {
                if let Some(AttributeValue::S(name)) = item.get("part") {
                    names.push(name.clone());
                }
            }
            start = page.last_evaluated_key;
            if start.is_none() {
                return Ok(names);
            }
        }
    }

    /// Lets the parts and the name of a request that has ended go with it, beside what its callers
    /// wait for. What this does not reach, because the process ends, stays.
    fn forget_later(&self, uid: &str, known: Option<&RequestItem>, at: Timestamp) {
        if known.is_some_and(|item| item.has_parts.is_none() && item.client_id.is_none()) {
            return;
        }
        let (dynamo, uid) = (self.clone(), uid.to_owned());
        tokio::spawn(async move {
            if let Err(error) = dynamo.forget_parts(&uid, at).await {
                tracing::warn!(%error, uid, "could not set when the parts of a request go");
            }
        });
    }

    async fn forget_parts(&self, uid: &str, at: Timestamp) -> Result<(), StoreError> {
        let Some(item) = self.get(uid).await? else { return Ok(()) };
        let mut keys = Vec::new();
        if let Some(client_id) = &item.client_id {
            let name = crate::requests::name_of(&item.owner(), client_id);
            keys.push((&self.tables.names, key([("name", name.as_str())]), "name"));
        }
        if item.has_parts == Some(true) {
            for part in self.part_names(uid).await? {
                keys.push((&self.tables.parts, key([("uid", uid), ("part", &part)]), "uid"));
            }
        }
        for (table, key, there) in keys {
            let update = Expression::default()
                .set(crate::tables::TIME_TO_LIVE, number(at.as_millis() / 1000))
                .when_there(there);
            let set = self
                .client
                .update_item()
                .table_name(table)
                .set_key(Some(key))
                .set_update_expression(update.update())
                .set_condition_expression(update.condition())
                .set_expression_attribute_names(update.names())
                .set_expression_attribute_values(update.values())
                .send()
                .await;
            match set {
                Ok(_) => {}
                // It is gone already.
                Err(error) if error.code() == Some("ConditionalCheckFailedException") => {}
                Err(error) => return Err(store_error("forgetting a request", error)),
            }
        }
        Ok(())
    }
}

fn is_large(value: &StoredValue) -> bool {
    value.data.as_ref().is_some_and(|data| data.0.len() > INLINE_CHECKPOINT_BYTES)
}

/// Whether some of its values are in the object store.
fn refers_to_object(change: &Change<'_>) -> bool {
    change.checkpoint.as_ref().is_some_and(|value| value.object.is_some())
        || change.events.iter().any(has_object)
}

fn has_object(event: &StoredEvent) -> bool {
    match &event.kind {
        StoredKind::Output { data: value, .. } | StoredKind::Succeeded { result: value, .. } => {
            value.as_ref().is_some_and(|value| value.object.is_some())
        }
        _ => false,
    }
}

fn is_terminal(event: &StoredEvent) -> bool {
    matches!(
        event.kind,
        StoredKind::Succeeded { .. } | StoredKind::Failed { .. } | StoredKind::Cancelled { .. }
    )
}

/// Roughly what an event takes when it is read.
fn bytes_in(event: &mut StoredEvent) -> usize {
    let large = event.value_mut().and_then(|value| value.object.as_ref()).map(|o| o.bytes);
    match large {
        Some(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
        None => event.clone().into_event().encoded_len(),
    }
}

/// Key of the part whose last event is this one: sorts by number.
fn part_name(last_seq: i64) -> String {
    format!("event {last_seq:019}")
}

/// Events as parts, none of them too large; each must be new.
fn parts<'a>(
    uid: &str,
    events: impl Iterator<Item = &'a StoredEvent>,
) -> Result<Vec<(crate::expression::Attributes, bool)>, StoreError> {
    let mut parts = Vec::new();
    let mut list = Vec::new();
    let (mut bytes, mut last_seq) = (0, 0);
    let finish = |list: &mut Vec<AttributeValue>, last_seq: i64| {
        let mut part = key([("uid", uid), ("part", part_name(last_seq).as_str())]);
        part.insert("events".into(), AttributeValue::L(std::mem::take(list)));
        (part, true)
    };
    for event in events {
        let value = encode(event)?;
        let added = size(&value) + 1;
        if bytes + added > PART_BYTES && !list.is_empty() {
            parts.push(finish(&mut list, last_seq));
            bytes = 0;
        }
        bytes += added;
        last_seq = event.seq;
        list.push(value);
    }
    if !list.is_empty() {
        parts.push(finish(&mut list, last_seq));
    }
    Ok(parts)
}
