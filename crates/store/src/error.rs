//! Errors of store operations.

/// Error of a store operation. Expected outcomes, such as a missing request or an outdated attempt, are not errors:
/// they are part of the return types of the methods.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The store is temporarily unavailable: it is busy, out of disk space, unreachable or closing.
    #[error("the store is unavailable while {doing}: {reason}")]
    Unavailable {
        /// Operation that failed.
        doing: &'static str,
        /// Reason reported by the engine.
        reason: String,
    },
    /// The store is overloaded; a retry after a short delay may succeed.
    #[error("the store is overloaded while {doing}: {reason}")]
    Overloaded {
        /// Operation that failed.
        doing: &'static str,
        /// Reason reported by the engine.
        reason: String,
    },
    /// The engine rejects the input; a retry fails in the same way.
    #[error("the store rejected the input while {doing}: {reason}")]
    Rejected {
        /// Operation that failed.
        doing: &'static str,
        /// Reason reported by the engine.
        reason: String,
    },
    /// Stored data is corrupt.
    #[error("the store is corrupt, detected while {doing}: {reason}")]
    Corrupt {
        /// Operation that failed.
        doing: &'static str,
        /// Reason reported by the engine.
        reason: String,
    },
    /// Another process has the store open.
    #[error("{path} is in use by another process")]
    Locked {
        /// Path of the data folder.
        path: String,
    },
    /// A newer version of Streamer wrote the store.
    #[error(
        "the store has schema version {found}; this version of Streamer supports up to {known}"
    )]
    UnsupportedVersion {
        /// Schema version of the stored data.
        found: i64,
        /// Highest schema version that this program supports.
        known: i64,
    },
}

impl StoreError {
    /// Returns whether a retry may succeed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Overloaded { .. } => true,
            Self::Rejected { .. }
            | Self::Corrupt { .. }
            | Self::Locked { .. }
            | Self::UnsupportedVersion { .. } => false,
        }
    }
}
