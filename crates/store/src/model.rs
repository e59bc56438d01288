//! What goes into the store and comes out of it.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use streamer_core::{RequestState, TenantLimit, Timestamp, Uid};
use streamer_proto::common::v1::{Action, Error, Event, OutputSummary, Progress};

/// The scope of an idempotency key, and who may see a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The tenant.
    pub tenant: String,
    /// The user.
    pub user: String,
}

/// Opaque bytes and what they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPayload {
    /// IANA media type.
    pub content_type: String,
    /// The bytes.
    pub data: Bytes,
}

/// A request to be stored.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Its id.
    pub uid: Uid,
    /// The caller's own id for it, which makes the submission idempotent.
    pub client_id: Option<String>,
    /// Whose it is.
    pub owner: Owner,
    /// What is asked for.
    pub action: String,
    /// Its input.
    pub payload: StoredPayload,
    /// A JSON object kept with it.
    pub metadata: Option<Bytes>,
    /// 0 to 9.
    pub priority: i32,
    /// Now.
    pub create_time: Timestamp,
    /// It is due from then on.
    pub not_before: Timestamp,
    /// It must have started by then.
    pub deadline: Option<Timestamp>,
    /// It must have ended by then.
    pub close_by: Option<Timestamp>,
    /// The request it repeats.
    pub redrive_of: Option<Uid>,
    /// W3C `traceparent` of the submission.
    pub trace_parent: Option<String>,
    /// W3C `tracestate` of the submission.
    pub trace_state: Option<String>,
    /// Hash of action and payload: what the same `client_id` must stand for.
    pub fingerprint: [u8; 32],
    /// What its owner may have, with this request.
    pub quota: Quota,
}

/// How much an owner may have in the store; 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Queued requests of the tenant.
    pub queued_of_tenant: u64,
    /// Queued requests of the user.
    pub queued_of_user: u64,
    /// Bytes of the tenant's requests and logs. Engines that do not count them ignore it.
    pub stored_bytes_of_tenant: u64,
}

/// How much an owner has in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaUse {
    /// Queued requests of the tenant.
    pub queued_of_tenant: u64,
    /// Queued requests of the user.
    pub queued_of_user: u64,
    /// Bytes of the tenant's requests and logs.
    pub stored_bytes_of_tenant: u64,
}

impl Quota {
    /// Which part of it this use goes beyond, if any.
    #[must_use]
    pub fn exceeded_by(&self, used: QuotaUse) -> Option<TenantLimit> {
        let is_over = |used: u64, limit: u64| limit > 0 && used > limit;
        if is_over(used.queued_of_user, self.queued_of_user) {
            Some(TenantLimit::QueuedPerUser)
        } else if is_over(used.queued_of_tenant, self.queued_of_tenant) {
            Some(TenantLimit::QueuedPerTenant)
        } else if is_over(used.stored_bytes_of_tenant, self.stored_bytes_of_tenant) {
            Some(TenantLimit::StoredBytesPerTenant)
        } else {
            None
        }
    }
}

/// What became of a submission.
#[derive(Clone, Debug)]
pub enum CreateOutcome {
    /// It is stored, with this first event. With it, its owner has this much.
    Created(Box<RequestRecord>, Box<Event>, QuotaUse),
    /// The same was submitted before.
    Existing(Box<RequestRecord>),
    /// The `client_id` stands for something else.
    Conflict(Box<RequestRecord>),
    /// Its owner would have more than this limit allows.
    OverQuota(TenantLimit),
}

/// A stored request, without payload and result.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestRecord {
    /// Its id.
    pub uid: Uid,
    /// The caller's own id for it.
    pub client_id: Option<String>,
    /// Whose it is.
    pub owner: Owner,
    /// What was asked for.
    pub action: String,
    /// Where it stands.
    pub state: RequestState,
    /// The latest attempt, from 1; 0 before the first.
    pub attempt: u32,
    /// `seq` of its latest event.
    pub last_seq: i64,
    /// `seq` of the `started` event of the latest attempt; 0 before the first.
    pub attempt_seq: i64,
    /// 0 to 9.
    pub priority: i32,
    /// When it was stored.
    pub create_time: Timestamp,
    /// When its latest attempt began.
    pub start_time: Option<Timestamp>,
    /// When it ended.
    pub finish_time: Option<Timestamp>,
    /// It is due from then on.
    pub not_before: Timestamp,
    /// It must have started by then.
    pub deadline: Option<Timestamp>,
    /// It must have ended by then.
    pub close_by: Option<Timestamp>,
    /// Latest progress of the latest attempt.
    pub progress: Option<Progress>,
    /// A JSON object kept with it.
    pub metadata: Option<Bytes>,
    /// Why cancellation was asked for, when it was.
    pub cancel_reason: Option<String>,
    /// Why it ended, when not well.
    pub error: Option<Error>,
    /// Proof of its output, once it ended.
    pub output: Option<OutputSummary>,
    /// The request it repeats.
    pub redrive_of: Option<Uid>,
    /// W3C `traceparent` of the submission.
    pub trace_parent: Option<String>,
    /// W3C `tracestate` of the submission.
    pub trace_state: Option<String>,
}

