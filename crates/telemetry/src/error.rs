//! Error from the initialization of logs or traces.

/// Error from the initialization of logs or traces.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter cannot be parsed.
    #[error("log filter {filter:?} is malformed: {reason}")]
    Filter {
        /// Configured filter.
        filter: String,
        /// Reason.
        reason: String,
    },
    /// Traces cannot be sent to the configured endpoint.
    #[error("cannot send traces to {endpoint:?}: {reason}")]
    Traces {
        /// Configured endpoint.
        endpoint: String,
        /// Reason.
        reason: String,
    },
    /// Logging is already initialized.
    #[error("logging is already initialized: {0}")]
    Twice(String),
}
