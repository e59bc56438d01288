//! How a handler says that it failed.

use std::{error::Error, fmt};

use streamer_core::{ErrorCode, RequestError, Violations};

/// Why an attempt failed, and whether another may do better.
///
/// Any error turns into a retryable one by `?`; [`HandlerError::fatal`] and
/// [`HandlerError::invalid`] say that repeating is of no use. (It is no `Error` itself, so that
/// every `Error` can turn into it.)
#[derive(Clone, Debug)]
pub struct HandlerError(RequestError);

impl HandlerError {
    /// Another attempt may succeed.
    pub fn retryable(message: impl Into<String>) -> Self {
        let error = RequestError::new(ErrorCode::ProcessingFailed, message);
        Self(RequestError { retryable: true, ..error })
    }

    /// Another attempt would fail in the same way.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self(RequestError::new(ErrorCode::ProcessingFailed, message))
    }

    /// The payload breaks a rule; no other attempt follows.
    pub fn invalid(field: impl Into<String>, rule: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.push(field, rule);
        Self(RequestError::new(ErrorCode::ValidationError, violations.to_string()))
    }

    /// The handler gave up because cancellation was asked for.
    #[must_use]
    pub fn cancelled() -> Self {
        Self(RequestError::new(ErrorCode::Cancelled, "cancelled"))
    }

    /// Adds a JSON value that tells more.
    #[must_use]
    pub fn with_details(mut self, details: &serde_json::Value) -> Self {
        self.0.details = Some(details.to_string());
        self
    }

    /// With everything said: code, message and whether to retry.
    #[must_use]
    pub fn from_request_error(error: RequestError) -> Self {
        Self(error)
    }

    /// As it is told to the caller.
    #[must_use]
    pub fn into_request_error(self) -> RequestError {
        self.0
    }

    /// The kind of failure.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.0.code
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, formatter)
    }
}

impl<E: Error> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::retryable(error.to_string())
    }
}
