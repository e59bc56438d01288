//! Contract of the store for all durable state: the trait, the model and the errors, without an engine.
//!
//! The router, the processor, the progress service and the gateway call an engine through [`Store`]; the assembly
//! selects the engine once. The conformance suite in `tests/` checks that every engine maintains these invariants:
//!
//! - Each method is one atomic, idempotent state change that can be implemented as one DynamoDB conditional write or
//!   transaction. A state change and its event are stored atomically.
//! - When a method returns, its change is durable.
//! - The events of a request are numbered from 1 without gaps; only the current attempt writes them.

mod append_rules;
mod backup;
mod error;
mod log_numbers;
mod lookup;
mod model;
mod queue;
mod queue_notifier;
mod store;

pub use append_rules::LogHead;
pub use backup::{Backup, BackupContent, BackupOutcome};
pub use error::StoreError;
pub use log_numbers::{
    EventNumbers, InvalidNumber, RequestNumbers, check_appended, check_events, log_event,
};
pub use lookup::find_by_client_id_or_uid;
pub use model::{
    Adopt, Append, AppendOutcome, AssignedWorker, CancelOutcome, Claim, ClaimOutcome, Claimed,
    ConnectionPage, ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, EventPage,
    Lease, LeaseRenewal, ListRequests, NewRequest, Owner, Quota, QuotaUsage, RequestPage,
    RequestRecord, StoredPayload, Writer,
};
pub use queue::{
    ActionQueue, DuePage, DueQuery, DueRequest, QueueAhead, QueueKey, QueueStats, ReleasedRequests,
};
pub use queue_notifier::{QueueCallback, QueueNotifier, QueuedRequest};
pub use store::Store;
