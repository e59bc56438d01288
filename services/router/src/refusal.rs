//! Statuses with which the router refuses.

use streamer_auth::Caller;
use streamer_core::{ErrorCode, RequestError, Violations};
use streamer_rpc::{status, validation_status};
use tonic::Status;

use crate::catalog::Known;

/// Checks the permission that the action asks of its callers.
pub(crate) fn permitted(caller: &Caller, known: &Known) -> Result<(), Status> {
    let permission = &known.action.permission;
    if permission.is_empty() || caller.principal.may(permission) {
        Ok(())
    } else {
        Err(forbidden(permission))
    }
}

pub(crate) fn no_such_action(action: &str) -> Status {
    let message = format!("there is no action {action:?}");
    status(&RequestError::new(ErrorCode::InvalidAction, message))
}

pub(crate) fn forbidden(permission: &str) -> Status {
    status(&RequestError::forbidden(permission))
}

/// The state of something forbids it.
pub(crate) fn failed_precondition(message: String) -> Status {
    // CONFLICT in the words of the protocols, FAILED_PRECONDITION in those of gRPC.
    let conflict = status(&RequestError::new(ErrorCode::Conflict, message));
    Status::with_details_and_metadata(
        tonic::Code::FailedPrecondition,
        conflict.message(),
        bytes::Bytes::copy_from_slice(conflict.details()),
        conflict.metadata().clone(),
    )
}

/// Refuses an input that breaks rules.
pub(crate) fn refuse(violations: &Violations) -> Result<(), Status> {
    if violations.is_empty() { Ok(()) } else { Err(validation_status(violations)) }
}
