//! Handler that delegates an attempt to a worker. Its reports take the same path as those of a handler in this process.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::value::RawValue;
use streamer_core::{ActionSpec, ErrorCode, RequestError, TraceParent};
use streamer_handler::{Context, DynHandler, HandlerError};
use streamer_proto::{
    common::v1::{Payload, payload::Body},
    processor::v1::{Task, report, work_response::Message},
    timestamp,
};
use streamer_rpc::{JSON, error_from_proto, payload_bytes};

use crate::{
    attempt::AttemptHandle,
    workers::{remote_task::RemoteTask, worker_session::WorkerSession},
};

/// Handler of one attempt that a worker runs.
pub(crate) struct RemoteHandler {
    pub(crate) worker: Arc<WorkerSession>,
    pub(crate) task: Arc<RemoteTask>,
    pub(crate) spec: Arc<ActionSpec>,
    /// Assignment to send to the worker; `None` if the worker already runs the attempt.
    assignment: Option<Assignment>,
    /// Handle of the attempt, which provides the cancellation reason; `None` for sync actions.
    handle: Option<Arc<AttemptHandle>>,
    cancellation_grace_period: Duration,
}

/// Fields of a task that the context of the handler does not contain.
pub(crate) struct Assignment {
    pub(crate) sync: bool,
}

impl RemoteHandler {
    pub(crate) fn new(
        worker: Arc<WorkerSession>,
        spec: Arc<ActionSpec>,
        task: RemoteTask,
        assignment: Option<Assignment>,
        handle: Option<Arc<AttemptHandle>>,
        cancellation_grace_period: Duration,
    ) -> Self {
        let task = Arc::new(task);
        worker.assign(task.clone());
        Self { worker, task, spec, assignment, handle, cancellation_grace_period }
    }

    fn assign(&self, context: &Context, payload: Bytes, assignment: &Assignment) -> bool {
        let info = context.info();
        self.worker.send(Message::Task(Task {
            uid: info.uid.to_string(),
            attempt: self.task.attempt.as_i32(),
            request_id: info.request_id.clone(),
            tenant_id: info.tenant.clone(),
            user_id: info.user.clone(),
            action: info.action.clone(),
            payload: Some(Payload {
                content_type: info.content_type.clone(),
                body: Some(Body::Data(payload)),
            }),
            checkpoint: info.checkpoint.clone(),
            trace_parent: info.trace_parent.map(TraceParent::to_text).unwrap_or_default(),
            trace_state: info.trace_state.clone().unwrap_or_default(),
            deadline: info.deadline.map(|at| timestamp(at.as_millis())),
            sync: assignment.sync,
        }))
    }

    /// Forwards reports from the worker to the attempt; returns the result once the last one has arrived.
    async fn relay(&self, context: &Context) -> Result<Bytes, HandlerError> {
        loop {
            let (kind, reserved) = self.task.buffer.next().await;
            self.task.prepay(reserved);
            match kind {
                report::Kind::Progress(progress) => {
                    let metadata = progress.metadata.as_ref();
                    let metadata = metadata.map(|metadata| payload_bytes(Some(metadata)));
                    context
                        .report_progress(progress.percentage, progress.message, metadata)
                        .await?;
                }
                report::Kind::Output(output) => {
                    let content_type =
                        if output.content_type.is_empty() { JSON } else { &output.content_type };
                    context.output_bytes(content_type, payload_bytes(Some(&output))).await?;
                }
                report::Kind::Checkpoint(data) => context.save_checkpoint_bytes(data).await?,
                report::Kind::KeepAlive(_) => context.heartbeat().await?,
                report::Kind::Result(result) => {
                    if !matches!(result.content_type.as_str(), "" | JSON) {
                        return Err(HandlerError::fatal(format!(
                            "result.content_type: must be {JSON}, is {:?}",
                            result.content_type
                        )));
                    }
                    let result = payload_bytes(Some(&result));
                    return match serde_json::from_slice::<&RawValue>(&result) {
                        Ok(_) => Ok(result),
                        Err(error) => {
                            Err(HandlerError::fatal(format!("result: is not JSON: {error}")))
                        }
                    };
                }
                report::Kind::Error(error) => {
                    let mut error = error_from_proto(&error);
                    // Details are embedded in messages unchanged, so they must be JSON.
                    error.details.take_if(|text| serde_json::from_str::<&RawValue>(text).is_err());
                    return Err(HandlerError::from_request_error(error));
                }
                report::Kind::Release(release) => {
                    return Err(HandlerError::released(release.reason));
                }
            }
        }
    }

