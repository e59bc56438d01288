//! Claims, adopts, cancels and deletes requests.

use bytes::Bytes;

use super::*;

/// Returns whether an earlier call, which `claim` repeats, started the running attempt.
fn is_repetition(claim: &Claim, item: &RequestItem) -> bool {
    let start_time = item.start_time.map(Timestamp::from_millis);
    claim.is_repetition(start_time, item.lease_holder.as_deref(), item.worker.as_deref())
}

impl Dynamo {
    pub(crate) async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        let doing = "claiming a request";
        let uid = claim.uid.to_string();
        let Some(item) = self.get(&uid).await? else { return Ok(ClaimOutcome::NotClaimable) };
        if item.state == RequestState::Running && is_repetition(claim, &item) {
            let payload = self.load_value(&uid, &item.payload).await?;
            let payload = payload.ok_or_else(|| corrupt(doing, "the payload is missing"))?;
            let checkpoint = self.load_checkpoint(&uid, &item).await?;
            let started = self.stored_events(&item, item.attempt_seq.previous(), 1).await?;
            let started = started.into_iter().next().map(StoredEvent::into_event);
            let started = started.ok_or_else(|| corrupt(doing, "the log is incomplete"))?;
            let record = item.to_record()?;
            let claimed = Claimed { record, payload, checkpoint, started };
            return Ok(ClaimOutcome::Claimed(Box::new(claimed)));
        }
        // A request without a delay is due for every clock.
        let is_delayed = item.delay_until.is_some_and(|until| until > claim.now.as_millis());
        if item.state != RequestState::Queued || is_delayed {
            return Ok(ClaimOutcome::NotClaimable);
        }
        let record = item.to_record()?;
        if record.is_overdue(claim.now) {
            return Ok(ClaimOutcome::Overdue(Box::new(record)));
        }
        // The values are read before the update: they do not change while the request is queued, and nothing may fail
        // after the update.
        let payload = self.load_value(&uid, &item.payload).await?;
        let payload = payload.ok_or_else(|| corrupt(doing, "the payload is missing"))?;
        let checkpoint = self.load_checkpoint(&uid, &item).await?;
        let (attempt, next) = (item.attempt.next(), item.last_seq.next());
        let worker = claim.worker_display_name().to_owned();
        let started = log_event(next, attempt, claim.now, Kind::Started(Started { worker }));
        let events = [StoredEvent::new(&started)?];
        let update = Expression::default()
            .set("state", text(RequestState::Running.as_str()))
            .set("attempt", attempt_number(attempt))
            .set("last_seq", seq(next))
            .set("attempt_seq", seq(next))
            .set("start_time", number(claim.now.as_millis()))
            .set("lease_until", number(claim.lease_until.as_millis()))
            .set("lease_holder", text(claim.holder.as_str()))
            .set_or_remove("worker", claim.worker_identity().map(text))
            .extend("events", encode(&events)?)
            .add("events_bytes", events_size(&events)?)
            .remove(&QUEUE_ATTRIBUTES)
            .remove(&["progress"])
            .when("state", "=", text(RequestState::Queued.as_str()))
            .when("last_seq", "=", seq(item.last_seq));
        let claimed = match self.update_request(doing, &uid, update).await? {
            ConditionalUpdate::Applied(item) => item,
            // The holder has already claimed the request, in this call or in an earlier call whose response was lost.
            ConditionalUpdate::ConditionFailed(Some(found))
                if found.state == RequestState::Running
                    && found.attempt == attempt
                    && found.lease_holder.as_deref() == Some(claim.holder.as_str())
                    && found.worker.as_deref() == claim.worker_identity() =>
            {
                found
            }
            ConditionalUpdate::ConditionFailed(_) => return Ok(ClaimOutcome::NotClaimable),
        };
        // Returns the stored event, which may differ from the event that this call would have stored.
        let stored = self.stored_events(&claimed, item.last_seq, 1).await?.into_iter().next();
        let started = stored.map_or(started, StoredEvent::into_event);
        let record = claimed.to_record()?;
        Ok(ClaimOutcome::Claimed(Box::new(Claimed { record, payload, checkpoint, started })))
    }

    async fn load_checkpoint(
        &self,
        uid: &str,
        item: &RequestItem,
    ) -> Result<Option<Bytes>, StoreError> {
        let Some(stored_ref) = &item.checkpoint else { return Ok(None) };
        let checkpoint = self.load_value(uid, stored_ref).await?;
        Ok(checkpoint.map(|checkpoint| checkpoint.data))
    }

    pub(crate) async fn adopt(&self, adopt: &Adopt) -> Result<Option<RequestRecord>, StoreError> {
        let uid = adopt.lease.uid.to_string();
        let until = adopt.lease_until.as_millis();
        let update = Expression::default()
            .set("lease_holder", text(adopt.holder.as_str()))
            .set("lease_until", number(until))
            .when("state", "=", text(RequestState::Running.as_str()))
            .when("attempt", "=", attempt_number(adopt.lease.attempt))
            .when("worker", "=", text(adopt.worker_identity.as_str()));
        match self.update_request("adopting an attempt", &uid, update).await? {
            ConditionalUpdate::Applied(item) => item.to_record().map(Some),
            ConditionalUpdate::ConditionFailed(_) => Ok(None),
        }
    }

    pub(crate) async fn cancel(
        &self,
        uid: Uid,
        reason: &str,
        now: Timestamp,
    ) -> Result<CancelOutcome, StoreError> {
        let doing = "cancelling a request";
        let uid = uid.to_string();
        let mut found = self.get(&uid).await?;
        let mut backoff = Backoff::default();
        loop {
            let Some(item) = found else { return Ok(CancelOutcome::NotFound) };
            let record = item.to_record()?;
            found = match record.state {
                RequestState::Succeeded | RequestState::Failed | RequestState::Cancelled => {
                    return Ok(CancelOutcome::Ended(Box::new(record)));
                }
                RequestState::Running if record.cancel_reason.is_some() => {
                    return Ok(CancelOutcome::Requested(Box::new(record)));
                }
                RequestState::Running => {
                    let update = Expression::default()
                        .set("cancel_reason", text(reason))
                        .when("state", "=", text(RequestState::Running.as_str()))
                        .when("attempt", "=", attempt_number(item.attempt))
                        .when_missing("cancel_reason");
                    match self.update_request(doing, &uid, update).await? {
                        ConditionalUpdate::Applied(item) => {
                            return Ok(CancelOutcome::Requested(Box::new(item.to_record()?)));
                        }
                        ConditionalUpdate::ConditionFailed(found) => found,
                    }
                }
                RequestState::Queued => {
                    // The output of earlier attempts is void, so the final output is empty.
                    let empty = OutputDigest::default();
                    let output =
                        OutputSummary { chunks: 0, sha256: empty.sha256().to_vec().into() };
                    let kind = Kind::Cancelled(Cancelled {
                        reason: reason.to_owned(),
                        output: Some(output.clone()),
                    });
                    let event = log_event(item.last_seq.next(), item.attempt, now, kind);
                    let change = Change {
                        cancel_reason: Some(reason),
                        ..Change::new(
                            Writer::Queued(item.attempt),
                            vec![StoredEvent::new(&event)?],
                            now,
                        )?
                    };
                    match self.try_change(&uid, Some(&item), &change).await? {
                        ChangeOutcome::Applied { .. } => {
                            let record =
                                Box::new(cancelled_record(record, &event, now, reason, output));
                            return Ok(CancelOutcome::Cancelled(record, Box::new(event)));
                        }
                        ChangeOutcome::ConditionFailed(found) => {
                            let found = found.map(|found| *found);
                            let done =
                                |found: &RequestItem| found.events.last() == change.events.last();
                            if found.as_ref().is_some_and(done) {
                                // Stored by an earlier attempt of this call whose response was
                                // lost.
                                let record =
                                    Box::new(cancelled_record(record, &event, now, reason, output));
                                return Ok(CancelOutcome::Cancelled(record, Box::new(event)));
                            }
                            found
                        }
                    }
                }
            };
            let contention =
                StoreError::Unavailable { doing, reason: "the request keeps changing".into() };
            backoff.wait(contention).await?;
        }
    }

    pub(crate) async fn delete(&self, uid: Uid) -> Result<DeleteOutcome, StoreError> {
        let doing = "deleting a request";
        let uid = uid.to_string();
        let Some(item) = self.get(&uid).await? else { return Ok(DeleteOutcome::Deleted) };
        if !item.state.is_terminal() {
            return Ok(DeleteOutcome::NotEnded);
        }
        // Parts are deleted first, so that an interrupted deletion can be repeated.
        self.delete_parts(&uid).await?;
        let mut deletes = vec![(&self.tables.requests, key([("uid", uid.as_str())]))];
        if let Some(client_id) = &item.client_id {
            let id = client_id_key(&item.owner(), client_id);
            deletes.push((&self.tables.names, key([("name", id.as_str())])));
        }
        let own = Expression::default().when_or_missing("uid", "=", text(uid.as_str()));
        let mut backoff = Backoff::default();
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
                    .map_err(|error| corrupt(doing, error))?;
                transaction =
                    transaction.transact_items(TransactWriteItem::builder().delete(delete).build());
            }
            match transaction.send().await {
                Ok(_) => break,
                Err(error) => {
                    let error = match cancellation_reasons(&error) {
                        Some(reasons) if is_transient(reasons) => transaction_error(doing, reasons),
                        // The client ID already identifies a different request.
                        Some(_) if deletes.len() > 1 => {
                            deletes.truncate(1);
                            continue;
                        }
                        Some(reasons) => transaction_error(doing, reasons),
                        None => store_error(doing, &error),
                    };
                    backoff.wait(error).await?;
                }
            }
        }
        Ok(DeleteOutcome::Deleted)
    }
}

/// Returns the record of a queued request after its cancellation.
fn cancelled_record(
    record: RequestRecord,
    event: &Event,
    now: Timestamp,
    reason: &str,
    output: OutputSummary,
) -> RequestRecord {
    RequestRecord {
        state: RequestState::Cancelled,
        last_seq: event.seq(),
        finish_time: Some(now),
        cancel_reason: Some(reason.to_owned()),
        output: Some(output),
        ..record
    }
}
