//! Input and output types of the store.

use bytes::Bytes;
use streamer_core::{AttemptNumber, RequestState, Seq, TenantLimit, Timestamp, Uid};
use streamer_proto::common::v1::{Action, Error, Event, OutputSummary, Progress};

/// Owner of a request, which is the scope of its client ID and of access to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Name of the tenant.
    pub tenant: String,
    /// Name of the user.
    pub user: String,
}

/// Opaque bytes with their media type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPayload {
    /// IANA media type.
    pub content_type: String,
    /// Content, which the store does not interpret.
    pub data: Bytes,
}

/// Request to store.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Unique ID.
    pub uid: Uid,
    /// ID that the caller specified, which makes the submission idempotent.
    pub client_id: Option<String>,
    /// Owner of the request.
    pub owner: Owner,
    /// Name of the action.
    pub action: String,
    /// Input of the action.
    pub payload: StoredPayload,
    /// Metadata of the caller: a JSON object stored with the request.
    pub metadata: Option<Bytes>,
    /// Priority, from 0 (lowest) to 9 (highest).
    pub priority: i32,
    /// Time at which the request is created.
    pub create_time: Timestamp,
    /// Time at which the request becomes due.
    pub not_before: Timestamp,
    /// Time by which the first attempt must have started.
    pub deadline: Option<Timestamp>,
    /// Time by which the request must have ended.
    pub close_by: Option<Timestamp>,
    /// UID of the original request, if this request is a redrive.
    pub redrive_of: Option<Uid>,
    /// W3C `traceparent` of the submission.
    pub trace_parent: Option<String>,
    /// W3C `tracestate` of the submission.
    pub trace_state: Option<String>,
    /// Hash of the action and the payload. Submissions with the same `client_id` must have the same fingerprint.
    pub fingerprint: [u8; 32],
    /// Limits of the owner, which apply to its usage including this request.
    pub quota: Quota,
}

/// Limits on the usage of the store by an owner; 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Maximum number of queued requests of the tenant.
    pub queued_of_tenant: u64,
    /// Maximum number of queued requests of the user.
    pub queued_of_user: u64,
    /// Maximum number of bytes in the tenant's requests and logs. Engines that do not count bytes ignore this limit.
    pub stored_bytes_of_tenant: u64,
}

/// Usage of the store by an owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaUsage {
    /// Number of queued requests of the tenant.
    pub queued_of_tenant: u64,
    /// Number of queued requests of the user.
    pub queued_of_user: u64,
    /// Number of bytes in the tenant's requests and logs.
    pub stored_bytes_of_tenant: u64,
}

impl Quota {
    /// Returns the limit that `used` exceeds, if any.
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
    /// The request is stored. Contains its record, its first event, and the usage of its owner including this request.
    Created(Box<RequestRecord>, Box<Event>, QuotaUsage),
    /// The same request was submitted before.
    Existing(Box<RequestRecord>),
    /// The `client_id` identifies a different request.
    Conflict(Box<RequestRecord>),
    /// The request would exceed the given limit of its owner.
    OverQuota(TenantLimit),
}

/// Stored request, without its payload and result.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestRecord {
    /// Unique ID.
    pub uid: Uid,
    /// ID that the caller specified.
    pub client_id: Option<String>,
    /// Owner of the request.
    pub owner: Owner,
    /// Name of the action.
    pub action: String,
    /// Current state.
    pub state: RequestState,
    /// Number of the latest attempt, starting at 1; 0 before the first attempt.
    pub attempt: AttemptNumber,
    /// Number of attempts that failed and are retried, without those that were handed back.
    pub failed_attempts: u32,
    /// `seq` of the latest event.
    pub last_seq: Seq,
    /// `seq` of the `started` event of the latest attempt; 0 before the first attempt.
    pub attempt_seq: Seq,
    /// Priority, from 0 (lowest) to 9 (highest).
    pub priority: i32,
    /// Time at which the request was created.
    pub create_time: Timestamp,
    /// Time at which the latest attempt started.
    pub start_time: Option<Timestamp>,
    /// Time at which the request ended.
    pub finish_time: Option<Timestamp>,
    /// Time at which the request becomes due.
    pub not_before: Timestamp,
    /// Time by which the first attempt must have started.
    pub deadline: Option<Timestamp>,
    /// Time by which the request must have ended.
    pub close_by: Option<Timestamp>,
    /// Latest progress of the latest attempt.
    pub progress: Option<Progress>,
    /// Metadata of the caller: a JSON object stored with the request.
    pub metadata: Option<Bytes>,
    /// Reason given in the cancellation request, if any.
    pub cancel_reason: Option<String>,
    /// Error of the request, if it failed.
    pub error: Option<Error>,
    /// Chunk count and digest of the output, once the request has ended.
    pub output: Option<OutputSummary>,
    /// UID of the original request, if this request is a redrive.
    pub redrive_of: Option<Uid>,
    /// W3C `traceparent` of the submission.
    pub trace_parent: Option<String>,
    /// W3C `tracestate` of the submission.
    pub trace_state: Option<String>,
}

