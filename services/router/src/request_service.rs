//! Operations on requests, independent of the API through which they are called.

mod submission_order;

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};

use streamer_auth::{Caller, Subject};
use streamer_core::{
    Clock, ErrorCode, Limits, LimitsByTenant, Timestamp, Uid, Violations, saturate, validate,
};
use streamer_proto::{
    common::v1::{
        Action, Payload, QueuePosition, Request, RequestState, event::Kind, payload::Body,
    },
    internal::v1::{ExecuteRequest, NotifyQueuedResponse},
    router::v1::{
        Acknowledgment, Completed, SubmitRequest, SubmitResponse, submit_response::Outcome,
    },
};
use streamer_rpc::{
    completed, encode_payload, ensure_valid, error_status, not_found, request_to_proto,
    state_to_proto, store_status,
};
use streamer_store::{
    CreateOutcome, DeleteOutcome, ListRequests, NewRequest, Owner, RequestPage, RequestRecord,
    Store, StoredPayload, find_by_client_id_or_uid,
};
use streamer_telemetry::{TraceContext, trace_span};
use tokio::time::Instant;
use tonic::Status;
use tracing::Instrument;

use crate::{
    admission::{self, Submission},
    await_outcome,
    catalog::{Catalog, CatalogEntry},
    change_limiter::ChangeLimiter,
    checked_submission::{Checked, PreassignedUid},
    error::{failed_precondition, forbidden},
    metrics::{Mode, RouterMetrics, SubmissionCount},
    queue_position::{self, MAX_AHEAD, MAX_AHEAD_OF_NEW},
    quota,
    submission_rates::SubmissionRates,
    upstreams::{ExecuteError, Upstreams},
};

pub(crate) use submission_order::SubmissionOrder;
use submission_order::{Stage, Turn};

/// Maximum size of a request that the store commits before those that it receives later, in bytes. Tenants take turns
/// with larger ones.
const MAX_ORDERED_BYTES: usize = 8 * 1024;
/// Maximum difference between the clocks of two services at which the creation time of a request is that of its UID.
const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_secs(60);

/// Submits, queries, cancels, redrives and deletes requests.
pub(crate) struct RequestService {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) upstreams: Arc<Upstreams>,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) metrics: Arc<RouterMetrics>,
    pub(crate) limits: Limits,
    pub(crate) changes: ChangeLimiter,
    pub(crate) order: SubmissionOrder,
    pub(crate) submissions: Arc<SubmissionRates>,
    pub(crate) tenant_limits: LimitsByTenant,
}

/// Stored request, with the data for its acknowledgement.
pub(crate) struct StoredRequest {
    pub(crate) record: RequestRecord,
    /// Whether an earlier submission stored the request.
    pub(crate) duplicate: bool,
    /// Queue estimate from the processors; `None` if no processor was notified or none responded.
    pub(crate) queue_estimate: Option<NotifyQueuedResponse>,
}

/// Access to a request that an operation requires.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

impl RequestService {
    /// Admits a submission, then runs or stores it. Counts each submission once.
    pub(crate) async fn submit(
        self: &Arc<Self>,
        caller: &Caller,
        request: SubmitRequest,
        uid: Option<PreassignedUid>,
    ) -> Result<SubmitResponse, Status> {
        let encoding = request.payload_encoding();
        let count = self.metrics.submission();
        let admitted = self.admit(caller, request, uid, &count).await;
        let mut response = admitted.inspect_err(|status| count.rejected(status))?;
        if let Some(Outcome::Completed(completed)) = &mut response.outcome
            && let Some(result) = &mut completed.result
        {
            encode_payload(result, encoding);
        }
        Ok(response)
    }

    async fn admit(
        self: &Arc<Self>,
        caller: &Caller,
        request: SubmitRequest,
        uid: Option<PreassignedUid>,
        count: &Arc<SubmissionCount>,
    ) -> Result<SubmitResponse, Status> {
        let now = self.clock.now();
        match self.check(caller, request, uid, now).await? {
            Checked::Stored(record, wait_ms) => {
                count.repeated();
                let stored = self.notify_again(*record).await;
                self.acknowledge(caller, stored, wait_ms, now).await
            }
            Checked::New(submission, entry) if entry.action.sync => {
                count.set_action(&entry, Mode::Sync);
                self.run_now(caller, submission, &entry.offered_by, count).await
            }
            Checked::New(submission, entry) => {
                count.set_action(&entry, Mode::Async);
                // Boxed, so that a sync request does not copy the larger future of an async one.
                Box::pin(self.store_and_notify(caller, submission, now, count)).await
            }
        }
    }

