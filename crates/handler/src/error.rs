//! How a handler says that it failed.

use std::{error::Error, fmt};

use streamer_core::{ErrorCode, RequestError, Violations};

/// Why an attempt failed, and whether another may do better.
///
/// Any error turns into a retryable one by `?`; [`HandlerError::fatal`] and
/// [`HandlerError::invalid`] say that repeating is of no use. (It is no `Error` itself, so that
/// every `Error` can turn into it.)
#[derive(Clone, Debug)]
pub struct HandlerError {
    error: RequestError,
    released: bool,
}

impl HandlerError {
    /// Another attempt may succeed.
    pub fn retryable(message: impl Into<String>) -> Self {
        let error = RequestError::new(ErrorCode::ProcessingFailed, message);
        Self::from_request_error(RequestError { retryable: true, ..error })
    }

    /// Another attempt would fail in the same way.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self::from_request_error(RequestError::new(ErrorCode::ProcessingFailed, message))
    }

    /// The payload breaks a rule; no other attempt follows.
    pub fn invalid(field: impl Into<String>, rule: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.push(field, rule);
        let message = violations.to_string();
        Self::from_request_error(RequestError::new(ErrorCode::ValidationError, message))
    }

    /// The handler gave up because cancellation was asked for.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::from_request_error(RequestError::new(ErrorCode::Cancelled, "cancelled"))
    }

    /// The handler gives the attempt back unfinished, as when its process stops: another attempt
    /// follows at once, even if this was the last.
    pub fn released(reason: impl Into<String>) -> Self {
        let error = RequestError::new(ErrorCode::Unavailable, reason);
        Self { error, released: true }
    }

    /// Whether the attempt was given back, see [`HandlerError::released`].
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.released
    }

    /// Adds a JSON value that tells more.
    #[must_use]
    pub fn with_details(mut self, details: &serde_json::Value) -> Self {
        self.error.details = Some(details.to_string());
        self
    }

    /// With everything said: code, message and whether to retry.
    #[must_use]
    pub fn from_request_error(error: RequestError) -> Self {
        Self { error, released: false }
    }

    /// As it is told to the caller.
    #[must_use]
    pub fn into_request_error(self) -> RequestError {
        self.error
    }

    /// The kind of failure.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.error.code
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, formatter)
    }
}

impl<E: Error> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::retryable(error.to_string())
    }
}
