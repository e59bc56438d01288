//! What the router does, apart from the shape in which it is asked.

use std::{sync::Arc, time::Duration};

use streamer_auth::{Caller, Principal, Subject};
use streamer_core::{
    Clock, ErrorCode, Limits, LimitsByTenant, RequestError, Timestamp, Uid, Violations, limits,
    validate,
};
use streamer_proto::{
    common::v1::{
        Action, Payload, QueuePosition, Request, RequestState, event::Kind, payload::Body,
    },
    internal::v1::{ExecuteRequest, WakeResponse},
    router::v1::{
        Acknowledgment, Completed, SubmitRequest, SubmitResponse, submit_response::Outcome,
    },
};
use streamer_rpc::{
    completed, encode_payload, not_found, request_to_proto, state_to_proto, status, store_status,
};
use streamer_store::{
    CancelOutcome, CreateOutcome, DeleteOutcome, ListRequests, NewRequest, Owner, RequestPage,
    RequestRecord, Store, StoredPayload, find_by_name,
};
use streamer_telemetry::{TraceContext, trace_span};
use tokio::time::Instant;
use tonic::Status;
use tracing::Instrument;

use crate::{
    admission::{self, Submission},
    catalog::{Catalog, Known},
    change_limiter::ChangeLimiter,
    metrics::RouterMetrics,
    peers::Peers,
    queue::{self, MAX_AHEAD, MAX_AHEAD_OF_NEW},
    quota,
    refusal::{failed_precondition, forbidden, permitted, refuse},
    submission_rates::SubmissionRates,
    wait,
};

/// The id that another service has given to a submission.
#[derive(Clone, Copy)]
pub(crate) struct GivenUid {
    pub(crate) uid: Uid,
    /// The call may have been made before.
    pub(crate) repeated: bool,
}

pub(crate) struct Front {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) metrics: RouterMetrics,
    pub(crate) limits: Limits,
    pub(crate) changes: ChangeLimiter,
    pub(crate) submissions: Arc<SubmissionRates>,
    pub(crate) tenant_limits: LimitsByTenant,
}

/// A request that is stored.
pub(crate) struct Created {
    pub(crate) record: RequestRecord,
    /// It was there before.
    pub(crate) duplicate: bool,
    /// How it looks in the queue; unknown when the processor was not asked or did not answer.
    pub(crate) outlook: Option<WakeResponse>,
}

/// What a caller wants to do with a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

impl Front {
    /// Admits a submission and runs it now, or stores it.
    pub(crate) async fn submit(
        self: &Arc<Self>,
        caller: &Caller,
        request: SubmitRequest,
        uid: Option<GivenUid>,
    ) -> Result<SubmitResponse, Status> {
        let encoding = request.payload_encoding();
        let mut response = self.admit(caller, request, uid).await?;
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
        uid: Option<GivenUid>,
    ) -> Result<SubmitResponse, Status> {
        let now = self.clock.now();
        let mut violations = Violations::default();
        let mut submission = admission::read(request, &self.limits, now, &mut violations);
        submission.uid = uid.map(|given| given.uid);
        // What was acknowledged is not judged anew, by another clock and another list of actions.
        if let Some(given) = uid.filter(|given| given.repeated)
            && let Some(record) = self.stored(caller, given.uid).await?
        {
            let created = self.created_before(record).await;
            return self.acknowledge(caller, created, submission.wait_ms, now).await;
        }
        let refused = |_: &Status| {
            self.metrics.refused.inc();
        };
        // A repeat by another service was admitted when it was made first.
        if !uid.is_some_and(|given| given.repeated) {
            self.submissions.admit(&caller.principal, now).inspect_err(refused)?;
        }
        refuse(&violations).inspect_err(refused)?;
        let Principal { tenant, .. } = &*caller.principal;
        let known = self.catalog.find_or_ask(&submission.action, tenant, &self.peers).await;
        let known = known.inspect_err(refused)?;
        permitted(caller, &known)?;
        let payload = &submission.payload.data;
        let checked = self.catalog.check_payload(&known, tenant, payload, &mut violations).await;
        checked.inspect_err(refused)?;
        refuse(&violations).inspect_err(refused)?;
        if known.action.sync {
            self.run_now(caller, submission, now, &known.offered_by).await
        } else {
            self.store_and_wake(caller, submission, now).await
        }
    }

