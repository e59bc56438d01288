//! Implementation of `streamer.router.v1.RouterService`.

use std::sync::Arc;

use futures_util::{StreamExt, stream, stream::BoxStream};
use streamer_auth::{Caller, Principal, Subject, permissions};
use streamer_cluster::RouteKey;
use streamer_core::{Violations, validate};
use streamer_proto::{
    progress::v1::{WatchRequest, WatchResponse},
    router::v1::{
        CancelRequest, CancelResponse, GetRequest, GetResponse, ListActionsRequest,
        ListActionsResponse, ListRequest, ListResponse, RedriveManyRequest, RedriveManyResponse,
        RedriveRequest, RedriveResponse, SubmitAndWatchRequest, SubmitAndWatchResponse,
        SubmitRequest, SubmitResponse, router_service_server::RouterService,
        submit_response::Outcome,
    },
};
use streamer_rpc::{
    AFTER_UID, PREVIOUS_ATTEMPTS, REQUEST_UID, encode_payload, ensure_valid, read_page_size,
    read_page_token, request_to_proto, state_from_proto, violation_status, with_authorization,
};
use streamer_store::{ListRequests, RequestPage};
use tonic::{Request, Response, Status};

use crate::{
    checked_submission::PreassignedUid,
    request_service::{Access, RequestService},
};

pub(crate) const MAX_PAGE_SIZE: i32 = 500;
pub(crate) const DEFAULT_PAGE_SIZE: usize = 50;
/// Maximum size of the entries of a page, in bytes. The first entry may exceed it.
const MAX_PAGE_BYTES: usize = 1024 * 1024;

/// Implements the public request API.
pub struct RouterApi {
    service: Arc<RequestService>,
}

impl RouterApi {
    pub(crate) fn new(service: Arc<RequestService>) -> Self {
        Self { service }
    }
}

#[tonic::async_trait]
impl RouterService for RouterApi {
    type SubmitAndWatchStream = BoxStream<'static, Result<SubmitAndWatchResponse, Status>>;

    async fn submit(
        &self,
        request: Request<SubmitRequest>,
    ) -> Result<Response<SubmitResponse>, Status> {
        let caller = Caller::of(&request)?;
        let uid = preassigned_uid(&request);
        let response = self.service.submit(&caller, request.into_inner(), uid).await?;
        Ok(Response::new(response))
    }

