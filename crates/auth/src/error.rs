//! Reason why a caller is not authenticated.

use std::borrow::Cow;

use streamer_core::{ErrorCode, Timestamp};

/// Reason why a caller is not authenticated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No token was sent.
    #[error("a token is required: send `authorization: Bearer <token>`")]
    Missing,
    /// The token cannot be parsed.
    #[error("the token is malformed: {0}")]
    Malformed(String),
    /// No configured key has the token's algorithm.
    #[error("the token's algorithm is not accepted")]
    Algorithm,
    /// No configured key signed the token.
    #[error("the token's signature does not match any accepted key")]
    Signature,
    /// The token has expired.
    #[error("the token expired at {0}")]
    Expired(Timestamp),
    /// The token is not valid yet.
    #[error("the token is not valid before {0}")]
    NotYetValid(Timestamp),
    /// A claim is missing or violates a rule.
    #[error("claim {claim} {rule}")]
    Claim {
        /// Name of the claim.
        claim: Cow<'static, str>,
        /// Violated rule.
        rule: String,
    },
    /// The keys, or the key that signed the token, are temporarily unavailable.
    #[error("the token cannot be verified now: {0}")]
    KeysUnavailable(String),
}

impl AuthError {
    /// Returns the error code that the protocols use.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::KeysUnavailable(_) => ErrorCode::Unavailable,
            Self::Missing
            | Self::Malformed(_)
            | Self::Algorithm
            | Self::Signature
            | Self::Expired(_)
            | Self::NotYetValid(_)
            | Self::Claim { .. } => ErrorCode::Unauthorized,
        }
    }
}
