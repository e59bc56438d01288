//! Store for all durable state, behind one trait.
//!
//! Router, processor, progress and gateway call it through [`Store`]; [`open`] selects the engine
//! once. Invariants of every engine, which the conformance suite in `tests/` checks:
//!
//! - One method is one atomic, idempotent state change, feasible as one DynamoDB conditional write
//!   or transaction. The state change and its event are one step.
//! - When a method returns, its change is on disk.
//! - A request's events are numbered from 1 without gaps; only the current attempt writes them.

mod error;
mod lookup;
mod model;
mod queue_notifier;
mod sqlite;
mod store;

use std::{path::PathBuf, sync::Arc};

pub use error::StoreError;
pub use lookup::find_by_client_id_or_uid;
pub use model::{
    Adopt, Append, AppendOutcome, AssignedWorker, CancelOutcome, Claim, ClaimOutcome, Claimed,
    ConnectionPage, ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, DuePage,
    DueQuery, DueRequest, EventPage, Lease, LeaseRenewal, ListRequests, NewRequest, Owner,
    QueueAhead, QueueStats, Quota, QuotaUsage, RequestPage, RequestRecord, StoredPayload, Writer,
};
pub use queue_notifier::{QueueCallback, QueueNotifier, QueuedRequest};
pub use sqlite::SqliteStore;
pub use store::Store;

/// Engine and its settings.
#[derive(Clone, Debug)]
pub enum Engine {
    /// SQLite in this process: one database file in a data folder that one process can open at a
    /// time.
    Sqlite {
        /// Data folder; created if it does not exist.
        data: PathBuf,
    },
}

/// Opens the store.
///
/// # Errors
/// Returns an error if the folder is not writable, another process has the store open, or the file
/// is corrupt or has a newer schema version.
pub fn open(engine: &Engine) -> Result<Arc<dyn Store>, StoreError> {
    match engine {
        Engine::Sqlite { data } => Ok(Arc::new(SqliteStore::open(data)?)),
    }
}