    async fn submit_and_watch(
        &self,
        request: Request<SubmitAndWatchRequest>,
    ) -> Result<Response<Self::SubmitAndWatchStream>, Status> {
        let caller = Caller::of(&request)?;
        let uid = preassigned_uid(&request);
        let Some(mut submit) = request.into_inner().request else {
            return Err(violation_status("request", "is required"));
        };
        submit.wait = None;
        let payload_encoding = submit.payload_encoding;
        let submitted = self.service.submit(&caller, submit, uid).await?;
        let uid = submitted.uid.clone();
        let stored_uid = uid.parse().ok();
        let is_async = matches!(submitted.outcome, Some(Outcome::Acknowledgment(_)));
        let first = SubmitAndWatchResponse { submitted: Some(submitted), events: Vec::new() };
        let first = stream::once(std::future::ready(Ok(first)));
        if !is_async {
            return Ok(Response::new(first.boxed()));
        }
        let watch = WatchRequest {
            request_id: uid,
            after_seq: Some(0),
            payload_encoding,
            ..WatchRequest::default()
        };
        let mut watch = with_authorization(watch, caller.authorization);
        if let Some(uid) = stored_uid {
            watch.extensions_mut().insert(RouteKey(uid));
        }
        // The request is stored and will run: the caller receives the acknowledgement even if the watch fails.
        let events = match self.service.upstreams.progress().watch(watch).await {
            Ok(events) => events.into_inner().boxed(),
            Err(status) => stream::once(std::future::ready(Err(status))).boxed(),
        };
        let events = events.filter_map(|response| std::future::ready(into_events(response)));
        Ok(Response::new(first.chain(events).boxed()))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let encoding = request.payload_encoding();
        let record = self.service.find(&caller, &request.request_id, Access::Read).await?;
        let mut request = self.service.with_payloads(&record).await?;
        let payloads = [&mut request.payload, &mut request.result, &mut request.metadata];
        for payload in payloads.into_iter().flatten() {
            encode_payload(payload, encoding);
        }
        Ok(Response::new(GetResponse { request: Some(request) }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut violations = Violations::default();
        let mut states = Vec::new();
        for state in request.states {
            match state_from_proto(state) {
                Some(state) if states.contains(&state) => {}
                Some(state) => states.push(state),
                None => violations.push("states", format!("{state} is not a state")),
            }
        }
        let action = (!request.action.is_empty()).then_some(request.action);
        if let Some(action) = &action {
            violations.check("action", validate::action_name(action));
        }
        let before = read_page_token(&request.page_token, &mut violations);
        let limit =
            read_page_size(request.page_size, MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE, &mut violations);
        ensure_valid(&violations)?;
        let (tenant, user) = list_scope(&caller, request.tenant_id)?;
        let query = ListRequests { tenant, user, states, action, before, limit };
        let page = self.service.list(query).await?;
        let mut page_bytes = PageBytes::default();
        let mut requests = Vec::with_capacity(page.requests.len());
        for record in &page.requests {
            let request = request_to_proto(record);
            if !page_bytes.try_add(&request) {
                break;
            }
            requests.push(request);
        }
        let next_page_token = next_page_token(&page, requests.len());
        Ok(Response::new(ListResponse { requests, next_page_token }))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        let caller = Caller::of(&request)?;
        let CancelRequest { request_id, reason } = request.into_inner();
        let record = self.service.cancel(&caller, &request_id, reason).await?;
        Ok(Response::new(CancelResponse { request: Some(request_to_proto(&record)) }))
    }

    async fn redrive(
        &self,
        request: Request<RedriveRequest>,
    ) -> Result<Response<RedriveResponse>, Status> {
        let caller = Caller::of(&request)?;
        let RedriveRequest { request_id, id } = request.into_inner();
        let record = self.service.redrive(&caller, &request_id, id).await?;
        Ok(Response::new(RedriveResponse { request: Some(request_to_proto(&record)) }))
    }

    async fn redrive_many(
        &self,
        request: Request<RedriveManyRequest>,
    ) -> Result<Response<RedriveManyResponse>, Status> {
        let caller = Caller::of(&request)?;
        Ok(Response::new(self.service.redrive_many(&caller, request.into_inner()).await?))
    }

    async fn list_actions(
        &self,
        request: Request<ListActionsRequest>,
    ) -> Result<Response<ListActionsResponse>, Status> {
        let tenant = &Caller::of(&request)?.principal.tenant;
        Ok(Response::new(ListActionsResponse { actions: self.service.catalog.list(tenant) }))
    }
}

/// Returns the tenant and the user whose requests the caller may list: its own requests, all requests of its tenant
/// with the permission `requests:read`, or all requests of `tenant` for an operator. The user is `None` if the
/// caller may list the requests of all users of the tenant.
pub(crate) fn list_scope(
    caller: &Caller,
    tenant: String,
) -> Result<(String, Option<String>), Status> {
    let Principal { tenant: own, user, .. } = &*caller.principal;
    if tenant.is_empty() {
        let is_tenant_wide = caller.principal.has_permission(permissions::REQUESTS_READ);
        return Ok((own.clone(), (!is_tenant_wide).then(|| user.clone())));
    }
    caller.set_audit_subject(|| Subject::named(&tenant));
    caller.require(permissions::OPERATOR)?;
    Ok((tenant, None))
}

/// Total size of the entries counted for a page, in bytes.
#[derive(Default)]
pub(crate) struct PageBytes(usize);

impl PageBytes {
    /// Adds an entry if it fits on the page, and returns whether it does. The first entry always fits.
    pub(crate) fn try_add(&mut self, entry: &impl prost::Message) -> bool {
        let bytes = self.0.saturating_add(entry.encoded_len());
        let fits = self.0 == 0 || bytes <= MAX_PAGE_BYTES;
        if fits {
            self.0 = bytes;
        }
        fits
    }
}

/// Returns the token of the page that follows a response with the first `sent` entries of `page`.
pub(crate) fn next_page_token(page: &RequestPage, sent: usize) -> String {
    let next = if sent < page.requests.len() {
        sent.checked_sub(1).map(|last| page.requests[last].uid)
    } else {
        page.next
    };
    next.map(|uid| uid.to_string()).unwrap_or_default()
}

/// Converts a watch response. Drops the snapshot at the start of the watch, because the stream contains the whole log.
fn into_events(
    response: Result<WatchResponse, Status>,
) -> Option<Result<SubmitAndWatchResponse, Status>> {
    match response {
        Ok(WatchResponse { events, .. }) if events.is_empty() => None,
        Ok(WatchResponse { events, .. }) => {
            Some(Ok(SubmitAndWatchResponse { submitted: None, events }))
        }
        Err(status) => Some(Err(status)),
    }
}

/// Returns the `uid` that the calling service has assigned to the request. The server removes the header from
/// calls that do not come from a service.
fn preassigned_uid<T>(request: &Request<T>) -> Option<PreassignedUid> {
    let uid = |header| request.metadata().get(header)?.to_str().ok()?.parse().ok();
    let (uid, after) = (uid(REQUEST_UID)?, uid(AFTER_UID));
    Some(PreassignedUid {
        uid,
        after,
        is_retry: request.metadata().contains_key(PREVIOUS_ATTEMPTS),
    })
}
