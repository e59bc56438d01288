//! Log of a request: appends, with the state change, and reads.

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
use streamer_store::{Append, AppendOutcome, EventPage, StoreError, Writer};

use crate::{
    client::{Backoff, Dynamo},
    error::{corrupt, store_error, transaction_error},
    expression::{Attributes, Expression, key, number, text},
    item::{
        Blob, RequestItem, RequestState, StoredEvent, StoredKind, StoredRef, StoredValue, encode,
        latest_progress, size,
    },
    lease_holders::HOLDER,
    requests::{
        ConditionalUpdate, QUEUE_ATTRIBUTES, cancellation_reasons, client_id_key, events_size,
        is_transient,
    },
    tables::TIME_TO_LIVE,
};

/// Bytes of events that stay in the request's item: every write pays for the whole item, and moving
/// events out costs as much as several writes.
const INLINE_EVENTS_BYTES: i64 = 2048;
/// Maximum size of the events of one part: an item holds 400 KB.
const MAX_PART_BYTES: usize = 350 * 1024;
/// Maximum size of the events of one transaction, which could hold 4 MB: all of it goes to one
/// partition, which takes 1,000 units a second, and some more for a while.
const MAX_TRANSACTION_BYTES: i64 = 1024 * 1024;
/// Maximum size of a checkpoint in the request's item.
const INLINE_CHECKPOINT_BYTES: usize = 512;
/// How long after a request its parts are removed: DynamoDB removes items within days, in no order.
const PARTS_DELAY: Duration = Duration::from_secs(7 * 24 * 3600);
const CHECKPOINT: &str = "checkpoint";
/// Maximum number of rereads of a log that changes while it is read, before it is reported as
/// corrupt.
const MAX_REREADS: u32 = 5;
/// Maximum number of parts of one page.
const MAX_PAGE_PARTS: i32 = 16;

/// Change of a request.
#[derive(Clone)]
pub(crate) struct Change<'a> {
    pub(crate) writer: Writer,
    pub(crate) events: Vec<StoredEvent>,
    /// Size that the events add to the item.
    pub(crate) bytes: i64,
    pub(crate) checkpoint: Option<StoredValue>,
    pub(crate) retry_at: Option<Timestamp>,
    pub(crate) now: Timestamp,
    /// Reason of a cancellation, set with the change.
    pub(crate) cancel_reason: Option<&'a str>,
}

impl Change<'_> {
    /// Returns a change that only appends events.
    pub(crate) fn new(
        writer: Writer,
        events: Vec<StoredEvent>,
        now: Timestamp,
    ) -> Result<Self, StoreError> {
        let bytes = events_size(&events)?;
        let (checkpoint, retry_at, cancel_reason) = (None, None, None);
        Ok(Self { writer, events, bytes, checkpoint, retry_at, now, cancel_reason })
    }

    /// Returns whether the change schedules a retry.
    fn schedules_retry(&self) -> bool {
        let last = self.events.last().map(|event| &event.kind);
        matches!(last, Some(StoredKind::Retrying { .. }))
    }

    /// Splits the first events off a change that is too large; returns `None` if it is not.
    fn split(&mut self) -> Result<Option<Self>, StoreError> {
        if self.bytes <= MAX_TRANSACTION_BYTES {
            return Ok(None);
        }
        let mut bytes = 0;
        for position in 0..self.events.len() {
            bytes += events_size(&self.events[position..=position])?;
            if bytes > MAX_TRANSACTION_BYTES && position > 0 {
                let rest = self.events.split_off(position);
                let events = std::mem::replace(&mut self.events, rest);
                self.bytes = events_size(&self.events)?;
                return Self::new(self.writer, events, self.now).map(Some);
            }
        }
        Ok(None)
    }
}

/// Outcome of a change.
pub(crate) enum ChangeOutcome {
    /// The change is stored. `cancel_reason` is the reason of the cancellation request, if any.
    Applied { cancel_reason: Option<String> },
    /// A condition failed. The request, if it exists, is this one.
    ConditionFailed(Option<Box<RequestItem>>),
}

