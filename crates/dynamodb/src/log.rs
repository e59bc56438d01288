//! The log of a request: appending to it, with the change of state, and reading it.

mod read;
mod retention;
mod transaction;

use std::time::Duration;

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
    expression::{Attributes, Expression, key, number, text},
    holders::HOLDER,
    item::{
        Blob, Kept, RequestItem, RequestState, StoredEvent, StoredKind, StoredValue, encode,
        latest_progress, size,
    },
    requests::{Updated, WAITING, bytes_of, name_of, only_busy, reasons},
    tables::TIME_TO_LIVE,
};

/// Events stay in the request's item up to so many bytes: every write pays for the whole item, and
/// moving them out costs as much as several writes.
const MAX_EVENTS_BYTES: i64 = 2048;
/// Events of one part: an item holds 400 KB.
const PART_BYTES: usize = 350 * 1024;
/// Events of one transaction, which could hold 4 MB: all of it goes to one partition, which takes
/// 1,000 units a second and some more for a while.
const TRANSACTION_BYTES: i64 = 1024 * 1024;
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
    /// What the events add to the item.
    pub(crate) bytes: i64,
    pub(crate) checkpoint: Option<StoredValue>,
    pub(crate) retry_at: Option<Timestamp>,
    pub(crate) now: Timestamp,
    /// Set with it.
    pub(crate) cancel_reason: Option<&'a str>,
}

impl Change<'_> {
    /// One that appends events, and nothing else.
    pub(crate) fn new(
        writer: Writer,
        events: Vec<StoredEvent>,
        now: Timestamp,
    ) -> Result<Self, StoreError> {
        let bytes = bytes_of(&events)?;
        let (checkpoint, retry_at, cancel_reason) = (None, None, None);
        Ok(Self { writer, events, bytes, checkpoint, retry_at, now, cancel_reason })
    }

    /// Whether another attempt follows.
    fn retries(&self) -> bool {
        let last = self.events.last().map(|event| &event.kind);
        matches!(last, Some(StoredKind::Retrying { .. }))
    }

    /// Takes the first events out of a change that is too large; `None` when it is not.
    fn split(&mut self) -> Result<Option<Self>, StoreError> {
        if self.bytes <= TRANSACTION_BYTES {
            return Ok(None);
        }
        let mut bytes = 0;
        for position in 0..self.events.len() {
            bytes += bytes_of(&self.events[position..=position])?;
            if bytes > TRANSACTION_BYTES && position > 0 {
                let rest = self.events.split_off(position);
                let events = std::mem::replace(&mut self.events, rest);
                self.bytes = bytes_of(&self.events)?;
                return Self::new(self.writer, events, self.now).map(Some);
            }
        }
        Ok(None)
    }
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
        // Never an object: each one replaces the one before, which an object would outlive.
        let checkpoint =
            append.checkpoint.clone().map(|data| StoredValue::of("", Some(Blob(data))));
        if let Some(objects) = &self.objects {
            let values = events.iter_mut().filter_map(StoredEvent::value_mut).collect();
            objects.offload(&uid, values).await?;
        }
        let mut change = Change {
            checkpoint,
            retry_at: append.retry_at,
            ..Change::new(append.writer, events, append.now)?
        };
        // What is too large for one transaction goes in several: each is a log that could have been.
        while let Some(first) = change.split()? {
            match self.append_change(&uid, &first).await? {
                Appended::Applied { .. } => {}
                other => return Ok(other),
            }
        }
        self.append_change(&uid, &change).await
    }

    async fn append_change(&self, uid: &str, change: &Change<'_>) -> Result<Appended, StoreError> {
        let small = change.bytes <= MAX_EVENTS_BYTES / 2;
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
            if let Some(retention) = self.retention
                && is_terminal(last)
            {
                // Whoever did it may not have come to this.
                let at = change.now.plus(retention).plus(PARTS_LATER);
                self.forget_later(&item.uid, Some(item), at);
            }
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
        if change.retries() && known.is_none() {
            // Its place in the queue depends on what the request is.
            return Ok(Tried::Refused(self.get(uid).await?.map(Box::new)));
        }
        let added = change.bytes;
        let room = known.is_none_or(|item| item.events_bytes + added <= MAX_EVENTS_BYTES);
        let mut expression = conditions(change)?;
        if known.is_none() {
            let most = (MAX_EVENTS_BYTES - added).max(0);
            expression = expression.when("events_bytes", "<=", number(most));
        }
        let large_checkpoint = change.checkpoint.as_ref().is_some_and(is_large);
        let update_suffices =
            room && !large_checkpoint && !matches!(change.writer, Writer::ExpiredLease(_));
        let outcome = if update_suffices {
            if !change.events.is_empty() {
                expression =
                    expression.extend("events", encode(&change.events)?).add("events_bytes", added);
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
            // A transaction may have made parts that were not there before.
            let before = known.filter(|_| update_suffices);
            self.forget_later(uid, before, change.now.plus(retention).plus(PARTS_LATER));
        }
        Ok(outcome)
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
                expression = expression.remove(&WAITING);
            }
            if let Some(retention) = self.retention {
                let seconds = change.now.plus(retention).as_millis() / 1000;
                expression = expression.set(TIME_TO_LIVE, number(seconds));
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
}

/// What must hold for a change.
fn conditions(change: &Change<'_>) -> Result<Expression, StoreError> {
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

/// Key of the part whose last event is this one: sorts by number.
fn part_name(last_seq: i64) -> String {
    format!("event {last_seq:019}")
}
