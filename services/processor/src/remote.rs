//! A handler whose work is done by a worker: what the worker reports goes the same way as what a
//! handler in this process reports.

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

use crate::{attempt::AttemptHandle, remote_task::RemoteTask, worker::Worker};

/// One attempt in the hands of a worker.
pub(crate) struct RemoteHandler {
    pub(crate) worker: Arc<Worker>,
    pub(crate) task: Arc<RemoteTask>,
    pub(crate) spec: Arc<ActionSpec>,
    /// What the worker has to be told first; nothing when it runs the attempt already.
    assignment: Option<Assignment>,
    /// Knows why cancellation was asked for; sync actions have none.
    handle: Option<Arc<AttemptHandle>>,
    cancel_grace: Duration,
}

/// What a task says beyond what its context knows.
pub(crate) struct Assignment {
    pub(crate) sync: bool,
}

impl RemoteHandler {
    pub(crate) fn new(
        worker: Arc<Worker>,
        spec: Arc<ActionSpec>,
        task: RemoteTask,
        assignment: Option<Assignment>,
        handle: Option<Arc<AttemptHandle>>,
        cancel_grace: Duration,
    ) -> Self {
        let task = Arc::new(task);
        worker.assign(task.clone());
        Self { worker, task, spec, assignment, handle, cancel_grace }
    }

    fn assign(&self, context: &Context, payload: Bytes, assignment: &Assignment) -> bool {
        let info = context.info();
        self.worker.send(Message::Task(Task {
            uid: info.uid.to_string(),
            attempt: i32::try_from(self.task.attempt).unwrap_or(i32::MAX),
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

    /// Passes reports on until the last one.
    async fn relay(&self, context: &Context) -> Result<Bytes, HandlerError> {
        loop {
            let (kind, reserved) = self.task.mailbox.next().await;
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
                    // They go into messages as they are.
                    error.details.take_if(|text| serde_json::from_str::<&RawValue>(text).is_err());
                    return Err(HandlerError::from_request_error(error));
                }
                report::Kind::Release(release) => {
                    return Err(HandlerError::released(release.reason));
                }
            }
        }
    }

    /// Tells the worker which reports are durable, as they become so.
    async fn acknowledge(&self, mut durable: tokio::sync::watch::Receiver<i64>) {
        while durable.changed().await.is_ok() {
            durable.borrow_and_update();
            self.worker.send(Message::Acknowledgment(self.task.acknowledgment(false)));
        }
    }

    /// Asks the worker for reports that were dropped, whenever there is room for them again.
    async fn ask_for_dropped_reports(&self) {
        loop {
            let resend = self.task.ask_again().await;
            // How many bytes of them may be under way.
            self.worker.send(Message::Acknowledgment(self.task.acknowledgment(false)));
            self.worker.send(Message::Resend(resend));
        }
    }

    /// Tells the worker once cancellation is asked for.
    async fn pass_on_cancellation(&self, context: &Context) {
        context.cancelled().await;
        let reason = self.handle.as_ref().and_then(|handle| handle.cancel_reason());
        let cancel = self.task.note_cancel(reason.unwrap_or_default(), self.cancel_grace);
        self.worker.send(Message::Cancel(cancel));
        std::future::pending::<()>().await;
    }

    /// The attempt has ended, and its end is durable.
    pub(crate) fn ended(&self) {
        if let Some(reason) = self.task.lost_reason() {
            self.revoked(&reason);
            return;
        }
        self.worker.unassign(&self.task);
        self.worker.send(Message::Acknowledgment(self.task.acknowledgment(true)));
    }

    /// The attempt is not the worker's any more.
    pub(crate) fn revoked(&self, reason: &str) {
        self.worker.unassign(&self.task);
        self.worker.send(Message::Revoke(self.task.revoke(reason)));
    }
}

#[async_trait]
impl DynHandler for RemoteHandler {
    fn spec(&self) -> ActionSpec {
        (*self.spec).clone()
    }

    async fn run(&self, context: &Context, payload: Bytes) -> Result<Bytes, HandlerError> {
        if let Some(reason) = self.task.lost_reason() {
            // Before it was sent.
            return Err(HandlerError::released(reason));
        }
        if let Some(assignment) = &self.assignment
            && !self.assign(context, payload, assignment)
        {
            return Err(HandlerError::released("the worker left before it got the task"));
        }
        let durable = self.task.durable();
        tokio::select! {
            biased;
            ended = self.relay(context) => ended,
            reason = self.task.lost() => Err(if self.task.may_have_begun() {
                let error = RequestError::new(ErrorCode::Unavailable, reason);
                HandlerError::from_request_error(error)
            } else {
                HandlerError::released(reason)
            }),
            () = self.acknowledge(durable) => Err(HandlerError::retryable("the attempt has ended")),
            () = self.ask_for_dropped_reports() => Err(HandlerError::retryable("the attempt has ended")),
            () = self.pass_on_cancellation(context) => Err(HandlerError::cancelled()),
        }
    }
}

/// An attempt that goes away without an end (cut off, or given to another) is told so.
impl Drop for RemoteHandler {
    fn drop(&mut self) {
        self.task.mailbox.close();
        if self.worker.task(self.task.uid, self.task.attempt).is_some() {
            self.revoked("the attempt was given up here");
        }
    }
}
