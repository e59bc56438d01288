//! Claiming, adopting, cancelling and deleting.

use super::*;

impl Dynamo {
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
        let worker = claim.shown_worker().to_owned();
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
            .set_or_remove("worker", claim.worker_identity().map(text))
            .extend("events", encode(&events)?)
            .add("events_bytes", bytes_of(&events)?)
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
                    && found.worker.as_deref() == claim.worker_identity() =>
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

    pub(crate) async fn adopt(&self, adopt: &Adopt) -> Result<Option<RequestRecord>, StoreError> {
        let uid = adopt.lease.uid.to_string();
        let until = adopt.lease_until.as_millis();
        let update = Expression::default()
            .set("lease_holder", text(adopt.holder.as_str()))
            .set("lease_until", number(until))
            .when("state", "=", encode(&RequestState::Running)?)
            .when("attempt", "=", number(adopt.lease.attempt))
            .when("worker", "=", text(adopt.worker_identity.as_str()));
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
                        cancel_reason: Some(reason),
                        ..Change::new(
                            Writer::Queued(item.attempt),
                            vec![StoredEvent::new(&event)?],
                            now,
                        )?
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
        let Some(item) = self.get(&name).await? else { return Ok(DeleteOutcome::Deleted) };
        if !item.core_state().is_terminal() {
            return Ok(DeleteOutcome::NotEnded);
        }
        // First, so that a deletion that breaks off can be repeated.
        self.delete_parts(&name).await?;
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
                        None => store_error(doing, &error),
                    };
                    patience.wait(error).await?;
                }
            }
        }
        Ok(DeleteOutcome::Deleted)
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
