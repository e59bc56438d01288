//! Creates, reads, claims, cancels and deletes requests.

mod change;
mod client_ids;
mod read;
mod values;

use aws_sdk_dynamodb::error::ProvideErrorMetadata;
use aws_sdk_dynamodb::types::{
    AttributeValue, Delete, KeysAndAttributes, Put, ReturnConsumedCapacity,
    ReturnValuesOnConditionCheckFailure, TransactWriteItem,
};
use futures_util::future::try_join_all;
use streamer_core::{AttemptNumber, OutputDigest, RequestState, Seq, Timestamp, Uid, saturate};
use streamer_proto::common::v1::{Accepted, Cancelled, Event, OutputSummary, Started, event::Kind};
use streamer_store::{
    Adopt, CancelOutcome, Claim, ClaimOutcome, Claimed, CreateOutcome, DeleteOutcome, EventNumbers,
    ListRequests, NewRequest, Owner, RequestPage, RequestRecord, StoreError, StoredPayload, Writer,
    log_event,
};

use crate::{
    client::{Backoff, Dynamo},
    conditional_update::ConditionalUpdate,
    error::{cancellation_reasons, corrupt, is_transient, store_error, transaction_error},
    expression::{Expression, Filter, attempt_number, key, number, seq, text},
    item::{
        Blob, QUEUE_ATTRIBUTES, RequestItem, StoredEvent, StoredRef, StoredValue, client_id_key,
        decode, encode, encode_item, events_size,
    },
    item_ops::uid_of,
    log::{Change, ChangeOutcome},
};

/// Maximum size of a payload in the request's item, in bytes. Every write of the item is charged for the payload.
const INLINE_PAYLOAD_BYTES: usize = 512;
/// Key of the part that contains the payload.
const PAYLOAD: &str = "payload";
impl Dynamo {
    pub(crate) async fn create(&self, new: &NewRequest) -> Result<CreateOutcome, StoreError> {
        let doing = "creating a request";
        if let Some(client_id) = &new.client_id
            && let Some(existing) = self.find_by_client_id(&new.owner, client_id).await?
        {
            return existing_or_conflict(&existing, new);
        }
        let used = match self.admit_queued(&new.owner, &new.action, &new.quota) {
            Ok(used) => used,
            Err(limit) => return Ok(CreateOutcome::OverQuota(limit)),
        };
        let uid = new.uid.to_string();
        let payload = self.store_payload(&uid, &new.payload).await?;
        let kind = Kind::Accepted(Accepted { action: new.action.clone() });
        let accepted = log_event(Seq::FIRST, AttemptNumber::NONE, new.create_time, kind);
        let stored = StoredEvent::new(&accepted)?;
        let mut item = RequestItem::new(new, payload, stored);
        item.events_bytes = events_size(&item.events)?;
        self.set_queue_attributes(&mut item, new.create_time);
        let mut backoff = Backoff::default();
        loop {
            let outcome = match &new.client_id {
                None => self.put_request(doing, &item).await,
                Some(client_id) => {
                    self.put_request_with_client_id(doing, &item, new, client_id).await
                }
            };
            let found = match outcome {
                Ok(found) => found,
                Err(error) => match backoff.wait(error).await {
                    Ok(()) => continue,
                    // An earlier attempt may have succeeded without a response.
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
                // The request was written by an earlier attempt of this call whose response was lost, or by an earlier
                // identical call.
                Some(existing) if existing.uid == uid => {
                    let record = Box::new(existing.to_record()?);
                    // Returns the stored event, which may differ from the event that this call would have stored.
                    let first = existing.events.first().filter(|_| existing.last_seq == Seq::FIRST);
                    return Ok(match first {
                        Some(first) => {
                            let accepted = Box::new(first.clone().into_event());
                            CreateOutcome::Created(record, accepted, used)
                        }
                        None => CreateOutcome::Existing(record),
                    });
                }
                Some(existing) => {
                    self.delete_payload(&uid, &item.payload).await;
                    return existing_or_conflict(&existing, new);
                }
            }
        }
    }

    /// Stores a request without a client ID. Returns the existing request, if any.
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
                self.metrics.record_write(done.consumed_capacity());
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

    /// Stores a request and its client ID in one transaction. Returns the existing request, if any.
    async fn put_request_with_client_id(
        &self,
        doing: &'static str,
        item: &RequestItem,
        new: &NewRequest,
        client_id: &str,
    ) -> Result<Option<RequestItem>, StoreError> {
        let mut name = key([("name", client_id_key(&new.owner, client_id).as_str())]);
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
            let put = put.build().map_err(|error| corrupt(doing, error))?;
            transaction = transaction.transact_items(TransactWriteItem::builder().put(put).build());
        }
        match transaction.send().await {
            Ok(done) => {
                self.metrics.record_write(done.consumed_capacity());
                Ok(None)
            }
            Err(error) => {
                let Some(reasons) = cancellation_reasons(&error) else {
                    return Err(store_error(doing, &error));
                };
                let is_retryable = is_transient(reasons);
                // Checked after a conflict as well, because the other transaction may have stored the same client ID.
                let Some(target) = self.uid_of_client_id(&new.owner, client_id).await? else {
                    return Err(if is_retryable {
                        transaction_error(doing, reasons)
                    } else {
                        StoreError::Unavailable { doing, reason: "the client ID was in use".into() }
                    });
                };
                match self.get(&target).await? {
                    Some(existing) => Ok(Some(existing)),
                    // The client ID refers to a deleted request.
                    None => {
                        self.release_client_id(&new.owner, client_id, &target).await?;
                        Err(StoreError::Unavailable {
                            doing,
                            reason: "the client ID was in use".into(),
                        })
                    }
                }
            }
        }
    }
}

fn existing_or_conflict(
    existing: &RequestItem,
    new: &NewRequest,
) -> Result<CreateOutcome, StoreError> {
    let record = Box::new(existing.to_record()?);
    Ok(if existing.fingerprint.0[..] == new.fingerprint {
        CreateOutcome::Existing(record)
    } else {
        CreateOutcome::Conflict(record)
    })
}
