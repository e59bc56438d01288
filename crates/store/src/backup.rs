//! Backups of a store.

use async_trait::async_trait;
use bytes::Bytes;

use crate::StoreError;

/// Outcome of the creation of a backup.
pub enum BackupOutcome {
    /// The copy is complete.
    Created(Backup),
    /// A different backup of this store exists. Only one can exist at a time.
    InProgress,
    /// The disk has not enough space for the copy.
    OutOfSpace {
        /// Space that the copy requires, in bytes.
        required: u64,
        /// Available space, in bytes.
        available: u64,
    },
    /// The engine makes no backups.
    NotSupported,
}

/// Copy of a store, as of one moment. Dropping it frees its disk space.
pub struct Backup {
    /// Version of the schema of the copy.
    pub schema_version: i64,
    /// Size of the copy in bytes.
    pub size: u64,
    /// Reads the copy, from its beginning.
    pub content: Box<dyn BackupContent>,
}

/// Reads a copy of a store.
#[async_trait]
pub trait BackupContent: Send {
    /// Reads the next bytes of the copy: exactly `max_bytes`, or fewer at its end. Returns no bytes after the end.
    async fn next(&mut self, max_bytes: usize) -> Result<Bytes, StoreError>;
}
