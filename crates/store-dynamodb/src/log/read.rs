//! Reads the log of a request.

use streamer_core::saturate;

use super::*;

impl Dynamo {
    pub(crate) async fn read_events(
        &self,
        uid: Uid,
        after_seq: Seq,
        max_events: usize,
        max_bytes: usize,
    ) -> Result<EventPage, StoreError> {
        let mut page = EventPage { events: Vec::new(), more: false };
        let uid = uid.to_string();
        let mut bytes = 0;
        let mut after = after_seq;
        let mut rereads = 0;
        // The item is read before the parts, because events move only from the item to parts.
        let Some(mut item) = self.get(&uid).await? else { return Ok(page) };
        loop {
            let (events, more) = self.events_after(&item, after).await?;
            let mut selected = Vec::new();
            let (mut full, mut gap) = (false, after < item.last_seq && events.is_empty() && !more);
            for mut event in events {
                if event.seq <= after || event.seq > item.last_seq {
                    continue;
                }
                gap = event.seq != after.next();
                full = page.events.len() + selected.len() >= max_events
                    || (bytes >= max_bytes && !(page.events.is_empty() && selected.is_empty()));
                if gap || full {
                    break;
                }
                after = event.seq;
                bytes = bytes.saturating_add(event_size(&mut event));
                selected.push(event);
            }
            let is_empty = selected.is_empty();
            let values = selected.iter_mut().filter_map(StoredEvent::value_mut).collect();
            self.restore(values).await?;
            page.events.extend(selected.into_iter().map(StoredEvent::into_event));
            if full || (!gap && after >= item.last_seq) {
                page.more = full;
                return Ok(page);
            }
            // All events read may be newer than the item.
            if gap || is_empty {
                // Parts were written during the read, so the current item is read again.
                rereads += 1;
                item = match self.get(&uid).await? {
                    Some(_) if rereads > MAX_REREADS => {
                        let reason = format!("request {uid} has no event {}", after.next());
                        return Err(corrupt("reading events", reason));
                    }
                    Some(item) => item,
                    None => return Ok(page),
                };
            }
        }
    }

    /// Returns the events after `after` that one call reads, and whether the parts contain further events.
    pub(crate) async fn events_after(
        &self,
        item: &RequestItem,
        after: Seq,
    ) -> Result<(Vec<StoredEvent>, bool), StoreError> {
        let here = item.events.first().is_some_and(|first| first.seq <= after.next());
        if here || after >= item.last_seq {
            return Ok((item.events.clone(), false));
        }
        let (mut events, next) = self.read_parts(&item.uid, after, None).await?;
        if next.is_none() {
            events.extend(item.events.iter().cloned());
        }
        Ok((events, next.is_some()))
    }

    /// Reads one page of the parts with events after `after`, in order. Returns the events, and the key to continue
    /// from if further parts exist.
    pub(crate) async fn read_parts(
        &self,
        uid: &str,
        after: Seq,
        start: Option<Attributes>,
    ) -> Result<(Vec<StoredEvent>, Option<Attributes>), StoreError> {
        let doing = "reading events";
        let query = self
            .client
            .query()
            .table_name(&self.tables.parts)
            .key_condition_expression("uid = :u AND part BETWEEN :f AND :t")
            .expression_attribute_values(":u", text(uid))
            .expression_attribute_values(":f", text(event_part_key(after.next())))
            .expression_attribute_values(":t", text(event_part_key(Seq::MAX)))
            .consistent_read(true)
            .limit(MAX_PAGE_PARTS)
            .set_exclusive_start_key(start);
        let page = self.read_page(doing, query).await?;
        let mut events = Vec::new();
        for mut item in page.items.unwrap_or_default() {
            let list = item.remove("events").unwrap_or(AttributeValue::L(Vec::new()));
            let list: Vec<StoredEvent> =
                serde_dynamo::from_attribute_value(list).map_err(|error| corrupt(doing, error))?;
            events.extend(list);
        }
        Ok((events, page.last_evaluated_key))
    }

    /// Returns up to `count` events after `after`, in stored form.
    pub(crate) async fn stored_events(
        &self,
        item: &RequestItem,
        after: Seq,
        count: usize,
    ) -> Result<Vec<StoredEvent>, StoreError> {
        let mut events = Vec::new();
        if item.events.first().is_none_or(|first| first.seq > after.next()) {
            let mut start = None;
            loop {
                let (part_events, next) = self.read_parts(&item.uid, after, start).await?;
                events.extend(part_events);
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

    /// Returns the keys of all parts of a request.
    pub(crate) async fn part_keys(&self, uid: &str) -> Result<Vec<String>, StoreError> {
        let condition = Expression::default().when("uid", "=", text(uid));
        let mut names = Vec::new();
        let mut start = None;
        loop {
            let query = self
                .query(&self.tables.parts, None, &condition)
                .projection_expression("part")
                .consistent_read(true)
                .set_exclusive_start_key(start);
            let page = self.read_page("reading parts", query).await?;
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

/// Returns the approximate size of an event, in bytes.
fn event_size(event: &mut StoredEvent) -> usize {
    let large = event.value_mut().and_then(|value| value.object.as_ref()).map(|o| o.bytes);
    match large {
        Some(bytes) => saturate::to_usize(bytes),
        None => event.clone().into_event().encoded_len(),
    }
}
