//! Log of a request: appends events together with the state change, and reads events.

mod read;
mod retention;
mod transaction;

use std::time::Duration;

use aws_sdk_dynamodb::types::{
    AttributeValue, ConditionCheck, Put, ReturnConsumedCapacity,
    ReturnValuesOnConditionCheckFailure, TransactWriteItem, Update,
};
use prost::Message;
use streamer_core::{RequestState, Seq, Timestamp, Uid};
use streamer_store::{Append, AppendOutcome, EventPage, LogHead, StoreError, Writer};

use crate::{
    client::{Backoff, Dynamo},
    conditional_update::ConditionalUpdate,
    error::{cancellation_reasons, corrupt, is_transient, store_error, transaction_error},
    expression::{Attributes, Expression, attempt_number, key, number, seq, text},
    item::{
        Blob, QUEUE_ATTRIBUTES, RequestItem, StoredEvent, StoredKind, StoredRef, StoredValue,
        client_id_key, encode, events_size, latest_progress, size,
    },
    lease_holders::HOLDER,
    tables::TIME_TO_LIVE,
};

/// Maximum size of the events in the request's item, in bytes. Every write is charged for the whole item, and moving
/// events to parts costs as much as several writes.
const INLINE_EVENTS_BYTES: i64 = 2048;
/// Maximum size of the events in one part, in bytes. An item can have at most 400 KB.
const MAX_PART_BYTES: usize = 350 * 1024;
/// Maximum size of the events in one transaction, in bytes. A transaction can have up to 4 MB, but all events of a
/// request go to one partition, which accepts 1,000 write units per second, and more only for a short time.
const MAX_TRANSACTION_BYTES: i64 = 1024 * 1024;
/// Maximum size of a checkpoint in the request's item, in bytes.
const INLINE_CHECKPOINT_BYTES: usize = 512;
/// Time between the expiry of a request and the expiry of its parts. DynamoDB removes expired items within days, in no
/// particular order.
const PARTS_DELAY: Duration = Duration::from_secs(7 * 24 * 3600);
/// Key of the part that contains the checkpoint.
const CHECKPOINT: &str = "checkpoint";
/// Maximum number of times that a log is read again because it changed during the read; after that, it is reported as
/// corrupt.
const MAX_REREADS: u32 = 5;
/// Maximum number of parts in one page.
const MAX_PAGE_PARTS: i32 = 16;

/// Change of a request.
#[derive(Clone)]
pub(crate) struct Change<'a> {
    pub(crate) writer: Writer,
    pub(crate) events: Vec<StoredEvent>,
    /// Number of bytes that the events add to the item.
    pub(crate) bytes: i64,
    pub(crate) checkpoint: Option<StoredValue>,
    pub(crate) retry_at: Option<Timestamp>,
    pub(crate) now: Timestamp,
    /// Reason given in a cancellation request, which is stored with the change.
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

    /// Splits off the first events of a change that is too large for one transaction. Returns `None` if the change is
    /// not too large.
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
    /// The change is stored. `cancel_reason` is the reason given in the cancellation request, if any.
    Applied { cancel_reason: Option<String> },
    /// A condition was not met. Contains the current request, if it exists.
    ConditionFailed(Option<Box<RequestItem>>),
}

impl Dynamo {
    pub(crate) async fn append(&self, append: &Append) -> Result<AppendOutcome, StoreError> {
        let uid = append.uid.to_string();
        let mut events =
            append.events.iter().map(StoredEvent::new).collect::<Result<Vec<_>, _>>()?;
        // A checkpoint is never stored as an object: it replaces the previous checkpoint, whose object would remain.
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
        // A change that is too large for one transaction is split; the log is valid after each part.
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
        // Usually, no other write has occurred in the meantime, so a read before the write would be unnecessary.
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
        let mut head = LogHead {
            state: item.state,
            attempt: item.attempt,
            last_seq: item.last_seq,
            lease_until: Timestamp::default(),
        };
        if let (Some(first), Some(last)) = (change.events.first(), change.events.last())
            && head.may_contain(Some(last.seq))
            && self.stored_events(item, first.seq.previous(), change.events.len()).await?
                == change.events
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
        if matches!(change.writer, Writer::ExpiredLease(_)) {
            head.lease_until = Timestamp::from_millis(self.lease_expiry(item).await?);
        }
        let first_seq = change.events.first().map(|first| first.seq);
        Ok(head.fence(change.writer, first_seq, change.now))
    }