    /// Acknowledges reports to the worker as they become durable.
    async fn acknowledge(&self, mut durable: tokio::sync::watch::Receiver<i64>) {
        while durable.changed().await.is_ok() {
            durable.borrow_and_update();
            self.worker.send(Message::Acknowledgment(self.task.acknowledgment(false)));
        }
    }

    /// Requests dropped reports from the worker again whenever the budget has capacity for them.
    async fn request_resends(&self) {
        loop {
            let send = |resend| {
                // Announces the window for the reports that are requested.
                self.worker.send(Message::Acknowledgment(self.task.acknowledgment(false)));
                self.worker.send(Message::Resend(resend));
            };
            self.task.request_resend(send).await;
        }
    }

    /// Forwards a cancellation to the worker.
    async fn forward_cancellation(&self, context: &Context) {
        context.cancelled().await;
        let reason = self.handle.as_ref().and_then(|handle| handle.cancel_reason());
        let cancel =
            self.task.set_cancel(reason.unwrap_or_default(), self.cancellation_grace_period);
        self.worker.send(Message::Cancel(cancel));
        std::future::pending::<()>().await;
    }

    /// Notifies the worker that the end of the attempt is durable.
    pub(crate) fn send_ended(&self) {
        if let Some(reason) = self.task.revoke_reason() {
            self.send_revoke(&reason);
            return;
        }
        self.worker.unassign(&self.task);
        self.worker.send(Message::Acknowledgment(self.task.acknowledgment(true)));
    }

    /// Notifies the worker that the attempt is revoked.
    pub(crate) fn send_revoke(&self, reason: &str) {
        self.worker.unassign(&self.task);
        self.worker.send(Message::Revoke(self.task.revocation(reason)));
    }
}

#[async_trait]
impl DynHandler for RemoteHandler {
    fn spec(&self) -> ActionSpec {
        (*self.spec).clone()
    }

    async fn run(&self, context: &Context, payload: Bytes) -> Result<Bytes, HandlerError> {
        if let Some(reason) = self.task.revoke_reason() {
            // The attempt was revoked before the task was sent.
            return Err(HandlerError::released(reason));
        }
        if let Some(assignment) = &self.assignment
            && !self.assign(context, payload, assignment)
        {
            return Err(HandlerError::released(
                "the worker disconnected before it received the task",
            ));
        }
        let durable = self.task.durable();
        tokio::select! {
            biased;
            ended = self.relay(context) => ended,
            reason = self.task.revoked() => Err(if self.task.may_have_started() {
                let error = RequestError::new(ErrorCode::Unavailable, reason);
                HandlerError::from_request_error(error)
            } else {
                HandlerError::released(reason)
            }),
            () = self.acknowledge(durable) => Err(HandlerError::retryable("the attempt has ended")),
            () = self.request_resends() => Err(HandlerError::retryable("the attempt has ended")),
            () = self.forward_cancellation(context) => Err(HandlerError::cancelled()),
        }
    }
}

/// Revokes the attempt if the handler is dropped before the attempt has finished: it was aborted or fenced.
impl Drop for RemoteHandler {
    fn drop(&mut self) {
        self.task.buffer.close();
        if self.worker.task(self.task.uid, self.task.attempt).is_some() {
            self.send_revoke("the processor abandoned the attempt");
        }
    }
}