impl RequestRecord {
    /// The id by which its owner knows it.
    #[must_use]
    pub fn request_id(&self) -> String {
        self.client_id.clone().unwrap_or_else(|| self.uid.to_string())
    }

    /// Whether it should have started, or ended, before now.
    #[must_use]
    pub fn is_overdue(&self, now: Timestamp) -> bool {
        let passed = |limit: Option<Timestamp>| limit.is_some_and(|limit| limit <= now);
        (self.attempt == 0 && passed(self.deadline)) || passed(self.close_by)
    }
}

/// Asks for the right to run the next attempt.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Of this request.
    pub uid: Uid,
    /// Who asks: one run of one processor.
    pub holder: String,
    /// The worker that will run it, when the processor does not itself.
    pub worker: Option<AssignedWorker>,
    /// Now.
    pub now: Timestamp,
    /// The right lasts until then, unless renewed.
    pub lease_until: Timestamp,
}

/// A worker that gets an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedWorker {
    /// Stored with the lease: only a worker that proves this identity can resume the attempt.
    pub identity: String,
    /// What event `started` shows to the owner of the request, who may be of a different tenant.
    pub display_name: String,
}

impl Claim {
    /// What event `started` shows.
    #[must_use]
    pub fn shown_worker(&self) -> &str {
        self.worker.as_ref().map_or(&self.holder, |worker| &worker.display_name)
    }

    /// What the lease stores of the worker.
    #[must_use]
    pub fn worker_identity(&self) -> Option<&str> {
        self.worker.as_ref().map(|worker| &*worker.identity)
    }
}

/// What became of a claim.
#[derive(Clone, Debug)]
pub enum ClaimOutcome {
    /// The attempt is the caller's.
    Claimed(Box<Claimed>),
    /// It should have started, or ended, before now; it is still queued.
    Overdue(Box<RequestRecord>),
    /// It is not there, not queued or not due.
    NotClaimable,
}

/// Asks to go on with an attempt that another processor had given to a worker.
#[derive(Clone, Debug)]
pub struct Adopt {
    /// The attempt.
    pub lease: Lease,
    /// Who asks: one run of one processor.
    pub holder: String,
    /// [`AssignedWorker::identity`] of the worker that runs it.
    pub worker_identity: String,
    /// Now.
    pub now: Timestamp,
    /// The right lasts until then, unless renewed.
    pub lease_until: Timestamp,
}

/// An attempt to run.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The request, running.
    pub record: RequestRecord,
    /// Its input.
    pub payload: StoredPayload,
    /// What an earlier attempt left.
    pub checkpoint: Option<Bytes>,
    /// The stored `started` event.
    pub started: Event,
}

/// In which capacity somebody appends to a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// As the holder of this attempt: the request must be running it.
    Attempt(u32),
    /// On behalf of a request that waits: it must be queued, after this attempt.
    Queued(u32),
    /// Over the head of a holder that is gone: it must be running this attempt, with a lease that
    /// ended by `now`.
    ExpiredLease(u32),
}

/// Appends events, and moves the request to the state that the last of them tells.
#[derive(Clone, Debug)]
pub struct Append {
    /// To the log of this request.
    pub uid: Uid,
    /// By whom.
    pub writer: Writer,
    /// Contiguous and numbered; `retrying` and terminal ones only at the end. May be empty, to store
    /// a checkpoint alone.
    pub events: Vec<Event>,
    /// New checkpoint.
    pub checkpoint: Option<Bytes>,
    /// With `retrying`: when the next attempt is due.
    pub retry_at: Option<Timestamp>,
    /// Now.
    pub now: Timestamp,
}

