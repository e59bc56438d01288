//! Error of a handler.

use std::{error::Error, fmt};

use streamer_core::{ErrorCode, RequestError, Violations};

/// Reason why an attempt failed, and whether a retry may succeed.
///
/// The `?` operator converts any error to a retryable error; [`HandlerError::fatal`] and [`HandlerError::invalid`]
/// return errors that are not retryable. This type does not implement `Error`, so that every `Error` can be converted
/// to it.
#[derive(Clone, Debug)]
pub struct HandlerError {
    error: RequestError,
    released: bool,
}

impl HandlerError {
    /// Returns an error after which a retry may succeed.
    pub fn retryable(message: impl Into<String>) -> Self {
        let error = RequestError::new(ErrorCode::ProcessingFailed, message);
        Self::from_request_error(RequestError { retryable: true, ..error })
    }

    /// Returns an error that is not retried, because a retry would fail in the same way.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self::from_request_error(RequestError::new(ErrorCode::ProcessingFailed, message))
    }

    /// Returns an error for a payload in which `field` violates `rule`; it is not retried.
    pub fn invalid(field: impl Into<String>, rule: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.push(field, rule);
        let message = violations.to_string();
        Self::from_request_error(RequestError::new(ErrorCode::ValidationError, message))
    }

    /// Returns the error of a handler that stopped because cancellation was requested.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::from_request_error(RequestError::new(ErrorCode::Cancelled, "cancelled"))
    }

    /// Returns the error of a handler that releases an unfinished attempt, for example because its process is shutting
    /// down. The next attempt starts immediately, even if this attempt was the last.
    pub fn released(reason: impl Into<String>) -> Self {
        let error = RequestError::new(ErrorCode::Unavailable, reason);
        Self { error, released: true }
    }

    /// Returns whether the attempt was released; see [`HandlerError::released`].
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.released
    }

    /// Adds details as a JSON value.
    #[must_use]
    pub fn with_details(mut self, details: &serde_json::Value) -> Self {
        self.error.details = Some(details.to_string());
        self
    }

    /// Creates an error with the code, message and retryability of `error`.
    #[must_use]
    pub fn from_request_error(error: RequestError) -> Self {
        Self { error, released: false }
    }

    /// Returns the error in the form that the caller of the request receives.
    #[must_use]
    pub fn into_request_error(self) -> RequestError {
        self.error
    }

    /// Returns the error code.
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
