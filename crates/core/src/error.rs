//! Errors of requests, with the codes that the protocols use.

use std::{fmt, time::Duration};

/// Error code. The same names are used in gRPC (`ErrorInfo.reason`), WebSocket messages and the
/// event log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The input violates a rule.
    ValidationError,
    /// The action does not exist.
    InvalidAction,
    /// The token is missing or invalid.
    Unauthorized,
    /// The token is valid but lacks the permission.
    Forbidden,
    /// The resource does not exist, or the caller may not see it.
    NotFound,
    /// The ID is already used for a different request, or the state does not allow the operation.
    Conflict,
    /// A rate or quota limit is exceeded.
    RateLimited,
    /// A time limit is exceeded.
    Timeout,
    /// The request was cancelled before it completed.
    Cancelled,
    /// The handler failed.
    ProcessingFailed,
    /// A dependency is unavailable.
    Unavailable,
    /// A defect or failure of the server.
    InternalError,
}

impl ErrorCode {
    /// All codes.
    pub const ALL: [Self; 12] = [
        Self::ValidationError,
        Self::InvalidAction,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::Conflict,
        Self::RateLimited,
        Self::Timeout,
        Self::Cancelled,
        Self::ProcessingFailed,
        Self::Unavailable,
        Self::InternalError,
    ];

    /// Returns the name that the protocols use, such as `VALIDATION_ERROR`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ValidationError => "VALIDATION_ERROR",
            Self::InvalidAction => "INVALID_ACTION",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Forbidden => "FORBIDDEN",
            Self::NotFound => "NOT_FOUND",
            Self::Conflict => "CONFLICT",
            Self::RateLimited => "RATE_LIMITED",
            Self::Timeout => "TIMEOUT",
            Self::Cancelled => "CANCELLED",
            Self::ProcessingFailed => "PROCESSING_FAILED",
            Self::Unavailable => "UNAVAILABLE",
            Self::InternalError => "INTERNAL_ERROR",
        }
    }

    /// Returns the code with the given name, if it exists.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == name)
    }

    /// Returns whether the same request may succeed if it is sent again unchanged.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::RateLimited | Self::Timeout | Self::Unavailable | Self::InternalError)
    }
}

/// Set of error codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorCodes(u16);

impl ErrorCodes {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// Returns this set with `code` added.
    #[must_use]
    pub const fn with(self, code: ErrorCode) -> Self {
        Self(self.0 | 1 << code as u16)
    }

    /// Returns whether the set contains `code`.
    #[must_use]
    pub const fn contains(self, code: ErrorCode) -> bool {
        self.0 & (1 << code as u16) != 0
    }

    /// Returns the codes in the set.
    pub fn iter(self) -> impl Iterator<Item = ErrorCode> {
        ErrorCode::ALL.into_iter().filter(move |code| self.contains(*code))
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// Error that is returned to the caller and stored in the event log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct RequestError {
    /// Error code.
    pub code: ErrorCode,
    /// Human-readable message.
    pub message: String,
    /// Whether the same request may succeed if it is sent again unchanged.
    pub retryable: bool,
    /// Additional details: a JSON object, as text.
    pub details: Option<String>,
}

impl RequestError {
    /// Returns an error that is retryable if `code` is retryable.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retryable: code.is_retryable(), details: None }
    }

    /// Returns the error for a caller that lacks `permission`.
    #[must_use]
    pub fn forbidden(permission: &str) -> Self {
        Self::new(ErrorCode::Forbidden, format!("permission {permission} is required"))
    }

    /// Returns the error for an exceeded limit. `limit` is the name of the option that sets the limit; `retry_after` is
    /// the time after which the caller should retry, if it is known.
    #[must_use]
    pub fn limited(limit: &str, message: &str, retry_after: Option<Duration>) -> Self {
        let wait = retry_after.map_or_else(String::new, |wait| {
            format!(",\"retry_after_ms\":{}", wait.as_millis().max(1))
        });
        Self {
            details: Some(format!("{{\"limit\":\"{limit}\"{wait}}}")),
            ..Self::new(ErrorCode::RateLimited, format!("{message} ({limit})"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_contains_the_codes_that_were_added() {
        let set = ErrorCodes::NONE.with(ErrorCode::Timeout).with(ErrorCode::InternalError);
        assert_eq!(set.iter().collect::<Vec<_>>(), [ErrorCode::Timeout, ErrorCode::InternalError]);
    }

    #[test]
    fn names_round_trip() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_name(code.as_str()), Some(code));
        }
        assert_eq!(ErrorCode::from_name("OOPS"), None);
    }
}
