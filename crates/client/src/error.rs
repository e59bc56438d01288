//! What can go wrong for a client.

use streamer_core::{ErrorCode, RequestError};

use streamer_rpc::TokenError;

use crate::OutputMismatch;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server cannot be reached, or the connection was lost.
    #[error("cannot reach {server}: {reason}")]
    Unreachable {
        /// The server's URL.
        server: String,
        /// What the network said.
        reason: String,
    },
    /// The server closed the WebSocket.
    #[error("the server closed the connection: {code} {reason}")]
    Closed {
        /// Close code.
        code: u16,
        /// As the server said.
        reason: String,
    },
    /// The server refused.
    #[error("{0}")]
    Refused(RequestError),
    /// The server's URL cannot be used.
    #[error("server URL {url:?} {rule}")]
    Url {
        /// As given.
        url: String,
        /// What it must be.
        rule: &'static str,
    },
    /// The token cannot be sent.
    #[error("the token is malformed: it must be the visible ASCII characters of a JWT")]
    Token,
    /// There is no token.
    #[error(transparent)]
    NoToken(#[from] TokenError),
    /// What was read is not what was written.
    #[error(transparent)]
    Output(#[from] OutputMismatch),
    /// The server sent what this client does not understand.
    #[error("the server sent something unexpected: {0}")]
    Unexpected(String),
}

impl ClientError {
    /// Whether a new connection may help. DESIGN §8: after 4400, 4401 and 4403 it will not.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Closed { code, .. } => {
                !matches!(code, 1002 | 1003 | 1007 | 1008 | 1009 | 4400 | 4401 | 4403)
            }
            Self::Refused(error) => error.retryable,
            Self::Url { .. }
            | Self::Token
            | Self::NoToken(_)
            | Self::Output(_)
            | Self::Unexpected(_) => false,
        }
    }

    /// Whether the token is not accepted: a fresh one may help.
    #[must_use]
    pub fn is_unauthenticated(&self) -> bool {
        match self {
            Self::Closed { code, .. } => *code == 4401,
            Self::Refused(error) => error.code == ErrorCode::Unauthorized,
            _ => false,
        }
    }
}
