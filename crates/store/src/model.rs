//! Input and output types of the store.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use streamer_core::{RequestState, TenantLimit, Timestamp, Uid};
use streamer_proto::common::v1::{Action, Error, Event, OutputSummary, Progress};

/// Owner of a request: the scope of its idempotency key and of access to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Tenant.
    pub tenant: String,
    /// User.
    pub user: String,
}

/// Opaque bytes with their media type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPayload {
    /// IANA media type.
    pub content_type: String,
    /// Bytes.
    pub data: Bytes,
}

/// A request to store.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Unique id.
    pub uid: Uid,
    /// Id chosen by the caller, which makes the submission idempotent.
    pub client_id: Option<String>,
    /// Owner.
    pub owner: Owner,
    /// Name of the action.
    pub action: String,
    /// Input.
    pub payload: StoredPayload,
    /// JSON object stored with the request.
    pub metadata: Option<Bytes>,
    /// Priority, 0 to 9.
    pub priority: i32,
    /// Current time.
    pub create_time: Timestamp,
    /// When the request becomes due.
    pub not_before: Timestamp,
    /// Time by which the request must have started.
    pub deadline: Option<Timestamp>,
    /// Time by which the request must have ended.
    pub close_by: Option<Timestamp>,
    /// Request that this one repeats.
    pub redrive_of: Option<Uid>,
    /// W3C `traceparent` of the submission.
    pub trace_parent: Option<String>,
    /// W3C `tracestate` of the submission.
    pub trace_state: Option<String>,
    /// Hash of action and payload; a submission with the same `client_id` must have the same one.
    pub fingerprint: [u8; 32],
    /// Limits of the owner, which include this request.
    pub quota: Quota,
}

/// Limits of an owner in the store; 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Queued requests of the tenant.
    pub queued_of_tenant: u64,
    /// Queued requests of the user.
    pub queued_of_user: u64,
    /// Bytes of the tenant's requests and logs. Engines that do not count them ignore this limit.
    pub stored_bytes_of_tenant: u64,
}

/// Use of the store by an owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaUsage {
    /// Queued requests of the tenant.
    pub queued_of_tenant: u64,
    /// Queued requests of the user.
    pub queued_of_user: u64,
    /// Bytes of the tenant's requests and logs.
    pub stored_bytes_of_tenant: u64,
}

impl Quota {
    /// Returns the limit that this use exceeds, if any.
    #[must_use]
    pub fn exceeded_by(&self, used: QuotaUsage) -> Option<TenantLimit> {
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

/// Outcome of a submission.
#[derive(Clone, Debug)]
pub enum CreateOutcome {
    /// The request is stored, with this first event and this use by its owner, which includes it.
    Created(Box<RequestRecord>, Box<Event>, QuotaUsage),
    /// The same request was submitted before.
    Existing(Box<RequestRecord>),
    /// The `client_id` identifies a different request.
    Conflict(Box<RequestRecord>),
    /// The owner would exceed this limit.
    OverQuota(TenantLimit),
}

/// A stored request, without payload and result.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestRecord {
    /// Unique id.
    pub uid: Uid,
    /// Id chosen by the caller.
    pub client_id: Option<String>,
    /// Owner.
    pub owner: Owner,
    /// Name of the action.
    pub action: String,
    /// State.
    pub state: RequestState,
    /// Number of the latest attempt, from 1; 0 before the first.
    pub attempt: u32,
    /// `seq` of the latest event.
    pub last_seq: i64,
    /// `seq` of the `started` event of the latest attempt; 0 before the first.
    pub attempt_seq: i64,
    /// Priority, 0 to 9.
    pub priority: i32,
    /// When the request was stored.
    pub create_time: Timestamp,
    /// When the latest attempt started.
    pub start_time: Option<Timestamp>,
    /// When the request ended.
    pub finish_time: Option<Timestamp>,
    /// When the request becomes due.
    pub not_before: Timestamp,
    /// Time by which the request must have started.
    pub deadline: Option<Timestamp>,
    /// Time by which the request must have ended.
    pub close_by: Option<Timestamp>,
    /// Latest progress of the latest attempt.
    pub progress: Option<Progress>,
    /// JSON object stored with the request.
    pub metadata: Option<Bytes>,
    /// Reason of the cancellation request, if any.
    pub cancel_reason: Option<String>,
    /// Error of a failed request.
    pub error: Option<Error>,
    /// Chunk count and digest of the output, once the request has ended.
    pub output: Option<OutputSummary>,
    /// Request that this one repeats.
    pub redrive_of: Option<Uid>,
    /// W3C `traceparent` of the submission.
    pub trace_parent: Option<String>,
    /// W3C `tracestate` of the submission.
    pub trace_state: Option<String>,
}

impl RequestRecord {
    /// Returns the id that the owner uses: the client id, else the uid.
    #[must_use]
    pub fn request_id(&self) -> String {
        self.client_id.clone().unwrap_or_else(|| self.uid.to_string())
    }

