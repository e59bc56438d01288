//! Errors of a client.

use streamer_core::{CloseCode, ErrorCode, RequestError};
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
        code: CloseCode,
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
    /// Returns whether the call may succeed on a new connection.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Closed { code, .. } => code.is_retryable(),
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
            Self::Closed { code, .. } => code.error_code() == Some(ErrorCode::Unauthorized),
            Self::Rejected(error) => error.code == ErrorCode::Unauthorized,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(code: CloseCode) -> ClientError {
        ClientError::Closed { code, reason: "because".into() }
    }

    #[test]
    fn a_close_code_decides_whether_a_client_reconnects() {
        assert!(closed(CloseCode::GoingAway).is_transient());
        assert!(!closed(CloseCode::Forbidden).is_transient());
        assert!(closed(CloseCode::Unauthenticated).is_unauthenticated());
        assert!(!closed(CloseCode::Forbidden).is_unauthenticated());
    }

    #[test]
    fn the_number_of_the_close_code_is_displayed() {
        let text = "the server closed the connection: 4408 because";
        assert_eq!(closed(CloseCode::SlowConsumer).to_string(), text);
    }
}
