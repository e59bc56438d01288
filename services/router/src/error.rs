//! Error statuses of the router.

use streamer_core::{ErrorCode, RequestError, Violations};
use streamer_rpc::{status, validation_status};
use tonic::Status;

pub(crate) fn action_not_found(action: &str) -> Status {
    let message = format!("action {action:?} not found");
    status(&RequestError::new(ErrorCode::InvalidAction, message))
}

pub(crate) fn forbidden(permission: &str) -> Status {
    status(&RequestError::forbidden(permission))
}

/// Returns a `FAILED_PRECONDITION` status: the state of the request or action does not allow the call.
pub(crate) fn failed_precondition(message: String) -> Status {
    // The application error code is CONFLICT; the gRPC code of this error is FAILED_PRECONDITION.
    let conflict = status(&RequestError::new(ErrorCode::Conflict, message));
    Status::with_details_and_metadata(
        tonic::Code::FailedPrecondition,
        conflict.message(),
        bytes::Bytes::copy_from_slice(conflict.details()),
        conflict.metadata().clone(),
    )
}

/// Returns a validation error if `violations` is not empty.
pub(crate) fn ensure_valid(violations: &Violations) -> Result<(), Status> {
    if violations.is_empty() { Ok(()) } else { Err(validation_status(violations)) }
}