    async fn run_now(
        &self,
        caller: &Caller,
        submission: Submission,
        processors: &[Arc<str>],
        count: &SubmissionCount,
    ) -> Result<SubmitResponse, Status> {
        // Not that of the submission: a repeated call is a different run.
        let uid = Uid::new(self.clock.now()).to_string();
        let request_id = submission.client_id.unwrap_or_else(|| uid.clone());
        let StoredPayload { content_type, data } = submission.payload;
        let execute = ExecuteRequest {
            action: submission.action,
            payload: Some(Payload { content_type, body: Some(Body::Data(data)) }),
            uid: uid.clone(),
            request_id: request_id.clone(),
        };
        let authorization = caller.authorization.clone();
        let executed = self.upstreams.execute(authorization, execute, processors).await;
        if !matches!(executed, Err(ExecuteError::Rejected(_))) {
            count.accepted();
        }
        let result = executed.map_err(ExecuteError::into_status)?;
        let state = RequestState::Succeeded.into();
        let completed = Completed { state, result, ..Completed::default() };
        Ok(SubmitResponse { request_id, uid, outcome: Some(Outcome::Completed(completed)) })
    }

    async fn store_and_notify(
        self: &Arc<Self>,
        caller: &Caller,
        submission: Submission,
        now: Timestamp,
        count: &Arc<SubmissionCount>,
    ) -> Result<SubmitResponse, Status> {
        let start = Instant::now();
        let wait_ms = submission.wait_ms;
        let stored = self.create(owner(caller), submission, now, None, count).await?;
        self.metrics.submit_seconds.observe(start.elapsed());
        self.acknowledge(caller, stored, wait_ms, now).await
    }

    /// Returns the stored request with the given `uid` if it belongs to the caller.
    pub(crate) async fn find_stored(
        &self,
        caller: &Caller,
        uid: Uid,
    ) -> Result<Option<RequestRecord>, Status> {
        let record = self.store.get_request(uid).await.map_err(|error| store_status(&error))?;
        Ok(record.filter(|record| record.owner == owner(caller)))
    }

    /// Notifies processors again of a request that was stored by an earlier call, whose response was lost.
    async fn notify_again(&self, record: RequestRecord) -> StoredRequest {
        let entry = self.catalog.get(&record.action, &record.owner.tenant);
        let offered_by = entry.as_ref().map_or(&[][..], |entry| &entry.offered_by);
        let queue_estimate =
            self.upstreams.notify_queued(&record, Some(record.not_before), offered_by).await;
        StoredRequest { record, duplicate: false, queue_estimate }
    }

    async fn acknowledge(
        &self,
        caller: &Caller,
        stored: StoredRequest,
        wait_ms: i64,
        now: Timestamp,
    ) -> Result<SubmitResponse, Status> {
        let queue_position = self.position_of_new(&stored, now).await;
        let StoredRequest { record, duplicate, .. } = stored;
        let mut response = SubmitResponse {
            request_id: record.request_id(),
            uid: record.uid.to_string(),
            outcome: Some(Outcome::Acknowledgment(Acknowledgment {
                state: state_to_proto(record.state).into(),
                duplicate,
                last_seq: record.last_seq.as_i64(),
                queue_position,
            })),
        };
        // The record is not kept while the call waits.
        let uid = record.uid;
        drop(record);
        if wait_ms > 0 {
            let limit = saturate::from_millis(wait_ms);
            // The request is stored and will run, so an error while waiting is not returned.
            match await_outcome::terminal_event(&self.upstreams, caller, uid, limit).await {
                Ok(Some(event)) => {
                    let completed =
                        completed(event).map(|completed| Completed { duplicate, ..completed });
                    response.outcome = completed.map(Outcome::Completed);
                }
                Ok(None) => {}
                Err(status) if await_outcome::is_over_watch_limit(&status) => {
                    tracing::debug!(%uid, %status, "cannot wait for the outcome: watch limit reached");
                }
                Err(status) => {
                    tracing::warn!(%uid, %status, "failed to wait for the outcome");
                }
            }
        }
        Ok(response)
    }

    /// Returns the queue position of a new request. Only logs errors, because the request is already stored.
    async fn position_of_new(
        &self,
        stored: &StoredRequest,
        now: Timestamp,
    ) -> Option<QueuePosition> {
        let estimate = stored.queue_estimate.as_ref();
        match queue_position::compute(&*self.store, &stored.record, estimate, now, MAX_AHEAD_OF_NEW)
            .await
        {
            Ok(position) => position,
            Err(error) => {
                let uid = stored.record.uid;
                tracing::warn!(%error, %uid, "failed to compute the queue position");
                None
            }
        }
    }

