//! Errors of a store.

/// Error of a store. Expected results (not found, not the current attempt, …) are in the outcomes
/// of the methods, not here.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Temporarily unavailable: busy, disk full, unreachable or closing.
    #[error("the store is unavailable while {doing}: {reason}")]
    Unavailable {
        /// Operation that failed.
        doing: &'static str,
        /// Reason reported by the engine.
        reason: String,
    },
    /// Overloaded; a retry may succeed a little later.
    #[error("the store is overloaded while {doing}: {reason}")]
    Overloaded {
        /// Operation that failed.
        doing: &'static str,
        /// Reason reported by the engine.
        reason: String,
    },
    /// Input that the engine rejects; a retry does not help.
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
        /// Data folder.
        path: String,
    },
    /// A newer version of Streamer wrote the store.
    #[error(
        "the store has schema version {found}; this version of Streamer supports up to {known}"
    )]
    UnsupportedVersion {
        /// Schema version of the file.
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
