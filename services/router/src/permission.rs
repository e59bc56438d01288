//! Permission to run an action.

use streamer_auth::Caller;
use tonic::Status;

use crate::catalog::CatalogEntry;

/// Checks that the caller has the permission that the action requires.
pub(crate) fn check_permission(caller: &Caller, entry: &CatalogEntry) -> Result<(), Status> {
    let permission = &entry.action.permission;
    if permission.is_empty() { Ok(()) } else { caller.require(permission) }
}
