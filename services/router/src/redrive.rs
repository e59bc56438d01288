//! Redrive: runs ended requests again, each as a new request. The log of an ended request never changes.

use std::sync::Arc;

use streamer_auth::{Caller, permissions};
use streamer_core::{ErrorCode, RequestState, Timestamp, Uid, Violations, validate};
use streamer_proto::{
    common::v1::Request,
    millis,
    router::v1::{RedriveManyRequest, RedriveManyResponse, Redriven},
};
use streamer_rpc::{
    ensure_valid, error_status, error_to_proto, not_found, read_page_size, read_page_token,
    request_error, request_to_proto, state_from_proto, store_status,
};
use streamer_store::{ListRequests, RequestRecord};
use tonic::{Code, Status};

use crate::{
    admission::{Submission, well_formed_time},
    error::failed_precondition,
    metrics::{Mode, SubmissionCount},
    permission::check_permission,
    request_service::{Access, RequestService, StoredRequest},
    router_service::{DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE},
};

impl RequestService {
    /// Redrives one failed or cancelled request.
    pub(crate) async fn redrive(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        id: String,
    ) -> Result<RequestRecord, Status> {
        let mut violations = Violations::default();
        if !id.is_empty() {
            violations.check("id", validate::request_id(&id));
        }
        ensure_valid(&violations)?;
        let old = self.find(caller, name, Access::Write).await?;
        if !is_redrivable(old.state) {
            return Err(failed_precondition(format!(
                "only a FAILED or CANCELLED request can be redriven; this request is {}",
                old.state
            )));
        }
        let count = self.metrics.submission();
        let redriven = async {
            self.submissions.admit(&caller.principal, self.clock.now())?;
            self.create_redrive(caller, &old, (!id.is_empty()).then_some(id), &count).await
        };
        let stored = redriven.await.inspect_err(|status| count.rejected(status))?;
        if stored.record.redrive_of != Some(old.uid) {
            let (name, uid) = (stored.record.request_id(), stored.record.uid);
            let message = format!("id {name:?} was used by request {uid}");
            return Err(error_status(ErrorCode::Conflict, message));
        }
        Ok(stored.record)
    }

    /// Redrives a page of failed or cancelled requests.
    pub(crate) async fn redrive_many(
        self: &Arc<Self>,
        caller: &Caller,
        request: RedriveManyRequest,
    ) -> Result<RedriveManyResponse, Status> {
        let (query, from) = parse_query(caller, &request)?;
        let page = self.store.list_requests(query).await.map_err(|error| store_status(&error))?;
        // Requests are listed newest first: the first one older than the bound ends the listing.
        let is_too_old =
            |record: &RequestRecord| from.is_some_and(|from| record.create_time < from);
        let mut next = page.next.filter(|_| !page.requests.last().is_some_and(is_too_old));
        let mut redriven = Vec::new();
        let mut last = None;
        for old in page.requests.iter().filter(|record| !is_too_old(record)) {
            let uid = old.uid.to_string();
            if request.dry_run {
                redriven.push(Redriven { uid, ..Redriven::default() });
                continue;
            }
            self.submissions.wait(&caller.principal, &*self.clock).await;
            match self.redrive_once(caller, old).await {
                Ok(None) => {}
                Ok(request) => redriven.push(Redriven { uid, request, error: None }),
                // The error is not specific to this request. The caller retries from this request.
                Err(status) if is_temporary(&status) && last.is_none() => return Err(status),
                Err(status) if is_temporary(&status) => {
                    next = last;
                    break;
                }
                Err(status) => {
                    let error = Some(error_to_proto(&request_error(&status)));
                    redriven.push(Redriven { uid, request: None, error });
                }
            }
            last = Some(old.uid);
        }
        let next_page_token = next.map(|uid| uid.to_string()).unwrap_or_default();
        Ok(RedriveManyResponse { redriven, next_page_token })
    }

    /// Redrives `old`. Returns the new request; `None` if `old` has been redriven before.
    async fn redrive_once(
        self: &Arc<Self>,
        caller: &Caller,
        old: &RequestRecord,
    ) -> Result<Option<Request>, Status> {
        let count = self.metrics.submission();
        let id = Some(format!("redrive:{}", old.uid));
        let stored = self.create_redrive(caller, old, id, &count).await;
        let stored = stored.inspect_err(|status| count.rejected(status))?;
        Ok((!stored.duplicate).then(|| request_to_proto(&stored.record)))
    }

    async fn create_redrive(
        self: &Arc<Self>,
        caller: &Caller,
        old: &RequestRecord,
        client_id: Option<String>,
        count: &Arc<SubmissionCount>,
    ) -> Result<StoredRequest, Status> {
        let tenant = &old.owner.tenant;
        let entry = self.catalog.find_or_query(&old.action, tenant, &self.upstreams).await?;
        check_permission(caller, &entry)?;
        count.set_action(&entry, Mode::Async);
        let payload =
            self.store.read_payload(old.uid).await.map_err(|error| store_status(&error))?;
        let now = self.clock.now();
        let submission = Submission {
            client_id,
            action: old.action.clone(),
            payload: payload.ok_or_else(|| not_found(&old.request_id()))?,
            metadata: old.metadata.clone(),
            wait_ms: 0,
            priority: old.priority,
            delay_ms: 0,
            deadline: None,
            uid: Uid::new(now),
            after: None,
        };
        self.create(old.owner.clone(), submission, now, Some(old.uid), count).await
    }
}

/// Returns whether a retry may succeed: the store is unavailable, or the queue is full.
fn is_temporary(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::ResourceExhausted)
}

fn is_redrivable(state: RequestState) -> bool {
    matches!(state, RequestState::Failed | RequestState::Cancelled)
}

/// Parses a request into a query and the lower bound of `create_time`.
fn parse_query(
    caller: &Caller,
    request: &RedriveManyRequest,
) -> Result<(ListRequests, Option<Timestamp>), Status> {
    let mut violations = Violations::default();
    let mut states = Vec::new();
    for number in &request.states {
        match state_from_proto(*number).filter(|state| is_redrivable(*state)) {
            Some(state) => states.push(state),
            None => violations.push("states", "must be FAILED or CANCELLED"),
        }
    }
    if states.is_empty() {
        states.push(RequestState::Failed);
    }
    let action = (!request.action.is_empty()).then(|| request.action.clone());
    if let Some(action) = &action {
        violations.check("action", validate::action_name(action));
    }
    let limit =
        read_page_size(request.page_size, MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE, &mut violations);
    let before = read_page_token(&request.page_token, &mut violations);
    for (field, time) in [
        ("create_time_from", &request.create_time_from),
        ("create_time_until", &request.create_time_until),
    ] {
        if let Some(time) = time {
            violations.check(field, well_formed_time(time));
        }
    }
    let time = |time: &prost_types::Timestamp| Timestamp::from_millis(millis(time));
    let until = request.create_time_until.as_ref().map(time).map(Uid::first_of);
    ensure_valid(&violations)?;
    let principal = &caller.principal;
    let is_tenant_wide = principal.has_permission(permissions::REQUESTS_WRITE);
    let query = ListRequests {
        tenant: principal.tenant.clone(),
        user: (!is_tenant_wide).then(|| principal.user.clone()),
        states,
        action,
        before: [before, until].into_iter().flatten().min(),
        limit,
    };
    Ok((query, request.create_time_from.as_ref().map(time)))
}
