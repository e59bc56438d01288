//! Statuses of rejected calls.

use streamer_core::{ErrorCode, RequestError, Violations};
use streamer_rpc::{status, validation_status};
use tonic::Status;

/// Returns the status of a message with an invalid field.
pub(crate) fn violation(field: &str, rule: &str) -> Status {
    let mut violations = Violations::default();
    violations.push(field, rule);
    validation_status(&violations)
}

/// Returns the status of an error.
pub(crate) fn error_status(code: ErrorCode, message: String) -> Status {
    status(&RequestError::new(code, message))
}
