//! Applies changes that need more than one item.

use super::*;

impl Dynamo {
    /// Tries to apply a change in a transaction, which moves events to parts, stores a checkpoint in a separate part,
    /// or checks that the lease of the holder has expired.
    pub(crate) async fn try_transaction(
        &self,
        uid: &str,
        item: &RequestItem,
        fits_item: bool,
        expression: Expression,
        change: &Change<'_>,
    ) -> Result<ChangeOutcome, StoreError> {
        let doing = "appending events";
        // The outcome contains the cancellation reason, which must not change in the meantime.
        let mut expression = expression
            .when_unchanged("cancel_reason", item.cancel_reason.as_deref().map(text))
            .when("last_seq", "=", seq(item.last_seq));
        let mut writes = Vec::new();
        if fits_item {
            if !change.events.is_empty() {
                expression = expression
                    .extend("events", encode(&change.events)?)
                    .add("events_bytes", change.bytes);
            }
        } else {
            let moved = item.events.iter().chain(&change.events);
            writes.extend(split_into_parts(uid, moved.clone())?);
            let progress = latest_progress(&change.events, item.latest_progress().as_ref());
            expression = expression
                .set("events", AttributeValue::L(Vec::new()))
                .set("events_bytes", number(0));
            if !change.schedules_retry() {
                let progress = progress.as_ref().map(encode).transpose()?;
                expression = expression.set_or_remove("progress", progress);
            }
        }
        if let Some(value) = change.checkpoint.as_ref().filter(|value| is_large(value)) {
            let mut part = key([("uid", uid), ("part", CHECKPOINT)]);
            part.insert("data".into(), encode(&value.data)?);
            writes.push((part, false));
            let value = StoredValue { data: None, ..value.clone() };
            let stored_ref = StoredRef { value, part: Some(CHECKPOINT.into()) };
            expression = expression.set("checkpoint", encode(&stored_ref)?);
        }
        let mut lease_check = None;
        if matches!(change.writer, Writer::ExpiredLease(_)) {
            expression = expression
                .when_or_missing("lease_until", "<=", number(change.now.as_millis()))
                .when_unchanged("lease_holder", item.lease_holder.as_deref().map(text));
            lease_check = item.lease_holder.as_deref().map(|holder| {
                let condition = Expression::default().when_or_missing(
                    "alive_until",
                    "<=",
                    number(change.now.as_millis()),
                );
                (holder, condition)
            });
        }
        if !writes.is_empty() || refers_to_object(change) {
            expression = expression.set("has_parts", AttributeValue::Bool(true));
        }
        let expression = self.state_transition_update(expression, change, Some(item))?;
        let mut backoff = Backoff::default();
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
                .map_err(|error| corrupt(doing, error))?;
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
                let put = put.build().map_err(|error| corrupt(doing, error))?;
                transaction =
                    transaction.transact_items(TransactWriteItem::builder().put(put).build());
            }
            if let Some((holder, condition)) = &lease_check {
                let check = ConditionCheck::builder()
                    .table_name(&self.tables.fleet)
                    .set_key(Some(key([("kind", HOLDER), ("name", *holder)])))
                    .set_condition_expression(condition.condition())
                    .set_expression_attribute_names(condition.names())
                    .set_expression_attribute_values(condition.values())
                    .build()
                    .map_err(|error| corrupt(doing, error))?;
                transaction = transaction
                    .transact_items(TransactWriteItem::builder().condition_check(check).build());
            }
            let error = match transaction.send().await {
                Ok(done) => {
                    self.metrics.record_write(done.consumed_capacity());
                    let asked = change.cancel_reason.map(str::to_owned);
                    let cancel_reason = asked.or_else(|| item.cancel_reason.clone());
                    return Ok(ChangeOutcome::Applied { cancel_reason });
                }
                Err(error) => error,
            };
            let error = match cancellation_reasons(&error) {
                Some(reasons) if is_transient(reasons) => transaction_error(doing, reasons),
                Some(_) => {
                    return Ok(ChangeOutcome::ConditionFailed(self.get(uid).await?.map(Box::new)));
                }
                None => store_error(doing, &error),
            };
            backoff.wait(error).await?;
        }
    }
}

/// Splits events into parts within the size limit. Each part must not yet exist when it is stored.
fn split_into_parts<'a>(
    uid: &str,
    events: impl Iterator<Item = &'a StoredEvent>,
) -> Result<Vec<(Attributes, bool)>, StoreError> {
    let mut parts = Vec::new();
    let mut list = Vec::new();
    let (mut bytes, mut last_seq) = (0, Seq::NONE);
    let finish = |list: &mut Vec<AttributeValue>, last_seq: Seq| {
        let mut part = key([("uid", uid), ("part", event_part_key(last_seq).as_str())]);
        part.insert("events".into(), AttributeValue::L(std::mem::take(list)));
        (part, true)
    };
    for event in events {
        let value = encode(event)?;
        let added = size(&value) + 1;
        if bytes + added > MAX_PART_BYTES && !list.is_empty() {
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
