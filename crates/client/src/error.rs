//! Errors of a client.

use streamer_core::{ErrorCode, RequestError};

use streamer_rpc::TokenError;

use crate::OutputMismatch;

/// Error of a call.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server cannot be reached, or the connection was lost.
    #[error("cannot reach {server}: {reason}")]
    Unreachable {
        /// The server's URL.
        server: String,
        /// The network error.
        reason: String,
    },
    /// The server closed the WebSocket.
    #[error("the server closed the connection: {code} {reason}")]
    Closed {
        /// Close code.
        code: u16,
        /// Close reason.
        reason: String,
    },
    /// The server rejected the call.
    #[error("{0}")]
    Rejected(RequestError),
    /// The server's URL is invalid.
    #[error("server URL {url:?} {rule}")]
    InvalidUrl {
        /// The invalid URL.
        url: String,
        /// The rule that it violates.
        rule: &'static str,
    },
    /// The token contains characters that a header cannot carry.
    #[error("malformed token: must be a JWT in visible ASCII characters")]
    MalformedToken,
    /// The token source failed.
    #[error(transparent)]
    TokenSource(#[from] TokenError),
    /// The output that was read differs from the output that was written.
    #[error(transparent)]
    OutputMismatch(#[from] OutputMismatch),
    /// The server violated the protocol.
    #[error("unexpected response from the server: {0}")]
    Protocol(String),
}

impl ClientError {
    /// Returns whether the call may succeed on a new connection. It cannot succeed after the close codes
    /// 4400, 4401 and 4403.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Closed { code, .. } => {
                !matches!(code, 1002 | 1003 | 1007 | 1008 | 1009 | 4400 | 4401 | 4403)
            }
            Self::Rejected(error) => error.retryable,
            Self::InvalidUrl { .. }
            | Self::MalformedToken
            | Self::TokenSource(_)
            | Self::OutputMismatch(_)
            | Self::Protocol(_) => false,
        }
    }

    /// Returns whether the server rejected the token. The call may succeed with a fresh token.
    #[must_use]
    pub fn is_unauthenticated(&self) -> bool {
        match self {
            Self::Closed { code, .. } => *code == 4401,
            Self::Rejected(error) => error.code == ErrorCode::Unauthorized,
            _ => false,
        }
    }
}
