//! Resumes attempts that workers still run, and that another processor or an earlier process has started.

use std::sync::Arc;

use bytes::Bytes;
use streamer_core::{AttemptNumber, Uid};
use streamer_store::{Adopt, Lease, StoreError, StoredPayload};

use super::{Dispatcher, RunningAttempt, RunningGuard};
use crate::{
    attempt::{AttemptHandle, AttemptSpec, log_lines::attempt_span, recovery},
    workers::{
        remote_handler::RemoteHandler, remote_task::RemoteTask, worker_session::WorkerSession,
    },
};

impl Dispatcher {
    /// Resumes an attempt that `worker` runs. Returns its task, which contains the number of durable reports; `None` if
    /// the attempt does not belong to the worker.
    pub(crate) async fn resume_attempt(
        self: &Arc<Self>,
        worker: &Arc<WorkerSession>,
        uid: Uid,
        attempt: AttemptNumber,
    ) -> Result<Option<Arc<RemoteTask>>, StoreError> {
        if self.is_stopping() {
            return Ok(None);
        }
        let Some(record) = self.store.get_request(uid).await? else { return Ok(None) };
        if !worker.may_run(&record.action, &record.owner.tenant) {
            return Ok(None);
        }
        if self.running.contains(uid) {
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
        // Registered after the lease is acquired, because an entry prevents other workers from resuming the attempt.
        let running = RunningAttempt {
            attempt,
            tenant: record.owner.tenant.clone(),
            user: record.owner.user.clone(),
            handle: handle.clone(),
            is_remote: true,
        };
        if !self.running.insert(uid, running) {
            return Ok(None);
        }
        // Removes the entry on an early return.
        let guard = RunningGuard { dispatcher: self.clone(), uid, permit: None };
        if self.is_stopping() {
            return Ok(None);
        }
        let declared = self.actions.find(&record.action, &record.owner.tenant);
        let Some(declared) = declared else { return Ok(None) };
        let output = recovery::read_output(&*self.store, &record).await?;
        let reports = Arc::new(self.report_queue(&record));
        let durable = record.last_seq.events_since(record.attempt_seq);
        let task = RemoteTask::new(&record, durable, reports.clone(), &self.output_budget);
        let permit =
            self.actions.workers.acquire_slot_for_running(worker.clone(), &record.owner.tenant);
        if let Some(reason) = &record.cancel_reason {
            handle.cancel(reason);
        }
        let grace = self.options.cancellation_grace_period;
        let remote = Arc::new(RemoteHandler::new(
            worker.clone(),
            declared.spec.clone(),
            task,
            None,
            Some(handle.clone()),
            grace,
        ));
        let resumed = remote.task.clone();
        attempt_span(&record).in_scope(|| {
            tracing::info!(worker = worker.id, "took over a running attempt of a worker");
        });
        let attempt_spec = AttemptSpec {
            declared,
            handler: remote.clone(),
            reports,
            // The worker already has the payload.
            payload: StoredPayload { content_type: String::new(), data: Bytes::new() },
            checkpoint: None,
            started: None,
            output,
            record,
            is_remote: true,
        };
        self.tasks.spawn(async move {
            // Held until the attempt finishes.
            let _permit = permit;
            guard.dispatcher.run_remote(attempt_spec, &remote, handle, None).await;
        });
        Ok(Some(resumed))
    }
}
