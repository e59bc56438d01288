//! Caller of a request.

use std::sync::Arc;

use http::HeaderValue;
use parking_lot::Mutex;
use streamer_core::RequestError;
use streamer_rpc::status;
use tonic::Status;

use crate::{Principal, Subject};

/// Caller of a request; stored in the extensions of every request that [`AuthService`](crate::AuthService) accepts.
#[derive(Clone)]
pub struct Caller {
    /// Identity and permissions from the token.
    pub principal: Arc<Principal>,
    /// Header with the token, for the next hop.
    pub authorization: HeaderValue,
    /// Object of the call, if the call is recorded.
    pub(crate) subject: Option<Arc<Mutex<Option<Subject>>>>,
}

impl Caller {
    /// Returns the caller with the given identity and `authorization` header.
    #[must_use]
    pub fn new(principal: Arc<Principal>, authorization: HeaderValue) -> Self {
        Self { principal, authorization, subject: None }
    }

    /// Returns the caller that [`AuthService`](crate::AuthService) has added to the request.
    ///
    /// # Errors
    /// Returns `INTERNAL` if the service runs without its authentication layer.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("the service runs without its authentication layer"))
    }

    /// Checks that the caller has a permission.
    ///
    /// # Errors
    /// Returns `PERMISSION_DENIED` if it does not.
    pub fn require(&self, permission: &str) -> Result<(), Status> {
        if self.principal.has_permission(permission) {
            return Ok(());
        }
        Err(status(&RequestError::forbidden(permission)))
    }

    /// Records the object of the call, for the audit log.
    pub fn set_audit_subject(&self, subject: impl FnOnce() -> Subject) {
        if let Some(recorded) = &self.subject {
            *recorded.lock() = Some(subject());
        }
    }
}
