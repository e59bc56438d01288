//! Requests: creating, reading, claiming, cancelling, deleting.

mod change;
mod names;
mod read;
mod values;

use std::collections::HashMap;

use aws_sdk_dynamodb::error::ProvideErrorMetadata;
use aws_sdk_dynamodb::operation::update_item::UpdateItemError;
use aws_sdk_dynamodb::types::{
    AttributeValue, Delete, KeysAndAttributes, Put, ReturnConsumedCapacity, ReturnValue,
    ReturnValuesOnConditionCheckFailure, TransactWriteItem,
};
use futures_util::future::try_join_all;
use streamer_core::{OutputDigest, RequestState as State, Timestamp, Uid};
use streamer_proto::{
    common::v1::{Accepted, Cancelled, Event, OutputSummary, Started, event::Kind},
    timestamp,
};
use streamer_store::{
    Adopt, CancelOutcome, Claim, ClaimOutcome, Claimed, CreateOutcome, DeleteOutcome, ListRequests,
    NewRequest, Owner, RequestPage, RequestRecord, StoreError, StoredPayload, Writer,
};

use crate::{
    calls::uid_of,
    client::{Dynamo, Patience},
    error::{cancelled, damaged, is_conflict, is_throttled, store_error},
    expression::{Expression, Filter, key, number, text},
    item::{
        Blob, Kept, RequestItem, RequestState, StoredEvent, StoredValue, decode, encode,
        encode_item, size,
    },
    log::{Change, Tried},
};

pub(crate) use names::name_of;
pub(crate) use read::by_uid;

/// Payloads up to this stay in the request's item; every write of the item pays for them.
const INLINE_PAYLOAD_BYTES: usize = 512;
/// Times that one page of a list is looked for more at most.
const MAX_ROUNDS: usize = 10;
/// Pages of the index that are looked at each time in each shard, and rows of a page where some are
/// filtered out.
const MAX_PAGES: usize = 4;
const FILTERED_PAGE: usize = 1000;
/// Items that one call reads at most, as DynamoDB has it.
const BATCH: usize = 100;
/// Calls of that kind at once.
const BATCHES: usize = 4;

/// Key of the part with the payload.
const PAYLOAD: &str = "payload";
/// What a request leaves in the indexes of those that wait.
pub(crate) const WAITING: [&str; 6] =
    ["queue_shard", "queue_rank", "delay_shard", "delay_until", "expiry_shard", "expire_at"];

impl Dynamo {
    pub(crate) async fn create(&self, new: &NewRequest) -> Result<CreateOutcome, StoreError> {
        let doing = "creating a request";
        if let Some(client_id) = &new.client_id
            && let Some(existing) = self.named(&new.owner, client_id).await?
        {
            return compared(&existing, new);
        }
        let used = match self.admit_queued(&new.owner, &new.quota) {
            Ok(used) => used,
            Err(limit) => return Ok(CreateOutcome::OverQuota(limit)),
        };
        let uid = new.uid.to_string();
        let payload = self.keep_payload(&uid, &new.payload).await?;
        let accepted =
            event(1, 0, new.create_time, Kind::Accepted(Accepted { action: new.action.clone() }));
        let stored = StoredEvent::new(&accepted)?;
        let mut item = RequestItem::new(new, payload, stored);
        item.events_bytes = bytes_of(&item.events)?;
        self.enter_queue(&mut item, new.create_time);
        let mut patience = Patience::default();
        loop {
            let outcome = match &new.client_id {
                None => self.put_request(doing, &item).await,
                Some(client_id) => self.put_named_request(doing, &item, new, client_id).await,
            };
            let found = match outcome {
                Ok(found) => found,
                Err(error) => match patience.wait(error).await {
                    Ok(()) => continue,
                    // An earlier try may have been carried out, and its answer lost.
                    Err(error) => match self.get(&uid).await {
                        Ok(Some(found)) => Some(found),
                        Ok(None) | Err(_) => return Err(error),
                    },
                },
            };
            match found {
                None => {
                    let record = Box::new(item.to_record()?);
                    return Ok(CreateOutcome::Created(record, Box::new(accepted), used));
                }
                // Written by this very call, whose answer was lost on the way, or by an earlier
                // one like it.
                Some(existing) if existing.uid == uid => {
                    let record = Box::new(existing.to_record()?);
                    // What is stored counts, not what this call would have stored.
                    let first = existing.events.first().filter(|_| existing.last_seq == 1);
                    return Ok(match first {
                        Some(first) => {
                            let accepted = Box::new(first.clone().into_event());
                            CreateOutcome::Created(record, accepted, used)
                        }
                        None => CreateOutcome::Existing(record),
                    });
                }
                Some(existing) => {
                    self.drop_payload(&uid, &item.payload).await;
                    return compared(&existing, new);
                }
            }
        }
    }

    /// Without a name of its own. What is there instead, when there is something.
    async fn put_request(
        &self,
        doing: &'static str,
        item: &RequestItem,
    ) -> Result<Option<RequestItem>, StoreError> {
        let put = self
            .client
            .put_item()
            .table_name(&self.tables.requests)
            .set_item(Some(encode_item(item)?))
            .condition_expression("attribute_not_exists(uid)")
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
            .return_consumed_capacity(ReturnConsumedCapacity::Total);
        match put.send().await {
            Ok(done) => {
                self.metrics.note_write(done.consumed_capacity());
                Ok(None)
            }
            Err(error) => match error.as_service_error() {
                Some(service) if service.is_conditional_check_failed_exception() => {
                    self.get(&item.uid).await
                }
                _ => Err(store_error(doing, &error)),
            },
        }
    }

