//! The [`Store`] trait: the contract of every engine.

use std::sync::Arc;

use async_trait::async_trait;
use streamer_core::{Seq, Timestamp, Uid};

use crate::{
    Adopt, Append, AppendOutcome, BackupOutcome, CancelOutcome, Claim, ClaimOutcome,
    ConnectionPage, ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, DuePage,
    DueQuery, EventPage, Lease, LeaseRenewal, ListRequests, NewRequest, Owner, QueueAhead,
    QueueNotifier, QueueStats, ReleasedRequests, RequestPage, RequestRecord, StoreError,
    StoredPayload,
};

/// Store of all durable state. Each method documents its precondition and the effect of a repeated call. When a method
/// returns, its change is durable. When it fails with a [`StoreError`], it has changed nothing. The exception is
/// `Unavailable`, after which the outcome is unknown and the caller should retry.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Stores a request with its `accepted` event. If the owner has already used `client_id`, changes nothing and
    /// returns the request that the client ID identifies. Otherwise, if the owner would exceed `quota`, changes
    /// nothing; engines that several processes share may count the usage with a delay. A repeated call returns
    /// `Existing`, or `Created` if the engine cannot distinguish it from the first call.
    async fn create_request(&self, new: NewRequest) -> Result<CreateOutcome, StoreError>;

    /// Reads a request.
    async fn get_request(&self, uid: Uid) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads the request that `owner` submitted with the given `client_id`.
    async fn find_request(
        &self,
        owner: Owner,
        client_id: String,
    ) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads a page of a tenant's requests, newest first.
    async fn list_requests(&self, query: ListRequests) -> Result<RequestPage, StoreError>;

    /// Reads the payload of a request.
    async fn read_payload(&self, uid: Uid) -> Result<Option<StoredPayload>, StoreError>;

    /// Deletes a request that has ended, together with its log. A repeated call changes nothing.
    async fn delete_request(&self, uid: Uid) -> Result<DeleteOutcome, StoreError>;

    /// Starts the next attempt of a request. The request must be queued and due; it becomes running, with the next
    /// attempt number and a `started` event. A repeated call returns `NotClaimable`, unless [`Claim::repeats`] is set:
    /// then it returns the attempt that an earlier call started.
    async fn claim(&self, claim: Claim) -> Result<ClaimOutcome, StoreError>;

    /// Appends events and updates the state of the request accordingly. The writer must be the current one, and the
    /// events must directly follow the log. A repeated call with stored events changes nothing and returns `Applied`.
    async fn append(&self, append: Append) -> Result<AppendOutcome, StoreError>;

    /// Cancels a queued request, or records that cancellation of a running request is requested. A repeated call
    /// changes nothing; the first reason is kept.
    async fn cancel(
        &self,
        uid: Uid,
        reason: String,
        now: Timestamp,
    ) -> Result<CancelOutcome, StoreError>;

    /// Extends those of the given leases that `holder` still holds; other leases of `holder` expire. A repeated call is
    /// harmless.
    async fn renew_leases(
        &self,
        holder: String,
        leases: Vec<Lease>,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<Vec<LeaseRenewal>, StoreError>;

    /// Reads running requests whose leases have expired at `now`, starting with the lease that expired first.
    async fn expired_leases(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError>;

    /// Takes over a running attempt that its worker is still executing. The request must be running the given attempt,
    /// and the attempt must be assigned to the given worker; the previous holder of the lease is not checked. The log
    /// fences the previous holder: events that it still appends are rejected, because their numbers are already in use.
    /// A checkpoint without events is not rejected, so if several processors share the store, the previous holder must
    /// stop first. Returns `None` if the attempt is not assigned to the worker. A repeated call is harmless.
    async fn adopt(&self, adopt: Adopt) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads queued requests whose time limit for the start or the end has passed at `now`, longest overdue first.
    async fn overdue_requests(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError>;

    /// Reads due requests of several tenants and their users; see [`DueQuery`]. A request that was not due when it was queued is included after it was released by
    /// [`Self::release_delayed`]. The cost does not depend on the number of other queued requests: those with a delay,
    /// for other actions, or behind the limits of their tenant and user.
    async fn due_requests(&self, query: DueQuery) -> Result<DuePage, StoreError>;

    /// Counts the due requests for the same action that precede `record` in the queue, each count up to `limit`.
    async fn queue_ahead(
        &self,
        record: RequestRecord,
        limit: usize,
    ) -> Result<QueueAhead, StoreError>;

    /// Includes delayed requests that are due at `now` in the results of [`Self::due_requests`]: at most `limit` of
    /// them, earliest first. A repeated call is harmless.
    async fn release_delayed(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<ReleasedRequests, StoreError>;

    /// Returns statistics of the queue.
    async fn queue_stats(&self) -> Result<QueueStats, StoreError>;

    /// Reads the events after `after_seq`: at most `max_events`, and no further events once `max_bytes` is reached, but
    /// at least one event if one exists.
    async fn read_events(
        &self,
        uid: Uid,
        after_seq: Seq,
        max_events: usize,
        max_bytes: usize,
    ) -> Result<EventPage, StoreError>;

    /// Stores opened connections and deletes closed connections. A repeated call is harmless.
    async fn update_connections(
        &self,
        opened: Vec<ConnectionRecord>,
        closed: Vec<Uid>,
    ) -> Result<(), StoreError>;

    /// Records that `gateway`, and with it its connections, is alive until `until`. A repeated call is harmless.
    async fn renew_gateway(&self, gateway: String, until: Timestamp) -> Result<(), StoreError>;

    /// Reads a tenant's connections on gateways that are alive at `now`, oldest first.
    async fn list_connections(
        &self,
        tenant: String,
        user: Option<String>,
        after: Option<Uid>,
        limit: usize,
        now: Timestamp,
    ) -> Result<ConnectionPage, StoreError>;

    /// Stores declarations of actions, which apply while no processor or worker offers the actions. They replace
    /// earlier declarations with the same name and tenant. A repeated call is harmless.
    async fn save_actions(
        &self,
        actions: Vec<DeclaredAction>,
        now: Timestamp,
    ) -> Result<(), StoreError>;

    /// Reads the declarations that were saved at or after `since`.
    async fn list_actions(&self, since: Timestamp) -> Result<Vec<DeclaredAction>, StoreError>;

    /// Returns the notifier of queued requests, if the engine has one.
    fn queue_notifier(&self) -> Option<Arc<dyn QueueNotifier>> {
        None
    }

    /// Copies the state of one moment, with all changes that were durable before the call, to temporary disk space that
    /// is freed when the copy is dropped, the call is cancelled, or the process exits. Other operations continue. The
    /// store must have no other copy. A repeated call makes a new copy.
    async fn back_up(&self) -> Result<BackupOutcome, StoreError> {
        Ok(BackupOutcome::NotSupported)
    }

    /// Verifies that the store can write durably.
    async fn check(&self) -> Result<(), StoreError>;
}
