//! The contract that every engine keeps.

use std::sync::Arc;

use async_trait::async_trait;
use streamer_core::{Timestamp, Uid};

use crate::{
    Adopt, Append, Appended, CancelOutcome, Claim, ClaimOutcome, ConnectionPage, ConnectionRecord,
    CreateOutcome, DeclaredAction, DeleteOutcome, DuePage, DueQuery, EventPage, Lease,
    ListRequests, NewRequest, Owner, QueueAhead, QueueStats, QueueTrigger, Renewed, RequestPage,
    RequestRecord, StoreError, StoredPayload,
};

/// Everything durable. Each method says its precondition and what a repeat does; each is durable
/// when it answers, or changed nothing when it fails with [`StoreError`] (after `Unavailable` the
/// outcome is unknown: repeat it).
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Stores a request with its `accepted` event. With a `client_id` that the owner has used, it
    /// changes nothing and says what that stands for. Otherwise, when the owner would have more than
    /// `quota` allows, it changes nothing either; engines that several processes share count with a delay.
    /// A repeat is `Existing`, or `Created` where it looks like the first call.
    async fn create_request(&self, new: NewRequest) -> Result<CreateOutcome, StoreError>;

    /// Reads a request.
    async fn get_request(&self, uid: Uid) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads the request that its owner knows as `client_id`.
    async fn find_request(
        &self,
        owner: Owner,
        client_id: String,
    ) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads a page of a tenant's requests, newest first.
    async fn list_requests(&self, query: ListRequests) -> Result<RequestPage, StoreError>;

    /// Reads a request's input.
    async fn read_payload(&self, uid: Uid) -> Result<Option<StoredPayload>, StoreError>;

    /// Removes a request that has ended, with its log. A repeat changes nothing.
    async fn delete_request(&self, uid: Uid) -> Result<DeleteOutcome, StoreError>;

    /// Starts the next attempt: the request must be queued and due. It becomes running, with the
    /// next attempt number and a `started` event. A repeat is `NotClaimable`.
    async fn claim(&self, claim: Claim) -> Result<ClaimOutcome, StoreError>;

    /// Appends events and moves the state with them: the writer must be the current one and the
    /// events must follow the log. A repeat of what is stored is `Applied` and changes nothing.
    async fn append(&self, append: Append) -> Result<Appended, StoreError>;

    /// Cancels a queued request, or notes that cancellation of a running one is asked for. A
    /// repeat changes nothing; the first reason stays.
    async fn cancel(
        &self,
        uid: Uid,
        reason: String,
        now: Timestamp,
    ) -> Result<CancelOutcome, StoreError>;

    /// Prolongs leases that `holder` still holds; what else is under its name ends. A repeat is
    /// harmless.
    async fn renew_leases(
        &self,
        holder: String,
        leases: Vec<Lease>,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<Vec<Renewed>, StoreError>;

    /// Reads running requests whose lease ended by `now`, longest expired first.
    async fn expired_leases(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError>;

    /// Goes on with a running attempt that its worker still has: the request must be running it,
    /// given to that worker, whoever held the lease. The holder before is fenced by the log: the
    /// events that it still appends collide; its checkpoints alone do not, so it must stop first where
    /// several processors share the store. `None` when the attempt is not that worker's. A repeat is
    /// harmless.
    async fn adopt(&self, adopt: Adopt) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads queued requests that should have started, or ended, by `now`, the longest overdue
    /// first.
    async fn overdue_requests(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError>;

    /// Reads queued requests that are due, of several tenants: of each the highest priority first,
    /// then the oldest. What tenants have queued beyond that costs nothing.
    async fn due_requests(&self, query: DueQuery) -> Result<DuePage, StoreError>;

    /// Counts the due requests for the same action that come before this one, each count up to
    /// `limit`.
    async fn queue_ahead(
        &self,
        record: RequestRecord,
        now: Timestamp,
        limit: usize,
    ) -> Result<QueueAhead, StoreError>;

    /// Reads when the next queued request that is not due at `now` becomes due.
    async fn next_due(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError>;

    /// Reads how the queue stands at `now`.
    async fn queue_stats(&self, now: Timestamp) -> Result<QueueStats, StoreError>;

    /// Reads events after `after_seq`: at most `max_events`, and no more once `max_bytes` are
    /// reached, but at least one when there is one.
    async fn read_events(
        &self,
        uid: Uid,
        after_seq: i64,
        max_events: usize,
        max_bytes: usize,
    ) -> Result<EventPage, StoreError>;

    /// Notes live connections and forgets closed ones. A repeat is harmless.
    async fn update_connections(
        &self,
        opened: Vec<ConnectionRecord>,
        closed: Vec<Uid>,
    ) -> Result<(), StoreError>;

    /// Says that a gateway, and with it its connections, lives until then. A repeat is harmless.
    async fn renew_gateway(&self, gateway: String, until: Timestamp) -> Result<(), StoreError>;

    /// Reads a tenant's connections on gateways that live at `now`, oldest first.
    async fn list_connections(
        &self,
        tenant: String,
        user: Option<String>,
        after: Option<Uid>,
        limit: usize,
        now: Timestamp,
    ) -> Result<ConnectionPage, StoreError>;

    /// Keeps declarations of actions for the time when nobody offers them, in place of earlier ones
    /// of the same names for the same tenants. A repeat is harmless.
    async fn save_actions(
        &self,
        actions: Vec<DeclaredAction>,
        now: Timestamp,
    ) -> Result<(), StoreError>;

    /// Reads the declarations that were saved at or after `since`.
    async fn list_actions(&self, since: Timestamp) -> Result<Vec<DeclaredAction>, StoreError>;

    /// Who tells of requests that wait, where the engine has such a thing.
    fn queue_trigger(&self) -> Option<Arc<dyn QueueTrigger>> {
        None
    }

    /// Proves that it can write durably.
    async fn check(&self) -> Result<(), StoreError>;
}