impl Dynamo {
    pub(crate) async fn append(&self, append: &Append) -> Result<AppendOutcome, StoreError> {
        let uid = append.uid.to_string();
        let mut events =
            append.events.iter().map(StoredEvent::new).collect::<Result<Vec<_>, _>>()?;
        // Never an object: a checkpoint replaces the previous one, and an object would outlive it.
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
        // A change that is too large for one transaction is split; the log is valid after each.
        while let Some(first) = change.split()? {
            match self.append_change(&uid, &first).await? {
                AppendOutcome::Applied { .. } => {}
                other => return Ok(other),
            }
        }
        self.append_change(&uid, &change).await
    }

    async fn append_change(
        &self,
        uid: &str,
        change: &Change<'_>,
    ) -> Result<AppendOutcome, StoreError> {
        let small = change.bytes <= INLINE_EVENTS_BYTES / 2;
        // Usually there was no other write since, so reading first would be useless.
        let mut previous = match change.writer {
            Writer::Attempt(_) if small => None,
            _ => match self.get(uid).await? {
                None => return Ok(AppendOutcome::NotFound),
                found => found,
            },
        };
        let mut backoff = Backoff::default();
        loop {
            if let Some(item) = &previous
                && let Some(outcome) = self.decide(item, change).await?
            {
                return Ok(outcome);
            }
            previous = match self.try_change(uid, previous.as_ref(), change).await? {
                ChangeOutcome::Applied { cancel_reason } => {
                    return Ok(AppendOutcome::Applied { cancel_reason });
                }
                ChangeOutcome::ConditionFailed(None) => return Ok(AppendOutcome::NotFound),
                ChangeOutcome::ConditionFailed(Some(item)) => {
                    if previous.is_some() {
                        let contention = StoreError::Unavailable {
                            doing: "appending events",
                            reason: "the request keeps changing".into(),
                        };
                        backoff.wait(contention).await?;
                    }
                    Some(*item)
                }
            };
        }
    }

