//! A submission before and after its checks.

use std::sync::Arc;

use streamer_core::Uid;
use streamer_store::RequestRecord;

use crate::{admission::Submission, catalog::CatalogEntry};

/// A `uid` that the calling service has assigned to a submission.
#[derive(Clone, Copy)]
pub(crate) struct PreassignedUid {
    pub(crate) uid: Uid,
    /// The submission that this one must follow.
    pub(crate) after: Option<Uid>,
    /// Whether the call is a retry, so that an earlier call may have stored the request.
    pub(crate) is_retry: bool,
}

/// A submission that passed the checks.
pub(crate) enum Checked {
    /// A new request.
    New(Submission, Arc<CatalogEntry>),
    /// A repeated call whose request is already stored, and the wait time of the caller.
    Stored(Box<RequestRecord>, i64),
}
