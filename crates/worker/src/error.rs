//! Error that stops a worker.

use streamer_core::RequestError;
use streamer_rpc::TokenError;

/// Error that stops a worker.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The server URL is invalid.
    #[error("invalid server URL {0:?}: must have the form http://127.0.0.1:8080")]
    Url(String),
    /// The token is missing or invalid.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The worker has no handlers.
    #[error("a worker needs at least one handler")]
    NoHandlers,
    /// The token has expired and cannot be refreshed.
    #[error(
        "the token has expired and cannot be refreshed; use a token file that is \
         kept up to date (--token-file), or a TokenSource"
    )]
    TokenExpired,
    /// The server rejected this worker, and a retry cannot succeed.
    #[error("the server rejected this worker: {0}")]
    Rejected(RequestError),
    /// The signal handlers cannot be installed.
    #[error("failed to install the signal handlers: {0}")]
    Signal(std::io::Error),
}
