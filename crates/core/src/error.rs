//! Why a request failed, in the words of the protocols.

use std::{fmt, time::Duration};

/// The kind of failure. The same words in gRPC (`ErrorInfo.reason`), WebSocket and log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The input breaks a rule.
    ValidationError,
    /// No such action.
    InvalidAction,
    /// No valid token.
    Unauthorized,
    /// A valid token without the permission.
    Forbidden,
    /// No such thing, or not the caller's.
    NotFound,
    /// The key was used for something else, or the state forbids it.
    Conflict,
    /// Too much at once.
    RateLimited,
    /// A time limit passed.
    Timeout,
    /// Cancelled before it ended by itself.
    Cancelled,
    /// The handler failed.
    ProcessingFailed,
    /// Something needed is down.
    Unavailable,
    /// A fault of the server.
    InternalError,
}

impl ErrorCode {
    /// Every code.
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

    /// As the protocols write it: `VALIDATION_ERROR`.
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

    /// The code that is written like this.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == name)
    }

    /// Whether the same request may succeed when sent again unchanged.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::RateLimited | Self::Timeout | Self::Unavailable | Self::InternalError)
    }
}

/// Some of the kinds of failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorCodes(u16);

impl ErrorCodes {
    /// No kind.
    pub const NONE: Self = Self(0);

    /// These and one more.
    #[must_use]
    pub const fn with(self, code: ErrorCode) -> Self {
        Self(self.0 | 1 << code as u16)
    }

    /// Whether it is one of them.
    #[must_use]
    pub const fn contains(self, code: ErrorCode) -> bool {
        self.0 & (1 << code as u16) != 0
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = ErrorCode> {
        ErrorCode::ALL.into_iter().filter(move |code| self.contains(*code))
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// A failure as it is told to the caller and kept in the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct RequestError {
    /// The kind.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
    /// Whether the same request may succeed when sent again unchanged.
    pub retryable: bool,
    /// A JSON object with more, as text.
    pub details: Option<String>,
}

impl RequestError {
    /// A failure that is retryable when its kind is.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retryable: code.is_retryable(), details: None }
    }

    /// The caller does not have this permission.
    #[must_use]
    pub fn forbidden(permission: &str) -> Self {
        Self::new(ErrorCode::Forbidden, format!("permission {permission} is needed"))
    }

    /// Too much of what the option `limit` bounds; come again after `retry_after`, if that is
    /// known.
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
    fn a_set_holds_what_was_put_in() {
        let some = ErrorCodes::NONE.with(ErrorCode::Timeout).with(ErrorCode::InternalError);
        assert_eq!(some.iter().collect::<Vec<_>>(), [ErrorCode::Timeout, ErrorCode::InternalError]);
    }

    #[test]
    fn names_come_back() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_name(code.as_str()), Some(code));
        }
        assert_eq!(ErrorCode::from_name("OOPS"), None);
    }
}
