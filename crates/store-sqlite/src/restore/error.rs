//! Error of a restore.

use std::{io, path::Path};

use streamer_store::StoreError;

/// Error of a restore.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The data folder contains a store.
    #[error("{0} already contains a store; specify a new folder")]
    HasStore(String),
    /// A file cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// Path of the file or folder.
        path: String,
        /// Error of the file system.
        error: io::Error,
    },
    /// The file is not a complete backup, or it is corrupt.
    #[error("{path} is not a valid backup: {reason}")]
    Invalid {
        /// Path of the backup.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A newer version of Streamer made the backup.
    #[error(
        "the backup has schema version {found}; this version of Streamer supports up to {known}"
    )]
    UnsupportedVersion {
        /// Schema version of the backup.
        found: i64,
        /// Highest schema version that this program supports.
        known: i64,
    },
    /// The new store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub(super) fn file_error(path: &Path, error: io::Error) -> RestoreError {
    RestoreError::File { path: path.display().to_string(), error }
}
