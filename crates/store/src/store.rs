//! Contract of every engine.

use std::sync::Arc;

use async_trait::async_trait;
use streamer_core::{Timestamp, Uid};

use crate::{
    Adopt, Append, AppendOutcome, CancelOutcome, Claim, ClaimOutcome, ConnectionPage,
    ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, DuePage, DueQuery, EventPage,
    Lease, LeaseRenewal, ListRequests, NewRequest, Owner, QueueAhead, QueueNotifier, QueueStats,
    RequestPage, RequestRecord, StoreError, StoredPayload,
};

/// All durable state. Each method documents its precondition and the effect of a repeat. When a
/// method returns, its change is durable; when it fails with [`StoreError`], it changed nothing,
/// except that after `Unavailable` the outcome is unknown: retry.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Stores a request with its `accepted` event. If the owner has used `client_id` before,
    /// changes nothing and returns the request that it identifies. Otherwise, if the owner would
    /// exceed `quota`, changes nothing; engines that several processes share count with a delay. A
    /// repeat returns `Existing`, or `Created` where it cannot be distinguished from the first
    /// call.
    async fn create_request(&self, new: NewRequest) -> Result<CreateOutcome, StoreError>;

    /// Reads a request.
    async fn get_request(&self, uid: Uid) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads the request that its owner submitted as `client_id`.
    async fn find_request(
        &self,
        owner: Owner,
        client_id: String,
    ) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads a page of a tenant's requests, newest first.
    async fn list_requests(&self, query: ListRequests) -> Result<RequestPage, StoreError>;

    /// Reads a request's input.
    async fn read_payload(&self, uid: Uid) -> Result<Option<StoredPayload>, StoreError>;

    /// Deletes a request that has ended, with its log. A repeat changes nothing.
    async fn delete_request(&self, uid: Uid) -> Result<DeleteOutcome, StoreError>;

    /// Starts the next attempt. The request must be queued and due; it becomes running, with the
    /// next attempt number and a `started` event. A repeat returns `NotClaimable`.
    async fn claim(&self, claim: Claim) -> Result<ClaimOutcome, StoreError>;

    /// Appends events and updates the state accordingly. The writer must be the current one and the
    /// events must follow the log. A repeat of stored events returns `Applied` and changes nothing.
    async fn append(&self, append: Append) -> Result<AppendOutcome, StoreError>;

    /// Cancels a queued request, or records that cancellation of a running one is requested. A
    /// repeat changes nothing; the first reason is kept.
    async fn cancel(
        &self,
        uid: Uid,
        reason: String,
        now: Timestamp,
    ) -> Result<CancelOutcome, StoreError>;

    /// Extends the leases that `holder` still holds; its other leases end. A repeat is harmless.
    async fn renew_leases(
        &self,
        holder: String,
        leases: Vec<Lease>,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<Vec<LeaseRenewal>, StoreError>;

    /// Reads running requests whose lease expired by `now`, longest expired first.
    async fn expired_leases(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError>;

    /// Takes over a running attempt that its worker still has. The request must be running this
    /// attempt, assigned to this worker; the previous holder does not matter. The log fences that
    /// holder: events that it still appends collide. A checkpoint without events does not, so the
    /// holder must stop first where several processors share the store. Returns `None` when the
    /// attempt is not that worker's. A repeat is harmless.
    async fn adopt(&self, adopt: Adopt) -> Result<Option<RequestRecord>, StoreError>;

    /// Reads queued requests that should have started, or ended, by `now`, longest overdue first.
    async fn overdue_requests(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError>;

    /// Reads due requests of several tenants: of each tenant the highest priority first, then the
    /// oldest. The cost does not depend on how many more requests a tenant has queued.
    async fn due_requests(&self, query: DueQuery) -> Result<DuePage, StoreError>;

    /// Counts the due requests for the same action that are ahead of this one, each count up to
    /// `limit`.
    async fn queue_ahead(
        &self,
        record: RequestRecord,
        now: Timestamp,
        limit: usize,
    ) -> Result<QueueAhead, StoreError>;

    /// Returns when the next queued request that is not due at `now` becomes due.
    async fn next_due(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError>;

    /// Returns statistics of the queue at `now`.
    async fn queue_stats(&self, now: Timestamp) -> Result<QueueStats, StoreError>;

    /// Reads events after `after_seq`: at most `max_events`, stopping once `max_bytes` are reached,
    /// but at least one if one exists.
    async fn read_events(
        &self,
        uid: Uid,
        after_seq: i64,
        max_events: usize,
        max_bytes: usize,
    ) -> Result<EventPage, StoreError>;

    /// Stores live connections and deletes closed ones. A repeat is harmless.
    async fn update_connections(
        &self,
        opened: Vec<ConnectionRecord>,
        closed: Vec<Uid>,
    ) -> Result<(), StoreError>;

    /// Records that a gateway, and with it its connections, is alive until `until`. A repeat is
    /// harmless.
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

    /// Stores declarations of actions, which apply while no processor or worker offers them;
    /// replaces earlier ones of the same names and tenants. A repeat is harmless.
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

    /// Verifies that the store can write durably.
    async fn check(&self) -> Result<(), StoreError>;
}
