//! The store: everything durable, behind one trait.
//!
//! Router, processor, progress and gateway call it through [`Store`]; which engine stands behind
//! it is decided once, by [`open`]. Invariants that hold for every engine, and that the
//! conformance suite in `tests/` checks:
//!
//! - One method is one atomic, idempotent change of state, feasible as one DynamoDB conditional
//!   write or transaction. The change of state and the event that tells of it are one step.
//! - When a method answers, what it changed is on disk.
//! - A request's events are numbered from 1 without gaps; only the current attempt writes them.

mod error;
mod find;
mod model;
mod sqlite;
mod store;
mod trigger;

use std::{path::PathBuf, sync::Arc};

pub use error::StoreError;
pub use find::find_by_name;
pub use model::{
    Adopt, Append, Appended, AssignedWorker, CancelOutcome, Claim, ClaimOutcome, Claimed,
    ConnectionPage, ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, DuePage,
    DueQuery, DueRequest, EventPage, Lease, ListRequests, NewRequest, Owner, QueueAhead,
    QueueStats, Quota, QuotaUse, Renewed, RequestPage, RequestRecord, StoredPayload, Writer,
};
pub use sqlite::SqliteStore;
pub use store::Store;
pub use trigger::{QueueTrigger, Told, WaitingRequest};

/// Which engine, and what it needs.
#[derive(Clone, Debug)]
pub enum Engine {
    /// SQLite in this process: one file in this folder, one process at a time.
    Embedded {
        /// The folder; made when it is not there.
        data: PathBuf,
    },
}

/// Opens the store.
///
/// # Errors
/// When it cannot be opened: the folder cannot be written, another process holds it, the file is
/// damaged or of a newer version.
pub fn open(engine: &Engine) -> Result<Arc<dyn Store>, StoreError> {
    match engine {
        Engine::Embedded { data } => Ok(Arc::new(SqliteStore::open(data)?)),
    }
}
