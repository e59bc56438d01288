//! Cancellation of requests.

use std::sync::Arc;

use streamer_auth::Caller;
use streamer_core::{Uid, Violations, limits, validate};
use streamer_rpc::{ensure_valid, not_found, store_status};
use streamer_store::{CancelOutcome, RequestRecord};
use tonic::Status;

use crate::request_service::{Access, RequestService};

impl RequestService {
    /// Requests the cancellation of a request.
    pub(crate) async fn cancel(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        reason: String,
    ) -> Result<RequestRecord, Status> {
        let mut violations = Violations::default();
        violations
            .check("reason", validate::at_most(reason.len(), limits::MAX_REASON_BYTES, "reason"));
        ensure_valid(&violations)?;
        let RequestRecord { uid, owner, .. } = self.find(caller, name, Access::Write).await?;
        // A stored cancellation must reach watchers and processors even if the client disconnects.
        let service = self.clone();
        let cancelled = async move { service.store_cancel(uid, reason).await };
        self.changes.run(&owner.tenant, 0, cancelled).await?.ok_or_else(|| not_found(name))
    }

    /// Stores a cancellation. Returns the updated request; `None` if the request does not exist.
    async fn store_cancel(
        &self,
        uid: Uid,
        reason: String,
    ) -> Result<Option<RequestRecord>, Status> {
        let cancelled = self.store.cancel(uid, reason, self.clock.now()).await;
        match cancelled.map_err(|error| store_status(&error))? {
            CancelOutcome::Cancelled(record, event) => {
                self.upstreams.announce(uid, *event, None).await;
                Ok(Some(*record))
            }
            CancelOutcome::Requested(record) => {
                let reason = record.cancel_reason.clone().unwrap_or_default();
                self.upstreams.signal_cancel(uid, &reason).await;
                Ok(Some(*record))
            }
            CancelOutcome::Ended(record) => Ok(Some(*record)),
            CancelOutcome::NotFound => Ok(None),
        }
    }
}
