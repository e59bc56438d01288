//! Errors of requests, with the codes that the protocols use.

use std::time::Duration;

use strum::{Display, IntoStaticStr, VariantArray};

/// Error code. The same names are used in gRPC (`ErrorInfo.reason`), WebSocket messages and the
/// event log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Display, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
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
    pub const ALL: &'static [Self] = Self::VARIANTS;

    /// Returns the name that the protocols use, such as `VALIDATION_ERROR`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Returns the code with the given name, if it exists.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == name)
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
        ErrorCode::ALL.iter().copied().filter(move |code| self.contains(*code))
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
        for &code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_name(code.as_str()), Some(code));
        }
        assert_eq!(ErrorCode::from_name("OOPS"), None);
    }

    #[test]
    fn names_are_those_of_the_protocols() {
        let names: Vec<_> = ErrorCode::ALL.iter().map(ToString::to_string).collect();
        assert_eq!(
            names.join(" "),
            "VALIDATION_ERROR INVALID_ACTION UNAUTHORIZED FORBIDDEN NOT_FOUND CONFLICT \
             RATE_LIMITED TIMEOUT CANCELLED PROCESSING_FAILED UNAVAILABLE INTERNAL_ERROR"
        );
    }
}