    /// Stores a request, then announces it to the progress service and notifies a processor.
    pub(crate) async fn create(
        self: &Arc<Self>,
        owner: Owner,
        submission: Submission,
        now: Timestamp,
        redrive_of: Option<Uid>,
        count: &Arc<SubmissionCount>,
    ) -> Result<StoredRequest, Status> {
        let delay = saturate::from_millis(submission.delay_ms);
        let uid = submission.uid;
        // The UIDs of a connection increase, and therefore also its due times, over several routers.
        let difference = uid.time().since(now).max(now.since(uid.time()));
        let now = if difference <= MAX_CLOCK_DIFFERENCE { uid.time() } else { now };
        let not_before = now.plus(delay);
        let entry = self.catalog.get(&submission.action, &owner.tenant);
        let limit = |millis: fn(&Action) -> i64| {
            let millis = entry.as_ref().map_or(0, |entry| millis(&entry.action));
            let millis = u64::try_from(millis).ok().filter(|millis| *millis > 0)?;
            Some(not_before.plus(Duration::from_millis(millis)))
        };
        let trace = TraceContext::current();
        let start_by = limit(|action| action.schedule_to_start_ms);
        let new = NewRequest {
            uid,
            client_id: submission.client_id,
            owner: owner.clone(),
            fingerprint: admission::fingerprint(&submission.action, &submission.payload),
            action: submission.action,
            payload: submission.payload,
            metadata: submission.metadata,
            priority: submission.priority,
            create_time: now,
            not_before,
            deadline: [submission.deadline, start_by].into_iter().flatten().min(),
            close_by: limit(|action| action.schedule_to_close_ms),
            redrive_of,
            trace_parent: trace.as_ref().map(TraceContext::trace_parent),
            trace_state: trace.as_ref().and_then(TraceContext::trace_state),
            quota: quota::for_tenant(&self.tenant_limits, &owner.tenant),
        };
        // A stored request must be announced even if its client disconnects.
        let (service, count) = (self.clone(), count.clone());
        let metadata = new.metadata.as_ref().map_or(0, bytes::Bytes::len);
        let (bytes, tenant) = (new.payload.data.len() + metadata, owner.tenant.clone());
        let turn = self.order.begin(uid);
        let after = submission.after.as_deref().copied();
        let stored =
            async move { service.store_new(new, owner, entry, &count, (turn, after)).await };
        self.changes.run(&tenant, bytes, stored).await
    }

    async fn store_new(
        &self,
        new: NewRequest,
        owner: Owner,
        entry: Option<Arc<CatalogEntry>>,
        count: &SubmissionCount,
        (turn, after): (Turn, Option<Uid>),
    ) -> Result<StoredRequest, Status> {
        let (uid, is_delayed, quota) = (new.uid, new.not_before > new.create_time, new.quota);
        let metadata = new.metadata.as_ref().map_or(0, bytes::Bytes::len);
        let is_small = new.payload.data.len() + metadata <= MAX_ORDERED_BYTES;
        if let Some(after) = after {
            self.order.wait(after, Stage::Queued).await;
        }
        let mut created =
            pin!(self.store.create_request(new).instrument(trace_span!("store.create_request")));
        // An operation of the store is queued when it is first polled.
        let first = poll_fn(|context| Poll::Ready(created.as_mut().poll(context))).await;
        if is_small {
            turn.queued();
        }
        let created = match first {
            Poll::Ready(created) => created,
            Poll::Pending => created.await,
        };
        turn.queued();
        match created.map_err(|error| store_status(&error))? {
            CreateOutcome::Created(record, ..) | CreateOutcome::Existing(record)
                if record.owner != owner =>
            {
                tracing::error!(%uid, "the uid belongs to a request of a different owner");
                Err(error_status(ErrorCode::InternalError, "the uid is in use"))
            }
            // A retry by the calling service, which did not receive the first response.
            CreateOutcome::Existing(record) if record.uid == uid => {
                count.repeated();
                Ok(self.notify_again(*record).await)
            }
            CreateOutcome::Created(record, accepted, used) => {
                count.accepted();
                tracing::info!(
                    request_id = record.request_id(), %uid, tenant_id = owner.tenant, action = record.action,
                    "request accepted"
                );
                quota::record_usage(&self.tenant_limits, &quota, used);
                if let Some(after) = after {
                    self.order.wait(after, Stage::Ended).await;
                }
                // The announcement comes first, because the log must exist before a processor writes to it.
                self.upstreams
                    .announce(record.uid, *accepted, Some(request_to_proto(&record)))
                    .await;
                let not_before = is_delayed.then_some(record.not_before);
                let offered_by = entry.as_ref().map_or(&[][..], |entry| &entry.offered_by);
                let queue_estimate =
                    self.upstreams.notify_queued(&record, not_before, offered_by).await;
                Ok(StoredRequest { record: *record, duplicate: false, queue_estimate })
            }
            CreateOutcome::Existing(record) => {
                count.duplicate();
                Ok(StoredRequest { record: *record, duplicate: true, queue_estimate: None })
            }
            CreateOutcome::OverQuota(limit) => {
                self.tenant_limits.record_usage(limit, 1, 1);
                Err(quota::exceeded(limit, &quota))
            }
            CreateOutcome::Conflict(record) => Err(error_status(
                ErrorCode::Conflict,
                format!(
                    "id {:?} was used with a different action or payload, in request {}",
                    record.request_id(),
                    record.uid
                ),
            )),
        }
    }

