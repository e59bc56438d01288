//! Checks of a submission before it is stored or run.

use streamer_auth::{Caller, Principal};
use streamer_core::{Timestamp, Uid, Violations};
use streamer_proto::router::v1::SubmitRequest;
use streamer_rpc::ensure_valid;
use tonic::Status;

use crate::{
    admission,
    checked_submission::{Checked, PreassignedUid},
    permission::check_permission,
    request_service::RequestService,
};

impl RequestService {
    /// Checks whether a submission is admitted.
    pub(crate) async fn check(
        &self,
        caller: &Caller,
        request: SubmitRequest,
        uid: Option<PreassignedUid>,
        now: Timestamp,
    ) -> Result<Checked, Status> {
        let mut violations = Violations::default();
        let new_uid = uid.map_or_else(|| Uid::new(now), |preassigned| preassigned.uid);
        let mut submission = admission::parse(request, new_uid, &self.limits, now, &mut violations);
        submission.after = uid.and_then(|preassigned| preassigned.after).map(Box::new);
        // A stored request is not validated again, because the clock and the catalog may have changed.
        if let Some(preassigned) = uid.filter(|preassigned| preassigned.is_retry)
            && let Some(record) = self.find_stored(caller, preassigned.uid).await?
        {
            return Ok(Checked::Stored(Box::new(record), submission.wait_ms));
        }
        // A retry is not counted, because the first attempt was counted.
        if !uid.is_some_and(|preassigned| preassigned.is_retry) {
            self.submissions.admit(&caller.principal, now)?;
        }
        ensure_valid(&violations)?;
        let Principal { tenant, .. } = &*caller.principal;
        let entry = self.catalog.find_or_query(&submission.action, tenant, &self.upstreams).await?;
        check_permission(caller, &entry)?;
        let payload = &submission.payload.data;
        self.catalog.check_payload(&entry, tenant, payload, &mut violations).await?;
        ensure_valid(&violations)?;
        Ok(Checked::New(submission, entry))
    }
}