impl RequestRecord {
    /// Returns the ID that the owner uses: the client ID or, if the request has none, the UID.
    #[must_use]
    pub fn request_id(&self) -> String {
        self.client_id.clone().unwrap_or_else(|| self.uid.to_string())
    }

    /// Returns whether the time limit for the start of the first attempt, or for the end of the request, has passed at
    /// `now`.
    #[must_use]
    pub fn is_overdue(&self, now: Timestamp) -> bool {
        let passed = |limit: Option<Timestamp>| limit.is_some_and(|limit| limit <= now);
        (self.attempt == AttemptNumber::NONE && passed(self.deadline)) || passed(self.close_by)
    }
}

/// Claim of the lease for the next attempt of a request.
#[derive(Clone, Debug)]
pub struct Claim {
    /// UID of the request to run.
    pub uid: Uid,
    /// Holder of the lease, which identifies one run of a processor.
    pub holder: String,
    /// Worker that will run the attempt; `None` if the processor runs it.
    pub worker: Option<AssignedWorker>,
    /// Current time.
    pub now: Timestamp,
    /// Time at which the lease expires unless it is renewed.
    pub lease_until: Timestamp,
    /// Time of the first call, if this call repeats it because its response was lost. The holder must not have claimed
    /// the request in any other call since then.
    pub repeats: Option<Timestamp>,
}

impl Claim {
    /// Returns whether a running attempt was started by an earlier call that this call repeats. `start_time`, `holder`
    /// and `worker` are those of the attempt.
    #[must_use]
    pub fn is_repetition(
        &self,
        start_time: Option<Timestamp>,
        holder: Option<&str>,
        worker: Option<&str>,
    ) -> bool {
        let is_since = |since: Timestamp| start_time.is_some_and(|start| start >= since);
        self.repeats.is_some_and(is_since)
            && holder == Some(self.holder.as_str())
            && worker == self.worker_identity()
    }
}

/// Worker that an attempt is assigned to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedWorker {
    /// Identity, stored with the lease. Only a worker that proves this identity can resume the attempt.
    pub identity: String,
    /// Name in the `started` event. The owner of the request, who may belong to a different tenant, can see it.
    pub display_name: String,
}

impl Claim {
    /// Returns the worker name for the `started` event.
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
    /// The time limit for the start or the end has passed; the request is still queued.
    Overdue(Box<RequestRecord>),
    /// The request does not exist, is not queued or is not due.
    NotClaimable,
}

/// Takeover of an attempt that a different processor assigned to a worker.
#[derive(Clone, Debug)]
pub struct Adopt {
    /// Lease of the attempt to take over.
    pub lease: Lease,
    /// New holder of the lease, which identifies one run of a processor.
    pub holder: String,
    /// [`AssignedWorker::identity`] of the worker that runs the attempt.
    pub worker_identity: String,
    /// Current time.
    pub now: Timestamp,
    /// Time at which the lease expires unless it is renewed.
    pub lease_until: Timestamp,
}

/// Claimed attempt.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Record of the request, in state [`RequestState::Running`].
    pub record: RequestRecord,
    /// Input of the action.
    pub payload: StoredPayload,
    /// Checkpoint that an earlier attempt saved, if any.
    pub checkpoint: Option<Bytes>,
    /// Stored `started` event.
    pub started: Event,
}

/// Role in which a writer appends to a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Holder of the lease of the given attempt. The request must be running this attempt.
    Attempt(AttemptNumber),
    /// Writer without a lease. The request must be queued, and its latest attempt must be the given one.
    Queued(AttemptNumber),
    /// Writer that replaces a lost holder. The request must be running the given attempt, with a lease that has expired
    /// at `now`.
    ExpiredLease(AttemptNumber),
}