    /// Returns the request with the given `uid` or client ID if the caller has the required access.
    pub(crate) async fn find(
        &self,
        caller: &Caller,
        name: &str,
        access: Access,
    ) -> Result<RequestRecord, Status> {
        caller.set_audit_subject(|| Subject::named(name));
        let mut violations = Violations::default();
        violations.check("request_id", validate::request_id(name));
        ensure_valid(&violations)?;
        let found = find_by_client_id_or_uid(&*self.store, &owner(caller), name).await;
        let principal = &caller.principal;
        let Some(record) = found.map_err(|error| store_status(&error))? else {
            return Err(not_found(name));
        };
        let Owner { tenant, user } = &record.owner;
        let can_write = principal.can_write(tenant, user);
        // A caller with write access may learn that the request exists.
        let may_see = principal.can_read(tenant, user) || access == Access::Write && can_write;
        if !may_see {
            return Err(not_found(name));
        }
        caller.set_audit_subject(|| Subject { owner: Some(user.clone()), ..Subject::named(name) });
        if access == Access::Write && !can_write {
            return Err(forbidden("requests:write"));
        }
        Ok(record)
    }

    /// Returns a request with its payload, its result if it has one, and its queue position.
    pub(crate) async fn with_payloads(&self, record: &RequestRecord) -> Result<Request, Status> {
        let mut request = request_to_proto(record);
        let payload = self.store.read_payload(record.uid).await;
        request.payload = payload.map_err(|error| store_status(&error))?.map(|payload| Payload {
            content_type: payload.content_type,
            body: Some(Body::Data(payload.data)),
        });
        request.result = self.result(record).await?;
        request.queue_position = self.current_position(record).await?;
        Ok(request)
    }

    async fn current_position(
        &self,
        record: &RequestRecord,
    ) -> Result<Option<QueuePosition>, Status> {
        let now = self.clock.now();
        if record.state != streamer_core::RequestState::Queued || record.not_before > now {
            return Ok(None);
        }
        // The response to a notification contains the estimate; a repeated notification is harmless.
        let entry = self.catalog.get(&record.action, &record.owner.tenant);
        let offered_by = entry.as_ref().map_or(&[][..], |entry| &entry.offered_by);
        let estimate = self.upstreams.notify_queued(record, None, offered_by).await;
        let position =
            queue_position::compute(&*self.store, record, estimate.as_ref(), now, MAX_AHEAD).await;
        position.map_err(|error| store_status(&error))
    }

    /// Returns the result of a succeeded request from the last event of its log; `None` in any other state.
    pub(crate) async fn result(&self, record: &RequestRecord) -> Result<Option<Payload>, Status> {
        if record.state != streamer_core::RequestState::Succeeded {
            return Ok(None);
        }
        let last =
            self.store.read_events(record.uid, record.last_seq.previous(), 1, usize::MAX).await;
        let last = last.map_err(|error| store_status(&error))?.events.pop();
        Ok(last.and_then(|event| match event.kind {
            Some(Kind::Succeeded(succeeded)) => succeeded.result,
            _ => None,
        }))
    }

    /// Returns a page of requests. The caller must check access first.
    pub(crate) async fn list(&self, query: ListRequests) -> Result<RequestPage, Status> {
        self.store.list_requests(query).await.map_err(|error| store_status(&error))
    }

    /// Deletes an ended request.
    pub(crate) async fn delete(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
    ) -> Result<(), Status> {
        let record = self.find(caller, name, Access::Write).await?;
        let (store, uid) = (self.store.clone(), record.uid);
        let deleted =
            async move { store.delete_request(uid).await.map_err(|error| store_status(&error)) };
        match self.changes.run(&record.owner.tenant, 0, deleted).await? {
            DeleteOutcome::Deleted => Ok(()),
            DeleteOutcome::NotEnded => Err(failed_precondition(format!(
                "only an ended request can be deleted; this request is {}: cancel it first",
                record.state
            ))),
        }
    }
}

pub(crate) fn owner(caller: &Caller) -> Owner {
    Owner { tenant: caller.principal.tenant.clone(), user: caller.principal.user.clone() }
}

#[cfg(test)]
mod tests;
