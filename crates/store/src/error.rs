//! What can go wrong in a store.

/// Why the store could not do something. What a caller may meet in the normal course (not found,
/// not the current attempt, …) is in the answers of the methods, not here.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot do it now: busy, full, out of reach or being closed.
    #[error("the store is unavailable while {doing}: {reason}")]
    Unavailable {
        /// What was being done.
        doing: &'static str,
        /// What the engine said.
        reason: String,
    },
    /// It has too much to do; the same call may succeed a little later.
    #[error("the store is overloaded while {doing}: {reason}")]
    Overloaded {
        /// What was being done.
        doing: &'static str,
        /// What the engine said.
        reason: String,
    },
    /// It does not take what it is given, however often.
    #[error("the store refuses, while {doing}: {reason}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// What the engine said.
        reason: String,
    },
    /// What is stored is damaged.
    #[error("the store is damaged, seen while {doing}: {reason}")]
    Corrupt {
        /// What was being done.
        doing: &'static str,
        /// What the engine said.
        reason: String,
    },
    /// Another process has it open.
    #[error("{path} is in use by another process")]
    Locked {
        /// The folder.
        path: String,
    },
    /// A newer Streamer wrote it.
    #[error("the store has schema version {found}, this Streamer knows up to {known}")]
    TooNew {
        /// What the file says.
        found: i64,
        /// What this program knows.
        known: i64,
    },
}

impl StoreError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Overloaded { .. } => true,
            Self::Refused { .. }
            | Self::Corrupt { .. }
            | Self::Locked { .. }
            | Self::TooNew { .. } => false,
        }
    }
}