    /// Returns the outcome if the change is already stored or not allowed; `None` if it may be
    /// tried.
    async fn decide(
        &self,
        item: &RequestItem,
        change: &Change<'_>,
    ) -> Result<Option<AppendOutcome>, StoreError> {
        if let (Some(first), Some(last)) = (change.events.first(), change.events.last())
            && last.seq <= item.last_seq
            && self.stored_events(item, first.seq - 1, change.events.len()).await? == change.events
        {
            if let Some(retention) = self.retention
                && is_terminal(last)
            {
                // The earlier call may have failed before this step.
                let at = change.now.plus(retention).plus(PARTS_DELAY);
                self.expire_parts_in_background(&item.uid, Some(item), at);
            }
            return Ok(Some(AppendOutcome::Applied { cancel_reason: item.cancel_reason.clone() }));
        }
        let now = change.now.as_millis();
        let can_write = match change.writer {
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
        if can_write && follows {
            return Ok(None);
        }
        Ok(Some(AppendOutcome::Fenced {
            state: item.core_state(),
            attempt: item.attempt,
            last_seq: item.last_seq,
        }))
    }

    /// Tries a change once: on the request as read before, else on any request whose latest event
    /// precedes the change.
    pub(crate) async fn try_change(
        &self,
        uid: &str,
        previous: Option<&RequestItem>,
        change: &Change<'_>,
    ) -> Result<ChangeOutcome, StoreError> {
        if change.schedules_retry() && previous.is_none() {
            // The queue attributes depend on the request.
            return Ok(ChangeOutcome::ConditionFailed(self.get(uid).await?.map(Box::new)));
        }
        let added = change.bytes;
        let fits_item =
            previous.is_none_or(|item| item.events_bytes + added <= INLINE_EVENTS_BYTES);
        let mut expression = conditions(change)?;
        if previous.is_none() {
            let max_bytes = (INLINE_EVENTS_BYTES - added).max(0);
            expression = expression.when("events_bytes", "<=", number(max_bytes));
        }
        let large_checkpoint = change.checkpoint.as_ref().is_some_and(is_large);
        let needs_no_transaction =
            fits_item && !large_checkpoint && !matches!(change.writer, Writer::ExpiredLease(_));
        let outcome = if needs_no_transaction {
            if !change.events.is_empty() {
                expression =
                    expression.extend("events", encode(&change.events)?).add("events_bytes", added);
            }
            if refers_to_object(change) {
                expression = expression.set("has_parts", AttributeValue::Bool(true));
            }
            self.try_update(uid, self.state_transition_update(expression, change, previous)?)
                .await?
        } else {
            let Some(item) = previous else {
                // A transaction needs the request.
                return Ok(ChangeOutcome::ConditionFailed(self.get(uid).await?.map(Box::new)));
            };
            self.try_transaction(uid, item, fits_item, expression, change).await?
        };
        if let (ChangeOutcome::Applied { .. }, Some(retention)) = (&outcome, self.retention)
            && change.events.last().is_some_and(is_terminal)
        {
            // A transaction may have added parts to the request.
            let unchanged = previous.filter(|_| needs_no_transaction);
            self.expire_parts_in_background(
                uid,
                unchanged,
                change.now.plus(retention).plus(PARTS_DELAY),
            );
        }
        Ok(outcome)
    }

    /// Returns the update of the state that follows from the last event.
    fn state_transition_update(
        &self,
        mut expression: Expression,
        change: &Change<'_>,
        previous: Option<&RequestItem>,
    ) -> Result<Expression, StoreError> {
        if let Some(value) = change.checkpoint.as_ref().filter(|value| !is_large(value)) {
            let stored_ref = StoredRef { value: value.clone(), part: None };
            expression = expression.set("checkpoint", encode(&stored_ref)?);
        }
        if let Some(reason) = change.cancel_reason {
            expression = expression.set("cancel_reason", text(reason));
        }
        let Some(last) = change.events.last() else { return Ok(expression) };
        expression = expression.set("last_seq", number(last.seq));
        let finish = |expression: Expression, state| -> Result<Expression, StoreError> {
            let mut expression = expression
                .set("state", encode(&state)?)
                .set("finish_time", number(change.now.as_millis()))
                .remove(&["lease_until", "lease_holder", "worker"]);
            if matches!(change.writer, Writer::Queued(_)) {
                expression = expression.remove(&QUEUE_ATTRIBUTES);
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
                Ok(finish(expression, RequestState::Succeeded)?.set_or_remove("output", output))
            }
            StoredKind::Failed { error, output, .. } => {
                let error = error.as_ref().map(encode).transpose()?;
                let output = output.as_ref().map(encode).transpose()?;
                Ok(finish(expression, RequestState::Failed)?
                    .set_or_remove("error", error)
                    .set_or_remove("output", output))
            }
            StoredKind::Cancelled { output, .. } => {
                let output = output.as_ref().map(encode).transpose()?;
                Ok(finish(expression, RequestState::Cancelled)?.set_or_remove("output", output))
            }
            StoredKind::Retrying { .. } => {
                let retry_at = change.retry_at.unwrap_or(change.now);
                let Some(item) = previous else {
                    return Err(corrupt("appending events", "the request was not read"));
                };
                let mut queued = item.clone();
                queued.not_before = retry_at.as_millis();
                queued.deadline = None;
                self.set_queue_attributes(&mut queued, change.now);
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

    async fn try_update(
        &self,
        uid: &str,
        expression: Expression,
    ) -> Result<ChangeOutcome, StoreError> {
        Ok(match self.update_request("appending events", uid, expression).await? {
            ConditionalUpdate::Applied(item) => {
                ChangeOutcome::Applied { cancel_reason: item.cancel_reason }
            }
            ConditionalUpdate::ConditionFailed(found) => {
                ChangeOutcome::ConditionFailed(found.map(Box::new))
            }
        })
    }
}

/// Returns the conditions of a change.
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

/// Returns whether the change refers to the object store.
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

/// Returns the key of the part whose last event is this one; keys sort by number.
fn event_part_key(last_seq: i64) -> String {
    format!("event {last_seq:019}")
}
