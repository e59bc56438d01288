//! History of a user's requests, for handlers that report on it.

use std::sync::Arc;

use async_trait::async_trait;
use streamer_core::{Timestamp, Uid};
use streamer_handler::{HandlerError, RequestHistory, RequestSummary};
use streamer_store::{ListRequests, Store};

const PAGE: usize = 500;

pub(crate) struct StoredHistory {
    store: Arc<dyn Store>,
}

impl StoredHistory {
    pub(crate) fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }
}

#[async_trait]
impl RequestHistory for StoredHistory {
    async fn requests(
        &self,
        tenant: &str,
        user: &str,
        from: Timestamp,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestSummary>, HandlerError> {
        let mut found = Vec::new();
        let mut before = Some(Uid::first_of(until));
        while before.is_some() && found.len() < limit {
            let query = ListRequests {
                tenant: tenant.to_owned(),
                user: Some(user.to_owned()),
                states: Vec::new(),
                action: None,
                before,
                limit: PAGE.min(limit - found.len()),
            };
            let page = self.store.list_requests(query).await?;
            // A page of the tenant's requests may contain no request of the user.
            before = page.next.filter(|next| next.time() >= from);
            for record in page.requests {
                if record.create_time < from {
                    return Ok(found);
                }
                found.push(RequestSummary {
                    uid: record.uid,
                    action: record.action,
                    state: record.state,
                    attempts: record.attempt.as_u32(),
                    create_time: record.create_time,
                    start_time: record.start_time,
                    finish_time: record.finish_time,
                });
            }
        }
        Ok(found)
    }
}
