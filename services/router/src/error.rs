//! Error statuses of the router.

use streamer_core::{ErrorCode, RequestError};
use streamer_rpc::{error_status, status};
use tonic::Status;

pub(crate) fn action_not_found(action: &str) -> Status {
    error_status(ErrorCode::InvalidAction, format!("action {action:?} not found"))
}

pub(crate) fn forbidden(permission: &str) -> Status {
    status(&RequestError::forbidden(permission))
}

/// Returns a `FAILED_PRECONDITION` status: the state of the request or action does not allow the call.
pub(crate) fn failed_precondition(message: String) -> Status {
    // The application error code is CONFLICT; the gRPC code of this error is FAILED_PRECONDITION.
    let conflict = error_status(ErrorCode::Conflict, message);
    Status::with_details_and_metadata(
        tonic::Code::FailedPrecondition,
        conflict.message(),
        bytes::Bytes::copy_from_slice(conflict.details()),
        conflict.metadata().clone(),
    )
}
