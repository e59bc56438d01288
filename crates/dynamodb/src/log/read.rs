//! Reading a log.

use super::*;

impl Dynamo {
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
            let nothing = wanted.is_empty();
            let values = wanted.iter_mut().filter_map(StoredEvent::value_mut).collect();
            self.restore(values).await?;
            page.events.extend(wanted.into_iter().map(StoredEvent::into_event));
            if full || (!gap && after >= item.last_seq) {
                page.more = full;
                return Ok(page);
            }
            // Nothing may have come but what is newer than the item.
            if gap || nothing {
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
    pub(crate) async fn events_after(
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
    pub(crate) async fn read_parts(
        &self,
        uid: &str,
        after: i64,
        start: Option<Attributes>,
    ) -> Result<(Vec<StoredEvent>, Option<Attributes>), StoreError> {
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
            .map_err(|error| store_error(doing, &error))?;
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
                .map_err(|error| store_error(doing, &error))?;
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
}

/// Roughly what an event takes when it is read.
fn bytes_in(event: &mut StoredEvent) -> usize {
    let large = event.value_mut().and_then(|value| value.object.as_ref()).map(|o| o.bytes);
    match large {
        Some(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
        None => event.clone().into_event().encoded_len(),
    }
}