    /// With its name, in one transaction.
    async fn put_named_request(
        &self,
        doing: &'static str,
        item: &RequestItem,
        new: &NewRequest,
        client_id: &str,
    ) -> Result<Option<RequestItem>, StoreError> {
        let mut name = key([("name", name_of(&new.owner, client_id).as_str())]);
        name.insert("uid".into(), text(item.uid.as_str()));
        let puts = [
            (&self.tables.names, name, "attribute_not_exists(#n)", Some(("#n", "name"))),
            (&self.tables.requests, encode_item(item)?, "attribute_not_exists(uid)", None),
        ];
        let mut transaction = self
            .client
            .transact_write_items()
            .return_consumed_capacity(ReturnConsumedCapacity::Total);
        for (table, item, condition, placeholder) in puts {
            let mut put = Put::builder()
                .table_name(table)
                .set_item(Some(item))
                .condition_expression(condition);
            if let Some((placeholder, attribute)) = placeholder {
                put = put.expression_attribute_names(placeholder, attribute);
            }
            let put = put.build().map_err(|error| damaged(doing, error))?;
            transaction = transaction.transact_items(TransactWriteItem::builder().put(put).build());
        }
        match transaction.send().await {
            Ok(done) => {
                self.metrics.note_write(done.consumed_capacity());
                Ok(None)
            }
            Err(error) => {
                let Some(reasons) = reasons(&error) else { return Err(store_error(doing, &error)) };
                let busy = only_busy(reasons);
                // Also when it met another: that may have been one of the same name.
                let Some(target) = self.name_target(&new.owner, client_id).await? else {
                    return Err(if busy {
                        cancelled(doing, reasons)
                    } else {
                        StoreError::Unavailable { doing, reason: "its id was in use".into() }
                    });
                };
                match self.get(&target).await? {
                    Some(existing) => Ok(Some(existing)),
                    // The name is left of a request that is gone.
                    None => {
                        self.free_name(&new.owner, client_id, &target).await?;
                        Err(StoreError::Unavailable { doing, reason: "its id was in use".into() })
                    }
                }
            }
        }
    }

    /// Changes a request's item; with what is there instead when a condition does not hold.
    pub(crate) async fn update_request(
        &self,
        doing: &'static str,
        uid: &str,
        expression: Expression,
    ) -> Result<Updated, StoreError> {
        let mut patience = Patience::default();
        loop {
            let update = self
                .client
                .update_item()
                .table_name(&self.tables.requests)
                .set_key(Some(key([("uid", uid)])))
                .set_update_expression(expression.update())
                .set_condition_expression(expression.condition())
                .set_expression_attribute_names(expression.names())
                .set_expression_attribute_values(expression.values())
                .return_values(ReturnValue::AllNew)
                .return_values_on_condition_check_failure(
                    ReturnValuesOnConditionCheckFailure::AllOld,
                )
                .return_consumed_capacity(ReturnConsumedCapacity::Total);
            let error = match update.send().await {
                Ok(mut done) => {
                    self.metrics.note_write(done.consumed_capacity());
                    let item = done.attributes.take().unwrap_or_default();
                    return Ok(Updated::Done(decode(doing, item)?));
                }
                Err(error) => error,
            };
            match error.as_service_error() {
                Some(UpdateItemError::ConditionalCheckFailedException(failed)) => {
                    // Not every implementation tells what is there.
                    let found = match failed.item.clone() {
                        Some(item) => Some(decode(doing, item)?),
                        None => self.get(uid).await?,
                    };
                    return Ok(Updated::Refused(found));
                }
                // It met a transaction; the conditions make a repeat safe.
                _ if error.code().is_some_and(is_conflict) => {
                    patience.wait(store_error(doing, &error)).await?;
                }
                _ => return Err(store_error(doing, &error)),
            }
        }
    }
}

/// What these events add to the item.
pub(crate) fn bytes_of(events: &[StoredEvent]) -> Result<i64, StoreError> {
    let mut bytes = 0;
    for event in events {
        bytes += size(&encode(event)?) + 1;
    }
    Ok(i64::try_from(bytes).unwrap_or(i64::MAX))
}

/// What became of an update.
pub(crate) enum Updated {
    /// The item is like this now.
    Done(RequestItem),
    /// A condition did not hold: it is like this, if it is there.
    Refused(Option<RequestItem>),
}

/// Why a transaction was cancelled, when it was.
pub(crate) fn reasons<R>(
    error: &aws_sdk_dynamodb::error::SdkError<
        aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError,
        R,
    >,
) -> Option<&[aws_sdk_dynamodb::types::CancellationReason]> {
    use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError as Error;
    match error.as_service_error() {
        Some(Error::TransactionCanceledException(cancelled)) => {
            Some(cancelled.cancellation_reasons())
        }
        _ => None,
    }
}

/// Whether all that stood in the way of a transaction passes by itself.
pub(crate) fn only_busy(reasons: &[aws_sdk_dynamodb::types::CancellationReason]) -> bool {
    let mut codes =
        reasons.iter().filter_map(|reason| reason.code()).filter(|code| *code != "None");
    codes.all(|code| is_conflict(code) || is_throttled(code))
}

fn compared(existing: &RequestItem, new: &NewRequest) -> Result<CreateOutcome, StoreError> {
    let record = Box::new(existing.to_record()?);
    Ok(if existing.fingerprint.0[..] == new.fingerprint {
        CreateOutcome::Existing(record)
    } else {
        CreateOutcome::Conflict(record)
    })
}

pub(crate) fn event(seq: i64, attempt: u32, time: Timestamp, kind: Kind) -> Event {
    Event {
        seq,
        attempt: i32::try_from(attempt).unwrap_or(i32::MAX),
        time: Some(timestamp(time.as_millis())),
        kind: Some(kind),
    }
}
