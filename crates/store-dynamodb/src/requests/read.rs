//! Reads one request, many requests, or a page of the requests of a tenant.

use super::*;

/// Maximum number of query rounds for one page of a list.
const MAX_ROUNDS: usize = 10;
/// Maximum number of index pages to read from each shard in one round.
const MAX_PAGES: usize = 4;
/// Number of items in an index page that is read with a filter, and maximum number of items without a filter.
const FILTERED_PAGE_ITEMS: usize = 1000;
/// Maximum number of items in one `BatchGetItem` call.
const MAX_BATCH_GET: usize = 100;
/// Maximum number of concurrent `BatchGetItem` calls.
const MAX_CONCURRENT_BATCHES: usize = 4;

impl Dynamo {
    pub(crate) async fn find(
        &self,
        owner: &Owner,
        client_id: &str,
    ) -> Result<Option<RequestRecord>, StoreError> {
        self.find_by_client_id(owner, client_id).await?.map(|item| item.to_record()).transpose()
    }

    pub(crate) async fn get(&self, uid: &str) -> Result<Option<RequestItem>, StoreError> {
        let doing = "reading a request";
        let found = self.get_item(doing, &self.tables.requests, key([("uid", uid)])).await?;
        found.map(|item| decode(doing, item)).transpose()
    }

    /// Reads many requests, in no particular order. Requests that do not exist are omitted.
    pub(crate) async fn get_many(&self, uids: Vec<String>) -> Result<Vec<RequestItem>, StoreError> {
        // DynamoDB rejects duplicate keys.
        let mut uids = uids;
        uids.sort_unstable();
        uids.dedup();
        let mut items = Vec::with_capacity(uids.len());
        for some in uids.chunks(MAX_BATCH_GET * MAX_CONCURRENT_BATCHES) {
            let mut reads = Vec::with_capacity(MAX_CONCURRENT_BATCHES);
            for batch in some.chunks(MAX_BATCH_GET) {
                reads.push(self.get_batch(batch));
            }
            items.extend(try_join_all(reads).await?.into_iter().flatten());
        }
        Ok(items)
    }

    pub(crate) async fn get_batch(&self, uids: &[String]) -> Result<Vec<RequestItem>, StoreError> {
        let doing = "reading requests";
        let mut keys: Vec<_> = uids.iter().map(|uid| key([("uid", uid.as_str())])).collect();
        let mut items = Vec::with_capacity(keys.len());
        let mut backoff = Backoff::default();
        loop {
            let wanted = KeysAndAttributes::builder()
                .set_keys(Some(keys))
                .consistent_read(true)
                .build()
                .map_err(|error| corrupt(doing, error))?;
            let mut found = self
                .client
                .batch_get_item()
                .request_items(&self.tables.requests, wanted)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map_err(|error| store_error(doing, &error))?;
            self.metrics.record_read(found.consumed_capacity());
            let responses =
                found.responses.as_mut().and_then(|all| all.remove(&self.tables.requests));
            for item in responses.unwrap_or_default() {
                items.push(decode(doing, item)?);
            }
            let unprocessed =
                found.unprocessed_keys.and_then(|mut all| all.remove(&self.tables.requests));
            match unprocessed {
                Some(unprocessed) if !unprocessed.keys().is_empty() => keys = unprocessed.keys,
                _ => return Ok(items),
            }
            let throttled =
                StoreError::Overloaded { doing, reason: "some keys were not processed".into() };
            backoff.wait(throttled).await?;
        }
    }

    pub(crate) async fn list(&self, query: &ListRequests) -> Result<RequestPage, StoreError> {
        let mut found = Vec::new();
        let mut before = query.before;
        let wanted = query.limit.saturating_add(1);
        for _ in 0..MAX_ROUNDS {
            let page_size = if query.states.is_empty() { wanted } else { MAX_BATCH_GET * 2 };
            let (uids, next) = self.list_uids(query, before, page_size).await?;
            let names = uids.iter().map(ToString::to_string).collect();
            let mut items = self.get_many(names).await?;
            items.sort_by(|one, other| other.uid.cmp(&one.uid));
            for item in items {
                if query.states.is_empty() || query.states.contains(&item.state) {
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
        // A page may be short, or empty, if matching requests are rare.
        Ok(RequestPage { requests: found, next: before })
    }

    /// Returns the UIDs of a tenant's requests, newest first, merged from all shards, and the UID before which to
    /// continue if more requests may follow.
    pub(crate) async fn list_uids(
        &self,
        query: &ListRequests,
        before: Option<Uid>,
        limit: usize,
    ) -> Result<(Vec<Uid>, Option<Uid>), StoreError> {
        let shards = self.shards().map(|shard| {
            let partition = format!("{}\t{shard}", query.tenant);
            self.list_uids_in_shard(query, partition, before, limit)
        });
        let found = try_join_all(shards).await?;
        // UIDs that are older than the newest UID at which a shard stopped may be missing, so they are discarded.
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

    /// Returns the UIDs in one shard, and the UID at which the read stopped if it did not reach the end.
    pub(crate) async fn list_uids_in_shard(
        &self,
        query: &ListRequests,
        partition: String,
        before: Option<Uid>,
        limit: usize,
    ) -> Result<(Vec<Uid>, Option<Uid>), StoreError> {
        let mut condition = Expression::default().when("tenant_shard", "=", text(partition));
        if let Some(before) = before {
            condition = condition.when("uid", "<", text(before.to_string()));
        }
        // Both expressions share one set of placeholders.
        let filters = [("user", &query.user), ("action", &query.action)];
        let is_filtered = filters.iter().any(|(_, value)| value.is_some());
        let mut filter = Filter::default();
        for (attribute, value) in filters {
            if let Some(value) = value {
                condition = filter.add(condition, attribute, text(value.as_str()));
            }
        }
        let page_size =
            if is_filtered { FILTERED_PAGE_ITEMS } else { limit.clamp(1, FILTERED_PAGE_ITEMS) };
        let mut uids = Vec::new();
        let mut start = None;
        for _ in 0..MAX_PAGES {
            let query = self
                .query(&self.tables.requests, Some("tenant"), &condition)
                .set_filter_expression(filter.expression())
                .scan_index_forward(false)
                .limit(saturate::to_i32(page_size))
                .set_exclusive_start_key(start);
            let page = self.read_page("listing requests", query).await?;
            for item in page.items() {
                uids.push(uid_of(item)?);
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
        let stopped = start.as_ref().map(uid_of).transpose()?;
        Ok((uids, stopped))
    }
}