    /// Returns whether the time limit to start, or to end, has passed at `now`.
    #[must_use]
    pub fn is_overdue(&self, now: Timestamp) -> bool {
        let passed = |limit: Option<Timestamp>| limit.is_some_and(|limit| limit <= now);
        (self.attempt == 0 && passed(self.deadline)) || passed(self.close_by)
    }
}

/// Claim of the lease to run the next attempt.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Request to run.
    pub uid: Uid,
    /// Holder of the lease: one run of one processor.
    pub holder: String,
    /// Worker that will run the attempt, unless the processor runs it itself.
    pub worker: Option<AssignedWorker>,
    /// Current time.
    pub now: Timestamp,
    /// When the lease expires, unless renewed.
    pub lease_until: Timestamp,
}

/// Worker that an attempt is assigned to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedWorker {
    /// Stored with the lease: only a worker that proves this identity can resume the attempt.
    pub identity: String,
    /// Name in event `started`, which the owner of the request sees; the owner may be of a
    /// different tenant.
    pub display_name: String,
}

impl Claim {
    /// Returns the worker name for event `started`.
    #[must_use]
    pub fn worker_display_name(&self) -> &str {
        self.worker.as_ref().map_or(&self.holder, |worker| &worker.display_name)
    }

    /// Returns the worker identity to store with the lease.
    #[must_use]
    pub fn worker_identity(&self) -> Option<&str> {
        self.worker.as_ref().map(|worker| &*worker.identity)
    }
}

/// Outcome of a claim.
#[derive(Clone, Debug)]
pub enum ClaimOutcome {
    /// The caller holds the lease of the attempt.
    Claimed(Box<Claimed>),
    /// The time limit to start, or to end, has passed; the request is still queued.
    Overdue(Box<RequestRecord>),
    /// The request does not exist, is not queued or is not due.
    NotClaimable,
}

/// Takeover of an attempt that a different processor assigned to a worker.
#[derive(Clone, Debug)]
pub struct Adopt {
    /// Attempt to take over.
    pub lease: Lease,
    /// New holder of the lease: one run of one processor.
    pub holder: String,
    /// [`AssignedWorker::identity`] of the worker that runs it.
    pub worker_identity: String,
    /// Current time.
    pub now: Timestamp,
    /// When the lease expires, unless renewed.
    pub lease_until: Timestamp,
}

/// A claimed attempt.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The request, in state running.
    pub record: RequestRecord,
    /// Input.
    pub payload: StoredPayload,
    /// Checkpoint of an earlier attempt.
    pub checkpoint: Option<Bytes>,
    /// Stored `started` event.
    pub started: Event,
}

/// Role in which a writer appends to a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Holder of this attempt: the request must be running it.
    Attempt(u32),
    /// Writer without a lease: the request must be queued, after this attempt.
    Queued(u32),
    /// Writer in place of a lost holder: the request must be running this attempt, with a lease
    /// that expired by `now`.
    ExpiredLease(u32),
}

/// Events to append. The last of them determines the new state of the request.
#[derive(Clone, Debug)]
pub struct Append {
    /// Request whose log to append to.
    pub uid: Uid,
    /// Role of the writer.
    pub writer: Writer,
    /// Contiguous, numbered events; `retrying` and terminal ones only at the end. May be empty, to
    /// store only a checkpoint.
    pub events: Vec<Event>,
    /// New checkpoint.
    pub checkpoint: Option<Bytes>,
    /// When the next attempt is due, with event `retrying`.
    pub retry_at: Option<Timestamp>,
    /// Current time.
    pub now: Timestamp,
}

/// Outcome of an append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppendOutcome {
    /// The events are stored, by this call or by an earlier identical one.
    Applied {
        /// Reason of the cancellation request, if any.
        cancel_reason: Option<String>,
    },
    /// The writer may not, or no longer, append, or the events do not follow the log.
    Fenced {
        /// State of the request.
        state: RequestState,
        /// Current attempt.
        attempt: u32,
        /// `seq` of the latest event.
        last_seq: i64,
    },
    /// The request does not exist.
    NotFound,
}