    async fn run_now(
        &self,
        caller: &Caller,
        submission: Submission,
        now: Timestamp,
        processors: &[Arc<str>],
    ) -> Result<SubmitResponse, Status> {
        self.metrics.submitted_sync.inc();
        let uid = Uid::new(now).to_string();
        let request_id = submission.client_id.unwrap_or_else(|| uid.clone());
        let StoredPayload { content_type, data } = submission.payload;
        let execute = ExecuteRequest {
            action: submission.action,
            payload: Some(Payload { content_type, body: Some(Body::Data(data)) }),
            uid: uid.clone(),
            request_id: request_id.clone(),
        };
        let result = self.peers.execute(caller.authorization.clone(), execute, processors).await?;
        let state = RequestState::Succeeded.into();
        let completed = Completed { state, result, ..Completed::default() };
        Ok(SubmitResponse { request_id, uid, outcome: Some(Outcome::Completed(completed)) })
    }

    async fn store_and_wake(
        self: &Arc<Self>,
        caller: &Caller,
        submission: Submission,
        now: Timestamp,
    ) -> Result<SubmitResponse, Status> {
        let began = Instant::now();
        let wait_ms = submission.wait_ms;
        let created = self.create(owner(caller), submission, now, None).await?;
        self.metrics.submit_seconds.observe(began.elapsed().as_secs_f64());
        self.acknowledge(caller, created, wait_ms, now).await
    }

    /// A request that is stored already, if it is the caller's.
    async fn stored(&self, caller: &Caller, uid: Uid) -> Result<Option<RequestRecord>, Status> {
        let record = self.store.get_request(uid).await.map_err(|error| store_status(&error))?;
        Ok(record.filter(|record| record.owner == owner(caller)))
    }

    /// One that an earlier call has stored, whose answer did not arrive.
    async fn created_before(&self, record: RequestRecord) -> Created {
        let known = self.catalog.get(&record.action, &record.owner.tenant);
        let offered_by = known.as_ref().map_or(&[][..], |known| &known.offered_by);
        let outlook = self.peers.wake(&record, Some(record.not_before), offered_by).await;
        Created { record, duplicate: false, outlook }
    }

    async fn acknowledge(
        &self,
        caller: &Caller,
        created: Created,
        wait_ms: i64,
        now: Timestamp,
    ) -> Result<SubmitResponse, Status> {
        let queue_position = self.position(&created, now).await;
        let Created { record, duplicate, .. } = created;
        let mut response = SubmitResponse {
            request_id: record.request_id(),
            uid: record.uid.to_string(),
            outcome: Some(Outcome::Acknowledgment(Acknowledgment {
                state: state_to_proto(record.state).into(),
                duplicate,
                last_seq: record.last_seq,
                queue_position,
            })),
        };
        if wait_ms > 0 {
            let limit = Duration::from_millis(u64::try_from(wait_ms).unwrap_or(0));
            // It is stored and will run; when waiting fails, the acknowledgement still stands.
            match wait::for_terminal_event(&self.peers, caller, record.uid, limit).await {
                Ok(Some(event)) => {
                    let completed =
                        completed(event).map(|completed| Completed { duplicate, ..completed });
                    response.outcome = completed.map(Outcome::Completed);
                }
                Ok(None) => {}
                Err(status) if wait::is_over_watch_limit(&status) => {
                    tracing::debug!(uid = %record.uid, %status, "may not wait");
                }
                Err(status) => tracing::warn!(uid = %record.uid, %status, "could not wait"),
            }
        }
        Ok(response)
    }

    /// Where it stands in the queue. The acknowledgement does not depend on it.
    async fn position(&self, created: &Created, now: Timestamp) -> Option<QueuePosition> {
        let outlook = created.outlook.as_ref();
        match queue::position(&*self.store, &created.record, outlook, now, MAX_AHEAD_OF_NEW).await {
            Ok(position) => position,
            Err(error) => {
                tracing::warn!(%error, uid = %created.record.uid, "could not tell the queue position");
                None
            }
        }
    }