    /// Tries to apply a change once: to the request `previous` if it was read, otherwise to any request whose latest
    /// event directly precedes the change.
    pub(crate) async fn try_change(
        &self,
        uid: &str,
        previous: Option<&RequestItem>,
        change: &Change<'_>,
    ) -> Result<ChangeOutcome, StoreError> {
        if change.schedules_retry() && previous.is_none() {
            // The queue attributes depend on the current request.
            return Ok(ChangeOutcome::ConditionFailed(self.get(uid).await?.map(Box::new)));
        }
        let added = change.bytes;
        let fits_item =
            previous.is_none_or(|item| item.events_bytes + added <= INLINE_EVENTS_BYTES);
        let mut expression = conditions(change);
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
                // A transaction depends on the current request.
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

    /// Adds the state update that results from the last event to `expression`.
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
        expression = expression.set("last_seq", seq(last.seq));
        let finish = |expression: Expression, state: RequestState| {
            let mut expression = expression
                .set("state", text(state.as_str()))
                .set("finish_time", number(change.now.as_millis()))
                .remove(&["lease_until", "lease_holder", "worker"]);
            if matches!(change.writer, Writer::Queued(_)) {
                expression = expression.remove(&QUEUE_ATTRIBUTES);
            }
            if let Some(retention) = self.retention {
                let seconds = change.now.plus(retention).as_millis() / 1000;
                expression = expression.set(TIME_TO_LIVE, number(seconds));
            }
            expression
        };
        match &last.kind {
            StoredKind::Succeeded { output, .. } => {
                let output = output.as_ref().map(encode).transpose()?;
                Ok(finish(expression, RequestState::Succeeded).set_or_remove("output", output))
            }
            StoredKind::Failed { error, output, .. } => {
                let error = error.as_ref().map(encode).transpose()?;
                let output = output.as_ref().map(encode).transpose()?;
                Ok(finish(expression, RequestState::Failed)
                    .set_or_remove("error", error)
                    .set_or_remove("output", output))
            }
            StoredKind::Cancelled { output, .. } => {
                let output = output.as_ref().map(encode).transpose()?;
                Ok(finish(expression, RequestState::Cancelled).set_or_remove("output", output))
            }
            StoredKind::Retrying { released, .. } => {
                let retry_at = change.retry_at.unwrap_or(change.now);
                let Some(item) = previous else {
                    return Err(corrupt("appending events", "the request was not read"));
                };
                let failed_attempts = item.failed_attempts.saturating_add((!released).into());
                let mut queued = item.clone();
                queued.not_before = retry_at.as_millis();
                queued.deadline = None;
                self.set_queue_attributes(&mut queued, change.now);
                let delay_until = queued.delay_until.map(number);
                let expire_at = queued.expire_at.map(number);
                Ok(expression
                    .set("state", text(RequestState::Queued.as_str()))
                    .set("not_before", number(retry_at.as_millis()))
                    .set("failed_attempts", number(failed_attempts))
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
fn conditions(change: &Change<'_>) -> Expression {
    let (state, attempt) = change.writer.required();
    let mut expression = Expression::default().when("state", "=", text(state.as_str())).when(
        "attempt",
        "=",
        attempt_number(attempt),
    );
    if let Some(first) = change.events.first() {
        expression = expression.when("last_seq", "=", seq(first.seq.previous()));
    }
    expression
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

/// Returns the key of the part whose last event is `last_seq`. The keys sort in the order of the numbers.
fn event_part_key(last_seq: Seq) -> String {
    format!("event {last_seq:019}")
}