/// Outcome of a cancellation.
#[derive(Clone, Debug)]
pub enum CancelOutcome {
    /// The request was queued and is now cancelled, with this event.
    Cancelled(Box<RequestRecord>, Box<Event>),
    /// The request is running; its holder must handle the cancellation.
    Requested(Box<RequestRecord>),
    /// The request had already ended.
    Ended(Box<RequestRecord>),
    /// The request does not exist.
    NotFound,
}

/// Outcome of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteOutcome {
    /// The request is deleted, or did not exist.
    Deleted,
    /// The request has not ended.
    NotEnded,
}

/// Query for due requests of several tenants.
#[derive(Clone, Debug)]
pub struct DueQuery {
    /// Actions to include.
    pub actions: Vec<String>,
    /// Current time, by which the requests must be due.
    pub now: Timestamp,
    /// Last tenant of the previous page; tenants are read in the order of their names.
    pub after_tenant: Option<String>,
    /// Maximum number of tenants.
    pub tenants: usize,
    /// Maximum number of requests of each tenant.
    pub per_tenant: usize,
    /// Limits that replace `per_tenant` for these tenants; 0 skips the tenant.
    pub limits: HashMap<String, usize>,
    /// Pairs of tenant and action to skip.
    pub blocked: HashSet<(String, String)>,
}

/// Declaration of an action.
#[derive(Clone, Debug, PartialEq)]
pub struct DeclaredAction {
    /// Tenant that it applies to; `None` for all.
    pub tenant: Option<String>,
    /// Declared action.
    pub action: Action,
}

/// A page of due requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DuePage {
    /// Grouped by tenant, each group in start order.
    pub requests: Vec<DueRequest>,
    /// `after_tenant` of the next page: the last tenant that was read.
    pub next_tenant: Option<String>,
}

/// Number of due requests for the same action that are ahead of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueAhead {
    /// Requests of the same tenant.
    pub own: u64,
    /// Requests of other tenants.
    pub others: u64,
}

/// A queued request that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DueRequest {
    /// Unique id.
    pub uid: Uid,
    /// Name of the action.
    pub action: String,
    /// Tenant of the owner.
    pub tenant: String,
    /// Priority, 0 to 9.
    pub priority: i32,
    /// When the request became due.
    pub not_before: Timestamp,
}

/// Lease of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Request.
    pub uid: Uid,
    /// Attempt number.
    pub attempt: u32,
}

/// Outcome of a lease renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRenewal {
    /// Lease to renew.
    pub lease: Lease,
    /// Whether the lease is still held.
    pub held: bool,
    /// Reason of the cancellation request, if any.
    pub cancel_reason: Option<String>,
}

/// Query for a page of requests, newest first.
#[derive(Clone, Debug)]
pub struct ListRequests {
    /// Tenant.
    pub tenant: String,
    /// User, or `None` for all users.
    pub user: Option<String>,
    /// States to include; empty for all.
    pub states: Vec<RequestState>,
    /// Action, or `None` for all actions.
    pub action: Option<String>,
    /// Only requests older than this one.
    pub before: Option<Uid>,
    /// Maximum number of requests.
    pub limit: usize,
}

/// A page of requests.
#[derive(Clone, Debug)]
pub struct RequestPage {
    /// Requests, newest first.
    pub requests: Vec<RequestRecord>,
    /// `before` of the next page.
    pub next: Option<Uid>,
}

/// A page of a log.
#[derive(Clone, Debug)]
pub struct EventPage {
    /// Contiguous events, in order.
    pub events: Vec<Event>,
    /// Whether more events follow.
    pub more: bool,
}

/// A live connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionRecord {
    /// Unique id.
    pub id: Uid,
    /// Owner.
    pub owner: Owner,
    /// Gateway that holds the connection.
    pub gateway: String,
    /// Address of the peer.
    pub remote_address: String,
    /// User agent that the client reports.
    pub user_agent: String,
    /// When the connection was opened.
    pub connect_time: Timestamp,
}

/// A page of connections.
#[derive(Clone, Debug)]
pub struct ConnectionPage {
    /// Connections, oldest first.
    pub connections: Vec<ConnectionRecord>,
    /// `after` of the next page.
    pub next: Option<Uid>,
}

/// Statistics of the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Number of queued requests.
    pub queued: u64,
    /// When the request that has been due longest became due.
    pub oldest_due: Option<Timestamp>,
}