    /// Stores a request and tells of it.
    pub(crate) async fn create(
        self: &Arc<Self>,
        owner: Owner,
        submission: Submission,
        now: Timestamp,
        redrive_of: Option<Uid>,
    ) -> Result<Created, Status> {
        let delay = Duration::from_millis(u64::try_from(submission.delay_ms).unwrap_or(0));
        let not_before = now.plus(delay);
        let known = self.catalog.get(&submission.action, &owner.tenant);
        let limit = |millis: fn(&Action) -> i64| {
            let millis = known.as_ref().map_or(0, |known| millis(&known.action));
            let millis = u64::try_from(millis).ok().filter(|millis| *millis > 0)?;
            Some(not_before.plus(Duration::from_millis(millis)))
        };
        let trace = TraceContext::current();
        let start_by = limit(|action| action.schedule_to_start_ms);
        let uid = submission.uid.unwrap_or_else(|| Uid::new(now));
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
            quota: quota::of(&self.tenant_limits, &owner.tenant),
        };
        // A request that is stored must be announced, also when its client has gone away.
        let front = self.clone();
        let bytes = new.payload.data.len();
        self.changes.run(bytes, async move { front.store_new(new, owner, known).await }).await
    }

    async fn store_new(
        &self,
        new: NewRequest,
        owner: Owner,
        known: Option<Arc<Known>>,
    ) -> Result<Created, Status> {
        let (uid, is_delayed, quota) = (new.uid, new.not_before > new.create_time, new.quota);
        let created =
            self.store.create_request(new).instrument(trace_span!("store.create_request"));
        match created.await.map_err(|error| store_status(&error))? {
            CreateOutcome::Created(record, ..) | CreateOutcome::Existing(record)
                if record.owner != owner =>
            {
                tracing::error!(%uid, "two requests were given one id");
                Err(status(&RequestError::new(ErrorCode::InternalError, "the id is in use")))
            }
            // Its first answer was lost between services, and the call repeated.
            CreateOutcome::Existing(record) if record.uid == uid => {
                Ok(self.created_before(*record).await)
            }
            CreateOutcome::Created(record, accepted, used) => {
                self.metrics.submitted_async.inc();
                quota::note_use(&self.tenant_limits, &quota, used);
                // In this order: the log exists before anybody writes to it.
                self.peers.announce(record.uid, *accepted, Some(request_to_proto(&record))).await;
                let not_before = is_delayed.then_some(record.not_before);
                let offered_by = known.as_ref().map_or(&[][..], |known| &known.offered_by);
                let outlook = self.peers.wake(&record, not_before, offered_by).await;
                Ok(Created { record: *record, duplicate: false, outlook })
            }
            CreateOutcome::Existing(record) => {
                self.metrics.duplicates.inc();
                Ok(Created { record: *record, duplicate: true, outlook: None })
            }
            CreateOutcome::OverQuota(limit) => {
                self.metrics.refused.inc();
                self.tenant_limits.note_use(limit, 1, 1);
                Err(quota::refusal(limit, &quota))
            }
            CreateOutcome::Conflict(record) => Err(status(&RequestError::new(
                ErrorCode::Conflict,
                format!(
                    "id {:?} was used for another action or payload, in request {}",
                    record.request_id(),
                    record.uid
                ),
            ))),
        }
    }

    /// The request that `name` stands for, if the caller may do this with it.
    pub(crate) async fn find(
        &self,
        caller: &Caller,
        name: &str,
        access: Access,
    ) -> Result<RequestRecord, Status> {
        caller.note_subject(|| Subject::named(name));
        let mut violations = Violations::default();
        violations.check("request_id", validate::request_id(name));
        refuse(&violations)?;
        let found = find_by_name(&*self.store, &owner(caller), name).await;
        let principal = &caller.principal;
        let Some(record) = found.map_err(|error| store_status(&error))? else {
            return Err(not_found(name));
        };
        let Owner { tenant, user } = &record.owner;
        let may_write = principal.may_write(tenant, user);
        // Who may change a request also sees that it exists.
        let may_see = principal.may_read(tenant, user) || access == Access::Write && may_write;
        if !may_see {
            return Err(not_found(name));
        }
        caller.note_subject(|| Subject { owner: Some(user.clone()), ..Subject::named(name) });
        if access == Access::Write && !may_write {
            return Err(forbidden("requests:write"));
        }
        Ok(record)
    }

    /// A request with its payload and, when it has one, its result.
    pub(crate) async fn with_payloads(&self, record: &RequestRecord) -> Result<Request, Status> {
        let mut request = request_to_proto(record);
        let payload = self.store.read_payload(record.uid).await;
        request.payload = payload.map_err(|error| store_status(&error))?.map(|payload| Payload {
            content_type: payload.content_type,
            body: Some(Body::Data(payload.data)),
        });
        request.result = self.result(record).await?;
        request.queue_position = self.position_of_known(record).await?;
        Ok(request)
    }

    async fn position_of_known(
        &self,
        record: &RequestRecord,
    ) -> Result<Option<QueuePosition>, Status> {
        let now = self.clock.now();
        if record.state != streamer_core::RequestState::Queued || record.not_before > now {
            return Ok(None);
        }
        // Asking how it looks is a hint more, which does no harm.
        let known = self.catalog.get(&record.action, &record.owner.tenant);
        let offered_by = known.as_ref().map_or(&[][..], |known| &known.offered_by);
        let outlook = self.peers.wake(record, None, offered_by).await;
        let position =
            queue::position(&*self.store, record, outlook.as_ref(), now, MAX_AHEAD).await;
        position.map_err(|error| store_status(&error))
    }

    /// The result of a request that succeeded; it stands in the last event of its log.
    pub(crate) async fn result(&self, record: &RequestRecord) -> Result<Option<Payload>, Status> {
        if record.state != streamer_core::RequestState::Succeeded {
            return Ok(None);
        }
        let last = self.store.read_events(record.uid, record.last_seq - 1, 1, usize::MAX).await;
        let last = last.map_err(|error| store_status(&error))?.events.pop();
        Ok(last.and_then(|event| match event.kind {
            Some(Kind::Succeeded(succeeded)) => succeeded.result,
            _ => None,
        }))
    }

    /// Reads a page of requests; the caller of this has checked who may see them.
    pub(crate) async fn list(&self, query: ListRequests) -> Result<RequestPage, Status> {
        self.store.list_requests(query).await.map_err(|error| store_status(&error))
    }

    /// Asks that a request end.
    pub(crate) async fn cancel(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        reason: String,
    ) -> Result<RequestRecord, Status> {
        let mut violations = Violations::default();
        violations
            .check("reason", validate::at_most(reason.len(), limits::MAX_REASON_BYTES, "reason"));
        refuse(&violations)?;
        let uid = self.find(caller, name, Access::Write).await?.uid;
        // A cancellation that is stored must reach watchers and processors, also when the client has
        // gone away.
        let front = self.clone();
        let cancelled = self.changes.run(0, async move { front.store_cancel(uid, reason).await });
        cancelled.await?.ok_or_else(|| not_found(name))
    }

    /// The request as it is then; `None` when it does not exist.
    async fn store_cancel(
        &self,
        uid: Uid,
        reason: String,
    ) -> Result<Option<RequestRecord>, Status> {
        let cancelled = self.store.cancel(uid, reason, self.clock.now()).await;
        match cancelled.map_err(|error| store_status(&error))? {
            CancelOutcome::Cancelled(record, event) => {
                self.peers.announce(uid, *event, None).await;
                Ok(Some(*record))
            }
            CancelOutcome::Requested(record) => {
                let reason = record.cancel_reason.clone().unwrap_or_default();
                self.peers.signal_cancel(uid, &reason).await;
                Ok(Some(*record))
            }
            CancelOutcome::Ended(record) => Ok(Some(*record)),
            CancelOutcome::NotFound => Ok(None),
        }
    }

    /// Forgets an ended request.
    pub(crate) async fn delete(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
    ) -> Result<(), Status> {
        let record = self.find(caller, name, Access::Write).await?;
        let (store, uid) = (self.store.clone(), record.uid);
        let deleted = self.changes.run(0, async move {
            store.delete_request(uid).await.map_err(|error| store_status(&error))
        });
        match deleted.await? {
            DeleteOutcome::Deleted => Ok(()),
            DeleteOutcome::NotEnded => Err(failed_precondition(format!(
                "only an ended request is deleted, this one is {}; cancel it first",
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
