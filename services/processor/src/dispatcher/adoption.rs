//! Going on with attempts that workers bring along: from another processor, or from before this one
//! was started.

use std::sync::Arc;

use bytes::Bytes;
use streamer_core::Uid;
use streamer_store::{Adopt, Lease, StoreError, StoredPayload};

use super::{Dispatcher, Running, Started};
use crate::{
    attempt::{AttemptHandle, Launch},
    remote::RemoteHandler,
    remote_task::RemoteTask,
    takeover,
    worker::Worker,
};

impl Dispatcher {
    /// Goes on with an attempt that this worker has; `None` when it is not the worker's any more.
    /// Says how many of its reports are durable.
    pub(crate) async fn adopt(
        self: &Arc<Self>,
        worker: &Arc<Worker>,
        uid: Uid,
        attempt: u32,
    ) -> Result<Option<Arc<RemoteTask>>, StoreError> {
        if self.is_stopping() {
            return Ok(None);
        }
        let Some(record) = self.store.get_request(uid).await? else { return Ok(None) };
        if !worker.may_run(&record.action, &record.owner.tenant) {
            return Ok(None);
        }
        if self.running.lock().contains_key(&uid) {
            return Ok(None);
        }
        let now = self.now();
        let adopt = Adopt {
            lease: Lease { uid, attempt },
            holder: self.name.clone(),
            worker_identity: worker.assigned.identity.clone(),
            now,
            lease_until: now.plus(self.options.lease),
        };
        let Some(record) = self.store.adopt(adopt).await? else { return Ok(None) };
        let handle = Arc::new(AttemptHandle::default());
        // Only now, when it is known to be this worker's: an entry keeps all others from adopting it.
        let tenant = record.owner.tenant.clone();
        if !self.enter(uid, Running { attempt, tenant, handle: handle.clone(), remote: true }) {
            return Ok(None);
        }
        // Gives the entry back if it comes to nothing.
        let entered = Started { dispatcher: self.clone(), uid, slot: None };
        if self.is_stopping() {
            return Ok(None);
        }
        let declared = self.actions.find(&record.action, &record.owner.tenant);
        let Some(spec) = declared.map(|declared| declared.spec) else { return Ok(None) };
        let output = takeover::output_of(&*self.store, &record).await?;
        let reports = Arc::new(self.report_queue(&record));
        let durable = record.last_seq - record.attempt_seq;
        let task = RemoteTask::new(&record, durable, reports.clone(), &self.output_budget);
        let seat = self.actions.workers.seat_of_running(worker.clone(), &record.owner.tenant);
        if let Some(reason) = &record.cancel_reason {
            handle.cancel(reason);
        }
        let grace = self.options.cancel_grace;
        let remote = Arc::new(RemoteHandler::new(
            worker.clone(),
            spec.clone(),
            task,
            None,
            Some(handle.clone()),
            grace,
        ));
        let adopted = remote.task.clone();
        let launch = Launch {
            spec,
            handler: remote.clone(),
            reports,
            // The worker has it.
            payload: StoredPayload { content_type: String::new(), data: Bytes::new() },
            checkpoint: None,
            started: None,
            output,
            record,
            is_remote: true,
        };
        self.tasks.spawn(async move {
            // Held until it ends.
            let _seat = seat;
            entered.dispatcher.run_remote(launch, &remote, handle, None).await;
        });
        Ok(Some(adopted))
    }
}
