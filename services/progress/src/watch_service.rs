//! `streamer.progress.v1.ProgressService`.

use std::sync::Arc;

use futures_util::stream::BoxStream;
use streamer_auth::{Caller, Principal};
use streamer_core::{Uid, Violations, validate};
use streamer_proto::progress::v1::{
    ListEventsRequest, ListEventsResponse, WatchRequest, WatchResponse,
    progress_service_server::ProgressService,
};
use streamer_rpc::{encode_event, not_found, store_status, validation_status};
use streamer_store::{Owner, Store, find_by_name};
use tonic::{Request, Response, Status};

use crate::{
    topics::{Subscription, Topics},
    watcher::Watcher,
};

const MAX_PAGE: i32 = 1000;
const DEFAULT_PAGE: usize = 100;
const MAX_PAGE_BYTES: usize = 1024 * 1024;

/// Serves watchers.
pub struct WatchService {
    topics: Arc<Topics>,
    store: Arc<dyn Store>,
}

impl WatchService {
    pub(crate) fn new(topics: Arc<Topics>, store: Arc<dyn Store>) -> Self {
        Self { topics, store }
    }

    /// Subscribes to the request that `name` stands for, if the caller may read it.
    async fn subscribe(&self, principal: &Principal, name: &str) -> Result<Subscription, Status> {
        if let Ok(uid) = name.parse::<Uid>()
            && let Some(subscription) = self.topics.loaded(uid)
            && let Some(request) = subscription.topic.snapshot()
            && principal.may_read(&request.tenant_id, &request.user_id)
        {
            return Ok(subscription);
        }
        let uid = self.find(principal, name).await?;
        let subscription = self.topics.load(uid).await.map_err(|error| store_status(&error))?;
        subscription.ok_or_else(|| not_found(name))
    }

    async fn find(&self, principal: &Principal, name: &str) -> Result<Uid, Status> {
        let owner = Owner { tenant: principal.tenant.clone(), user: principal.user.clone() };
        let record =
            find_by_name(&*self.store, &owner, name).await.map_err(|error| store_status(&error))?;
        match record {
            Some(record) if principal.may_read(&record.owner.tenant, &record.owner.user) => {
                Ok(record.uid)
            }
            _ => Err(not_found(name)),
        }
    }
}

#[tonic::async_trait]
impl ProgressService for WatchService {
    type WatchStream = BoxStream<'static, Result<WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let mut violations = check_name(&request.request_id);
        if let Some(after_seq) = request.after_seq {
            violations.check("after_seq", validate::in_range(after_seq, 0, i64::MAX, ""));
        }
        refuse(&violations)?;
        let subscription = self.subscribe(&caller.principal, &request.request_id).await?;
        let watcher = Watcher::new(
            subscription,
            self.topics.clone(),
            self.store.clone(),
            request.after_seq,
            request.payload_encoding(),
        );
        Ok(Response::new(watcher.into_stream()))
    }

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let mut violations = check_name(&request.request_id);
        let page_size = i64::from(request.page_size);
        violations.check("page_size", validate::in_range(page_size, 0, i64::from(MAX_PAGE), ""));
        violations.check("after_seq", validate::in_range(request.after_seq, 0, i64::MAX, ""));
        refuse(&violations)?;
        let uid = self.find(&caller.principal, &request.request_id).await?;
        let wanted = match request.page_size {
            0 => DEFAULT_PAGE,
            size => usize::try_from(size).unwrap_or(DEFAULT_PAGE),
        };
        let page = self
            .store
            .read_events(uid, request.after_seq, wanted, MAX_PAGE_BYTES)
            .await
            .map_err(|error| store_status(&error))?;
        let encoding = request.payload_encoding();
        let mut events = page.events;
        for event in &mut events {
            encode_event(event, encoding);
        }
        Ok(Response::new(ListEventsResponse { events }))
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::internal("the service is wired without authentication"))
}

fn check_name(name: &str) -> Violations {
    let mut violations = Violations::default();
    violations.check("request_id", validate::request_id(name));
    violations
}

fn refuse(violations: &Violations) -> Result<(), Status> {
    if violations.is_empty() { Ok(()) } else { Err(validation_status(violations)) }
}