/// What became of an append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// The events are stored, by this call or by an earlier one like it.
    Applied {
        /// Why cancellation has been asked for, when it has.
        cancel_reason: Option<String>,
    },
    /// The writer has no right to write (any more), or the events do not follow the log.
    Fenced {
        /// Where the request stands.
        state: RequestState,
        /// Its current attempt.
        attempt: u32,
        /// `seq` of its latest event.
        last_seq: i64,
    },
    /// There is no such request.
    NotFound,
}

/// What became of a cancellation.
#[derive(Clone, Debug)]
pub enum CancelOutcome {
    /// It was queued and is cancelled, with this event.
    Cancelled(Box<RequestRecord>, Box<Event>),
    /// It is running; its holder has to notice.
    Requested(Box<RequestRecord>),
    /// It had ended.
    Ended(Box<RequestRecord>),
    /// There is no such request.
    NotFound,
}

/// What became of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteOutcome {
    /// It is gone, or was not there.
    Deleted,
    /// It has not ended.
    NotEnded,
}

/// Asks for requests that may start, of several tenants.
#[derive(Clone, Debug)]
pub struct DueQuery {
    /// For these actions.
    pub actions: Vec<String>,
    /// Due by then.
    pub now: Timestamp,
    /// Of tenants after this one, in the order of their names.
    pub after_tenant: Option<String>,
    /// Of so many tenants at most.
    pub tenants: usize,
    /// Of each tenant so many at most.
    pub per_tenant: usize,
    /// Of these tenants so many instead; a tenant with none is passed over.
    pub limits: HashMap<String, usize>,
    /// These actions of these tenants are passed over.
    pub blocked: HashSet<(String, String)>,
}

/// A declaration of an action.
#[derive(Clone, Debug, PartialEq)]
pub struct DeclaredAction {
    /// For this tenant; `None` for all.
    pub tenant: Option<String>,
    /// What it declares.
    pub action: Action,
}

/// Requests that may start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DuePage {
    /// Tenant by tenant, each in the order in which they should start.
    pub requests: Vec<DueRequest>,
    /// Where the next page begins: the last tenant that was looked at.
    pub next_tenant: Option<String>,
}

/// How many due requests for the same action are before one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueAhead {
    /// Of the same tenant.
    pub own: u64,
    /// Of the others.
    pub others: u64,
}

/// A request that waits and may start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DueRequest {
    /// Its id.
    pub uid: Uid,
    /// What was asked for.
    pub action: String,
    /// By which tenant.
    pub tenant: String,
    /// 0 to 9.
    pub priority: i32,
    /// Since when it is due.
    pub not_before: Timestamp,
}

/// The right to run an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Of this request.
    pub uid: Uid,
    /// This attempt.
    pub attempt: u32,
}

/// What became of a renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// Of this lease.
    pub lease: Lease,
    /// Whether it is still held.
    pub held: bool,
    /// Why cancellation has been asked for, when it has.
    pub cancel_reason: Option<String>,
}

/// Asks for a page of requests, newest first.
#[derive(Clone, Debug)]
pub struct ListRequests {
    /// Of this tenant.
    pub tenant: String,
    /// Of this user only.
    pub user: Option<String>,
    /// In these states; empty for all.
    pub states: Vec<RequestState>,
    /// For this action only.
    pub action: Option<String>,
    /// Older than this.
    pub before: Option<Uid>,
    /// At most so many.
    pub limit: usize,
}

/// A page of requests.
#[derive(Clone, Debug)]
pub struct RequestPage {
    /// Newest first.
    pub requests: Vec<RequestRecord>,
    /// Where the next page begins.
    pub next: Option<Uid>,
}

/// A page of a log.
#[derive(Clone, Debug)]
pub struct EventPage {
    /// In order, contiguous.
    pub events: Vec<Event>,
    /// Whether there are more.
    pub more: bool,
}

/// A live connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionRecord {
    /// Its id.
    pub id: Uid,
    /// Whose it is.
    pub owner: Owner,
    /// The gateway that holds it.
    pub gateway: String,
    /// Address of the peer.
    pub remote_address: String,
    /// What it calls itself.
    pub user_agent: String,
    /// When it opened.
    pub connect_time: Timestamp,
}

/// A page of connections.
#[derive(Clone, Debug)]
pub struct ConnectionPage {
    /// Oldest first.
    pub connections: Vec<ConnectionRecord>,
    /// Where the next page begins.
    pub next: Option<Uid>,
}

/// How the queue stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Requests that wait.
    pub queued: u64,
    /// When the one that has been due longest became due.
    pub oldest_due: Option<Timestamp>,
}