/// Events to append to a log. The last event determines the new state of the request.
#[derive(Clone, Debug)]
pub struct Append {
    /// UID of the request whose log the events are appended to.
    pub uid: Uid,
    /// Role of the writer.
    pub writer: Writer,
    /// Events with contiguous numbers. Only the last event can be `retrying` or terminal. Empty to store only a
    /// checkpoint.
    pub events: Vec<Event>,
    /// New checkpoint, if any.
    pub checkpoint: Option<Bytes>,
    /// Time at which the next attempt is due, if the last event is `retrying`.
    pub retry_at: Option<Timestamp>,
    /// Current time.
    pub now: Timestamp,
}

/// Outcome of an append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppendOutcome {
    /// The events are stored, by this call or by an earlier identical call.
    Applied {
        /// Reason given in the cancellation request, if any.
        cancel_reason: Option<String>,
    },
    /// The writer may not append, or the events do not directly follow the log.
    Fenced {
        /// State of the request.
        state: RequestState,
        /// Number of the current attempt.
        attempt: AttemptNumber,
        /// `seq` of the latest event.
        last_seq: Seq,
    },
    /// The request does not exist.
    NotFound,
}

/// Outcome of a cancellation.
#[derive(Clone, Debug)]
pub enum CancelOutcome {
    /// The request was queued and is now cancelled. Contains its record and the stored event.
    Cancelled(Box<RequestRecord>, Box<Event>),
    /// The request is running; the holder of its lease must handle the cancellation.
    Requested(Box<RequestRecord>),
    /// The request had already ended.
    Ended(Box<RequestRecord>),
    /// The request does not exist.
    NotFound,
}

/// Outcome of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteOutcome {
    /// The request is deleted or did not exist.
    Deleted,
    /// The request has not ended.
    NotEnded,
}

/// Declaration of an action, and the tenant that it applies to.
#[derive(Clone, Debug, PartialEq)]
pub struct DeclaredAction {
    /// Tenant that the declaration applies to; `None` for all tenants.
    pub tenant: Option<String>,
    /// Declared action.
    pub action: Action,
}

/// Lease of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// UID of the request.
    pub uid: Uid,
    /// Number of the attempt.
    pub attempt: AttemptNumber,
}

/// Outcome of a lease renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRenewal {
    /// Lease that was to be renewed.
    pub lease: Lease,
    /// Whether the holder still holds the lease.
    pub held: bool,
    /// Reason given in the cancellation request, if any.
    pub cancel_reason: Option<String>,
}

/// Query for a page of requests, newest first.
#[derive(Clone, Debug)]
pub struct ListRequests {
    /// Tenant whose requests are listed.
    pub tenant: String,
    /// User, or `None` for all users.
    pub user: Option<String>,
    /// States to include; empty for all.
    pub states: Vec<RequestState>,
    /// Action, or `None` for all actions.
    pub action: Option<String>,
    /// UID before which the page starts: only older requests are included; `None` for the first page.
    pub before: Option<Uid>,
    /// Maximum number of requests.
    pub limit: usize,
}

/// Page of requests.
#[derive(Clone, Debug)]
pub struct RequestPage {
    /// Requests, newest first. The page may be short, or empty, although further pages follow.
    pub requests: Vec<RequestRecord>,
    /// Value of [`ListRequests::before`] for the next page; `None` if no page follows.
    pub next: Option<Uid>,
}

/// Page of a log.
#[derive(Clone, Debug)]
pub struct EventPage {
    /// Contiguous events, in order.
    pub events: Vec<Event>,
    /// Whether more events follow.
    pub more: bool,
}

/// Live connection of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionRecord {
    /// Unique ID.
    pub id: Uid,
    /// Tenant and user of the client.
    pub owner: Owner,
    /// Gateway that serves the connection.
    pub gateway: String,
    /// Address of the peer.
    pub remote_address: String,
    /// User agent that the client reports.
    pub user_agent: String,
    /// Time at which the connection was opened.
    pub connect_time: Timestamp,
}

/// Page of connections.
#[derive(Clone, Debug)]
pub struct ConnectionPage {
    /// Connections, oldest first.
    pub connections: Vec<ConnectionRecord>,
    /// Value of `after` for the next page; `None` if no page follows.
    pub next: Option<Uid>,
}
