//! Requests: creating, reading, claiming, cancelling, deleting.

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
    client::{Dynamo, Patience},
    error::{cancelled, damaged, is_conflict, is_throttled, store_error},
    expression::{Expression, Filter, key, number, text},
    item::{
        Blob, Kept, RequestItem, RequestState, StoredEvent, StoredValue, decode, encode,
        encode_item, size,
    },
    log::{Change, Tried},
    queue,
};

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
const WAITING: [&str; 6] =
    ["queue_shard", "queue_rank", "delay_shard", "delay_until", "expiry_shard", "expire_at"];

impl Dynamo {
    pub(crate) async fn create(&self, new: &NewRequest) -> Result<CreateOutcome, StoreError> {
        let doing = "creating a request";
        if let Some(client_id) = &new.client_id
            && let Some(existing) = self.named(&new.owner, client_id).await?
        {
            return compared(&existing, new);
        }
        let uid = new.uid.to_string();
        let payload = self.keep_payload(&uid, &new.payload).await?;
        let accepted =
            event(1, 0, new.create_time, Kind::Accepted(Accepted { action: new.action.clone() }));
        let stored = StoredEvent::new(&accepted)?;
        let mut item = RequestItem::new(new, payload, stored);
        item.events_bytes = self.bytes_of(&item.events)?;
        self.enter_queue(&mut item, new.create_time);
        let mut patience = Patience::default();
        loop {
            let outcome = match &new.client_id {
                None => self.put_request(doing, &item).await,
                Some(client_id) => self.put_named_request(doing, &item, new, client_id).await,
            };
            match outcome {
                Ok(None) => {
                    let record = Box::new(item.to_record()?);
                    return Ok(CreateOutcome::Created(record, Box::new(accepted)));
                }
                // Written by this very call, whose answer was lost on the way, or by an earlier
                // one like it.
                Ok(Some(existing)) if existing.uid == uid => {
                    let record = Box::new(existing.to_record()?);
                    // What is stored counts, not what this call would have stored.
                    let first = existing.events.first().filter(|_| existing.last_seq == 1);
                    return Ok(match first {
                        Some(first) => {
                            CreateOutcome::Created(record, Box::new(first.clone().into_event()))
                        }
                        None => CreateOutcome::Existing(record),
                    });
                }
                Ok(Some(existing)) => {
                    self.drop_payload(&uid, &item.payload).await;
                    return compared(&existing, new);
                }
                Err(error) => patience.wait(error).await?,
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
                _ => Err(store_error(doing, error)),
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
                let Some(reasons) = reasons(&error) else { return Err(store_error(doing, error)) };
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

    /// The request that has this name.
    async fn named(
        &self,
        owner: &Owner,
        client_id: &str,
    ) -> Result<Option<RequestItem>, StoreError> {
        match self.name_target(owner, client_id).await? {
            Some(uid) => self.get(&uid).await,
            None => Ok(None),
        }
    }

    /// What a name stands for, whether that is still there or not.
    async fn name_target(
        &self,
        owner: &Owner,
        client_id: &str,
    ) -> Result<Option<String>, StoreError> {
        let doing = "finding a request";
        let found = self
            .client
            .get_item()
            .table_name(&self.tables.names)
            .set_key(Some(key([("name", name_of(owner, client_id).as_str())])))
            .consistent_read(true)
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await
            .map_err(|error| store_error(doing, error))?;
        self.metrics.note_read(found.consumed_capacity());
        match found.item.as_ref().and_then(|item| item.get("uid")) {
            Some(AttributeValue::S(uid)) => Ok(Some(uid.clone())),
            _ => Ok(None),
        }
    }

    /// Frees a name whose request is gone, unless it stands for another by now.
    async fn free_name(
        &self,
        owner: &Owner,
        client_id: &str,
        target: &str,
    ) -> Result<(), StoreError> {
        let same = Expression::default().when("uid", "=", text(target));
        let freed = self
            .client
            .delete_item()
            .table_name(&self.tables.names)
            .set_key(Some(key([("name", name_of(owner, client_id).as_str())])))
            .set_condition_expression(same.condition())
            .set_expression_attribute_names(same.names())
            .set_expression_attribute_values(same.values())
            .send()
            .await;
        match freed {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some("ConditionalCheckFailedException") => Ok(()),
            Err(error) => Err(store_error("freeing an id", error)),
        }
    }

    pub(crate) async fn find(
        &self,
        owner: &Owner,
        client_id: &str,
    ) -> Result<Option<RequestRecord>, StoreError> {
        self.named(owner, client_id).await?.map(|item| item.to_record()).transpose()
    }

    pub(crate) async fn get(&self, uid: &str) -> Result<Option<RequestItem>, StoreError> {
        let doing = "reading a request";
        let found = self
            .client
            .get_item()
            .table_name(&self.tables.requests)
            .set_key(Some(key([("uid", uid)])))
            .consistent_read(true)
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await
            .map_err(|error| store_error(doing, error))?;
        self.metrics.note_read(found.consumed_capacity());
        found.item.map(|item| decode(doing, item)).transpose()
    }

    /// Reads many, in no order; what is not there is left out.
    pub(crate) async fn get_many(&self, uids: Vec<String>) -> Result<Vec<RequestItem>, StoreError> {
        // The same key twice is refused.
        let mut uids = uids;
        uids.sort_unstable();
        uids.dedup();
        let mut items = Vec::with_capacity(uids.len());
        for some in uids.chunks(BATCH * BATCHES) {
            let mut together = Vec::with_capacity(BATCHES);
            for batch in some.chunks(BATCH) {
                together.push(self.get_batch(batch));
            }
            items.extend(try_join_all(together).await?.into_iter().flatten());
        }
        Ok(items)
    }

    async fn get_batch(&self, uids: &[String]) -> Result<Vec<RequestItem>, StoreError> {
        let doing = "reading requests";
        let mut keys: Vec<_> = uids.iter().map(|uid| key([("uid", uid.as_str())])).collect();
        let mut items = Vec::with_capacity(keys.len());
        let mut patience = Patience::default();
        loop {
            let wanted = KeysAndAttributes::builder()
                .set_keys(Some(keys))
                .consistent_read(true)
                .build()
                .map_err(|error| damaged(doing, error))?;
            let mut found = self
                .client
                .batch_get_item()
                .request_items(&self.tables.requests, wanted)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map_err(|error| store_error(doing, error))?;
            self.metrics.note_read(found.consumed_capacity());
            let here = found.responses.as_mut().and_then(|all| all.remove(&self.tables.requests));
            for item in here.unwrap_or_default() {
                items.push(decode(doing, item)?);
            }
            let left = found.unprocessed_keys.and_then(|mut all| all.remove(&self.tables.requests));
            match left {
                Some(left) if !left.keys().is_empty() => keys = left.keys,
                _ => return Ok(items),
            }
            let throttled =
                StoreError::Overloaded { doing, reason: "some keys were not processed".into() };
            patience.wait(throttled).await?;
        }
    }

    pub(crate) async fn list(&self, query: &ListRequests) -> Result<RequestPage, StoreError> {
        let mut found = Vec::new();
        let mut before = query.before;
        let wanted = query.limit.saturating_add(1);
        for _ in 0..MAX_ROUNDS {
            let page_size = if query.states.is_empty() { wanted } else { BATCH * 2 };
            let (uids, next) = self.listed(query, before, page_size).await?;
            let names = uids.iter().map(ToString::to_string).collect();
            let mut items = self.get_many(names).await?;
            items.sort_by(|one, other| other.uid.cmp(&one.uid));
            for item in items {
                if query.states.is_empty() || query.states.contains(&item.core_state()) {
                    found.push(item.to_record()?);
                }
            }
            if found.len() > query.limit {
                found.truncate(query.limit);
                let next = found.last().map(|record| record.uid);
                return Ok(RequestPage { requests: found, next });
            }
            before = next;
            if next.is_none() {
                break;
            }
        }
        // A page may be short, or empty, where what is asked for is rare.
        Ok(RequestPage { requests: found, next: before })
    }

    /// Ids of a tenant's requests, newest first, merged from all shards; and the id before which to
    /// go on, if there may be more.
    async fn listed(
        &self,
        query: &ListRequests,
        before: Option<Uid>,
        limit: usize,
    ) -> Result<(Vec<Uid>, Option<Uid>), StoreError> {
        let shards = self.shards().map(|shard| {
            let partition = format!("{}\t{shard}", query.tenant);
            self.listed_in(query, partition, before, limit)
        });
        let found = try_join_all(shards).await?;
        // What is older than where the first shard stopped is not known of all of them.
        let mut next = found.iter().filter_map(|(_, stopped)| *stopped).max();
        let mut uids: Vec<_> = found.into_iter().flat_map(|(uids, _)| uids).collect();
        uids.retain(|uid| next.is_none_or(|next| *uid >= next));
        uids.sort_by(|one, other| other.cmp(one));
        if uids.len() > limit {
            uids.truncate(limit);
            next = uids.last().copied();
        }
        Ok((uids, next))
    }

    /// Those of one shard, and the id at which it stopped before the end.
    async fn listed_in(
        &self,
        query: &ListRequests,
        partition: String,
        before: Option<Uid>,
        limit: usize,
    ) -> Result<(Vec<Uid>, Option<Uid>), StoreError> {
        let doing = "listing requests";
        let mut condition = Expression::default().when("tenant_shard", "=", text(partition));
        if let Some(before) = before {
            condition = condition.when("uid", "<", text(before.to_string()));
        }
        // One set of placeholders serves both expressions.
        let keys = condition.condition();
        let filters = [("user", &query.user), ("action", &query.action)];
        let is_filtered = filters.iter().any(|(_, value)| value.is_some());
        let mut filter = Filter::default();
        for (attribute, value) in filters {
            if let Some(value) = value {
                condition = filter.add(condition, attribute, text(value.as_str()));
            }
        }
        let page_size = if is_filtered { FILTERED_PAGE } else { limit.clamp(1, FILTERED_PAGE) };
        let mut uids = Vec::new();
        let mut start = None;
        for _ in 0..MAX_PAGES {
            let page = self
                .client
                .query()
                .table_name(&self.tables.requests)
                .index_name("tenant")
                .set_key_condition_expression(keys.clone())
                .set_filter_expression(filter.expression())
                .set_expression_attribute_names(condition.names())
                .set_expression_attribute_values(condition.values())
                .scan_index_forward(false)
                .limit(i32::try_from(page_size).unwrap_or(1000))
                .set_exclusive_start_key(start)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map_err(|error| store_error(doing, error))?;
            self.metrics.note_read(page.consumed_capacity());
            for item in page.items() {
                uids.push(queue::uid_of(item)?);
            }
            if uids.len() >= limit {
                uids.truncate(limit);
                let last = uids.last().copied();
                return Ok((uids, last));
            }
            start = page.last_evaluated_key;
            if start.is_none() {
                return Ok((uids, None));
            }
        }
        let stopped = start.as_ref().map(queue::uid_of).transpose()?;
        Ok((uids, stopped))
    }

    /// Keeps a payload where it belongs by its size.
    async fn keep_payload(&self, uid: &str, payload: &StoredPayload) -> Result<Kept, StoreError> {
        let value = StoredValue::of(&payload.content_type, Some(Blob(payload.data.clone())));
        self.keep(uid, PAYLOAD, value, INLINE_PAYLOAD_BYTES).await
    }

    async fn keep(
        &self,
        uid: &str,
        part: &str,
        mut value: StoredValue,
        inline: usize,
    ) -> Result<Kept, StoreError> {
        let bytes = value.data.as_ref().map_or(0, |data| data.0.len());
        if bytes <= inline {
            return Ok(Kept { value, part: None });
        }
        if let Some(objects) = &self.objects {
            objects.offload(uid, vec![&mut value]).await?;
        }
        let Some(data) = value.data.take() else { return Ok(Kept { value, part: None }) };
        let mut item = key([("uid", uid), ("part", part)]);
        item.insert("data".into(), encode(&data)?);
        let put = self
            .client
            .put_item()
            .table_name(&self.tables.parts)
            .set_item(Some(item))
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await
            .map_err(|error| store_error("storing a payload", error))?;
        self.metrics.note_write(put.consumed_capacity());
        Ok(Kept { value, part: Some(part.to_owned()) })
    }

    /// Of a submission that was not the first of its id. What cannot be removed is only in the way.
    async fn drop_payload(&self, uid: &str, kept: &Kept) {
        let outcome = match (&kept.part, &self.objects, &kept.value.object) {
            (Some(part), _, _) => self.delete_part(uid, part).await,
            (None, Some(objects), Some(_)) => objects.delete_all(uid).await,
            _ => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, uid, "could not remove a payload that is not needed");
        }
    }

    /// The value, from wherever it is.
    pub(crate) async fn kept(
        &self,
        uid: &str,
        kept: &Kept,
    ) -> Result<Option<StoredPayload>, StoreError> {
        let mut value = kept.value.clone();
        if let Some(part) = &kept.part {
            value.data = self.read_part(uid, part).await?;
        }
        self.restore(vec![&mut value]).await?;
        let content_type = value.content_type();
        Ok(value.data.map(|data| StoredPayload { content_type, data: data.0 }))
    }

    async fn read_part(&self, uid: &str, part: &str) -> Result<Option<Blob>, StoreError> {
        let doing = "reading a payload";
        let mut found = self
            .client
            .get_item()
            .table_name(&self.tables.parts)
            .set_key(Some(key([("uid", uid), ("part", part)])))
            .consistent_read(true)
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await
            .map_err(|error| store_error(doing, error))?;
        self.metrics.note_read(found.consumed_capacity());
        let data = found.item.as_mut().and_then(|item| item.remove("data"));
        data.map(|data| {
            serde_dynamo::from_attribute_value(data).map_err(|error| damaged(doing, error))
        })
        .transpose()
    }

    pub(crate) async fn read_payload(&self, uid: Uid) -> Result<Option<StoredPayload>, StoreError> {
        let uid = uid.to_string();
        match self.get(&uid).await? {
            Some(item) => self.kept(&uid, &item.payload).await,
            None => Ok(None),
        }
    }

    pub(crate) async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        let doing = "claiming a request";
        let uid = claim.uid.to_string();
        let Some(item) = self.get(&uid).await? else { return Ok(ClaimOutcome::NotClaimable) };
        if item.state != RequestState::Queued || item.not_before > claim.now.as_millis() {
            return Ok(ClaimOutcome::NotClaimable);
        }
        let record = item.to_record()?;
        if record.is_overdue(claim.now) {
            return Ok(ClaimOutcome::Overdue(Box::new(record)));
        }
        // Before the change: they cannot change while it waits, and after it nothing may fail.
        let payload = self.kept(&uid, &item.payload).await?;
        let payload = payload.ok_or_else(|| damaged(doing, "its payload is not there"))?;
        let checkpoint = match &item.checkpoint {
            Some(kept) => self.kept(&uid, kept).await?.map(|checkpoint| checkpoint.data),
            None => None,
        };
        let (attempt, seq) = (item.attempt + 1, item.last_seq + 1);
        let worker = claim.worker.as_ref().unwrap_or(&claim.holder).clone();
        let started = event(seq, attempt, claim.now, Kind::Started(Started { worker }));
        let events = [StoredEvent::new(&started)?];
        let update = Expression::default()
            .set("state", encode(&RequestState::Running)?)
            .set("attempt", number(attempt))
            .set("last_seq", number(seq))
            .set("attempt_seq", number(seq))
            .set("start_time", number(claim.now.as_millis()))
            .set("lease_until", number(claim.lease_until.as_millis()))
            .set("lease_holder", text(claim.holder.as_str()))
            .set_or_remove("worker", claim.worker.as_deref().map(text))
            .extend("events", encode(&events)?)
            .add("events_bytes", self.bytes_of(&events)?)
            .remove(&WAITING)
            .remove(&["progress"])
            .when("state", "=", encode(&RequestState::Queued)?)
            .when("last_seq", "=", number(item.last_seq));
        let claimed = match self.update_request(doing, &uid, update).await? {
            Updated::Done(item) => item,
            // Claimed by this holder, in this call or an earlier one whose answer was lost.
            Updated::Refused(Some(found))
                if found.state == RequestState::Running
                    && found.attempt == attempt
                    && found.lease_holder.as_deref() == Some(claim.holder.as_str())
                    && found.worker == claim.worker =>
            {
                found
            }
            Updated::Refused(_) => return Ok(ClaimOutcome::NotClaimable),
        };
        // What is stored counts, not what this call would have stored.
        let stored = self.stored(&claimed, seq - 1, 1).await?.into_iter().next();
        let started = stored.map_or(started, StoredEvent::into_event);
        let record = claimed.to_record()?;
        Ok(ClaimOutcome::Claimed(Box::new(Claimed { record, payload, checkpoint, started })))
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
                    patience.wait(store_error(doing, error)).await?;
                }
                _ => return Err(store_error(doing, error)),
            }
        }
    }

    pub(crate) async fn adopt(&self, adopt: &Adopt) -> Result<Option<RequestRecord>, StoreError> {
        let uid = adopt.lease.uid.to_string();
        let until = adopt.lease_until.as_millis();
        let update = Expression::default()
            .set("lease_holder", text(adopt.holder.as_str()))
            .set("lease_until", number(until))
            .when("state", "=", encode(&RequestState::Running)?)
            .when("attempt", "=", number(adopt.lease.attempt))
            .when("worker", "=", text(adopt.worker.as_str()));
        match self.update_request("adopting an attempt", &uid, update).await? {
            Updated::Done(item) => item.to_record().map(Some),
            Updated::Refused(_) => Ok(None),
        }
    }

    pub(crate) async fn cancel(
        &self,
        uid: Uid,
        reason: &str,
        now: Timestamp,
    ) -> Result<CancelOutcome, StoreError> {
        let doing = "cancelling a request";
        let name = uid.to_string();
        let mut found = self.get(&name).await?;
        let mut patience = Patience::default();
        loop {
            let Some(item) = found else { return Ok(CancelOutcome::NotFound) };
            let record = item.to_record()?;
            found = match record.state {
                State::Succeeded | State::Failed | State::Cancelled => {
                    return Ok(CancelOutcome::Ended(Box::new(record)));
                }
                State::Running if record.cancel_reason.is_some() => {
                    return Ok(CancelOutcome::Requested(Box::new(record)));
                }
                State::Running => {
                    let update = Expression::default()
                        .set("cancel_reason", text(reason))
                        .when("state", "=", encode(&RequestState::Running)?)
                        .when("attempt", "=", number(item.attempt))
                        .when_missing("cancel_reason");
                    match self.update_request(doing, &name, update).await? {
                        Updated::Done(item) => {
                            return Ok(CancelOutcome::Requested(Box::new(item.to_record()?)));
                        }
                        Updated::Refused(found) => found,
                    }
                }
                State::Queued => {
                    // Whatever earlier attempts put out is void, so nothing is left.
                    let nothing = OutputDigest::default();
                    let output =
                        OutputSummary { chunks: 0, sha256: nothing.sha256().to_vec().into() };
                    let kind = Kind::Cancelled(Cancelled {
                        reason: reason.to_owned(),
                        output: Some(output.clone()),
                    });
                    let event = event(item.last_seq + 1, item.attempt, now, kind);
                    let change = Change {
                        writer: Writer::Queued(item.attempt),
                        events: vec![StoredEvent::new(&event)?],
                        checkpoint: None,
                        retry_at: None,
                        now,
                        cancel_reason: Some(reason),
                    };
                    match self.change(&name, Some(&item), &change).await? {
                        Tried::Applied { .. } => {
                            let record =
                                Box::new(cancelled_record(record, &event, now, reason, output));
                            return Ok(CancelOutcome::Cancelled(record, Box::new(event)));
                        }
                        Tried::Refused(found) => {
                            let found = found.map(|found| *found);
                            let done =
                                |found: &RequestItem| found.events.last() == change.events.last();
                            if found.as_ref().is_some_and(done) {
                                // This very call, whose first answer was lost on the way.
                                let record =
                                    Box::new(cancelled_record(record, &event, now, reason, output));
                                return Ok(CancelOutcome::Cancelled(record, Box::new(event)));
                            }
                            found
                        }
                    }
                }
            };
            let busy = StoreError::Unavailable { doing, reason: "it changes all the time".into() };
            patience.wait(busy).await?;
        }
    }

    pub(crate) async fn delete(&self, uid: Uid) -> Result<DeleteOutcome, StoreError> {
        let doing = "deleting a request";
        let name = uid.to_string();
        let Some(item) = self.get(&name).await? else {
            // A deletion that broke off may have left parts.
            self.delete_parts(&name).await?;
            return Ok(DeleteOutcome::Deleted);
        };
        if !item.core_state().is_terminal() {
            return Ok(DeleteOutcome::NotEnded);
        }
        let mut deletes = vec![(&self.tables.requests, key([("uid", name.as_str())]))];
        if let Some(client_id) = &item.client_id {
            let id = name_of(&item.owner(), client_id);
            deletes.push((&self.tables.names, key([("name", id.as_str())])));
        }
        let own = Expression::default().when_or_missing("uid", "=", text(name.as_str()));
        let mut patience = Patience::default();
        loop {
            let mut transaction = self.client.transact_write_items();
            for (table, key) in &deletes {
                let delete = Delete::builder()
                    .table_name(*table)
                    .set_key(Some(key.clone()))
                    .set_condition_expression(own.condition())
                    .set_expression_attribute_names(own.names())
                    .set_expression_attribute_values(own.values())
                    .build()
                    .map_err(|error| damaged(doing, error))?;
                transaction =
                    transaction.transact_items(TransactWriteItem::builder().delete(delete).build());
            }
            match transaction.send().await {
                Ok(_) => break,
                Err(error) => {
                    let error = match reasons(&error) {
                        Some(reasons) if only_busy(reasons) => cancelled(doing, reasons),
                        // Its name stands for another request by now.
                        Some(_) if deletes.len() > 1 => {
                            deletes.truncate(1);
                            continue;
                        }
                        Some(reasons) => cancelled(doing, reasons),
                        None => store_error(doing, error),
                    };
                    patience.wait(error).await?;
                }
            }
        }
        if item.has_parts == Some(true) {
            self.delete_parts(&name).await?;
        }
        Ok(DeleteOutcome::Deleted)
    }

    async fn delete_parts(&self, uid: &str) -> Result<(), StoreError> {
        for part in self.part_names(uid).await? {
            self.delete_part(uid, &part).await?;
        }
        match &self.objects {
            Some(objects) => objects.delete_all(uid).await,
            None => Ok(()),
        }
    }

    async fn delete_part(&self, uid: &str, part: &str) -> Result<(), StoreError> {
        self.client
            .delete_item()
            .table_name(&self.tables.parts)
            .set_key(Some(key([("uid", uid), ("part", part)])))
            .send()
            .await
            .map(drop)
            .map_err(|error| store_error("deleting a part", error))
    }

    pub(crate) async fn restore(&self, values: Vec<&mut StoredValue>) -> Result<(), StoreError> {
        let values: Vec<_> = values.into_iter().filter(|value| value.object.is_some()).collect();
        match &self.objects {
            _ if values.is_empty() => Ok(()),
            Some(objects) => objects.restore(values).await,
            None => Err(StoreError::Unavailable {
                doing: "reading a large value",
                reason: "it is in an object store, and dynamodb.objects is not set".into(),
            }),
        }
    }

    /// What these events add to the item.
    pub(crate) fn bytes_of(&self, events: &[StoredEvent]) -> Result<i64, StoreError> {
        let mut bytes = 0;
        for event in events {
            bytes += size(&encode(event)?) + 1;
        }
        Ok(i64::try_from(bytes).unwrap_or(i64::MAX))
    }
}

/// As it is once it was cancelled while it waited.
fn cancelled_record(
    record: RequestRecord,
    event: &Event,
    now: Timestamp,
    reason: &str,
    output: OutputSummary,
) -> RequestRecord {
    RequestRecord {
        state: State::Cancelled,
        last_seq: event.seq,
        finish_time: Some(now),
        cancel_reason: Some(reason.to_owned()),
        output: Some(output),
        ..record
    }
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

/// Key of a caller's own id: a JSON list, since each of the three may have any character.
pub(crate) fn name_of(owner: &Owner, client_id: &str) -> String {
    serde_json::json!([owner.tenant, owner.user, client_id]).to_string()
}

pub(crate) fn event(seq: i64, attempt: u32, time: Timestamp, kind: Kind) -> Event {
    Event {
        seq,
        attempt: i32::try_from(attempt).unwrap_or(i32::MAX),
        time: Some(timestamp(time.as_millis())),
        kind: Some(kind),
    }
}

/// Items by a text attribute.
pub(crate) fn by_uid(items: Vec<RequestItem>) -> HashMap<String, RequestItem> {
    items.into_iter().map(|item| (item.uid.clone(), item)).collect()
}
