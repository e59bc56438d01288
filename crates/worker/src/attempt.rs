//! An attempt that runs in this worker: its handler, which runs in a separate task, and its reports.

use std::{panic::AssertUnwindSafe, sync::Arc};

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;
use streamer_core::{ErrorCode, Limits, RequestError, Timestamp, TraceParent};
use streamer_handler::{
    AttemptInfo, Context, DynHandler, HandlerError, Report as HandlerReport, ReportQueue,
};
use streamer_proto::{
    millis,
    processor::v1::{self as proto, Release, Report, report::Kind},
};
use streamer_rpc::{compact_bytes, error_to_proto, json_payload, payload_into_parts};
use streamer_telemetry::{InScope, Scope, TraceContext, trace_span};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::field::Empty;

use crate::{
    attempt_key::AttemptKey,
    ready_set::{ReadyFlag, ReadySet},
    send_window::{SendWindow, WindowLimits},
};

/// Slot for the result of the handler; `None` until the handler returns.
type Returned = Arc<Mutex<Option<Result<Bytes, HandlerError>>>>;

pub(crate) struct Attempt {
    key: AttemptKey,
    pub(crate) sync: bool,
    reports: Arc<ReportQueue>,
    send_window: SendWindow,
    /// Maximum bytes of unacknowledged reports; `None` until the server sets it on the current stream.
    window_bytes: Option<usize>,
    /// Number of `resend` messages received for this attempt on the current stream.
    resends: i32,
    cancellation: CancellationToken,
    returned: Returned,
    ready_flag: Arc<ReadyFlag>,
    max_payload_bytes: usize,
    handler: Option<AbortOnDropHandle<()>>,
}

impl Attempt {
    /// Creates an attempt and starts its handler.
    pub(crate) fn start(
        key: AttemptKey,
        task: proto::Task,
        handler: Arc<dyn DynHandler>,
        limits: Limits,
        ready: &Arc<ReadySet>,
    ) -> Self {
        let ready_flag = Arc::new(ReadyFlag::default());
        let mark_ready = {
            let (ready, ready_flag) = (ready.clone(), ready_flag.clone());
            move || ready.insert(key, &ready_flag)
        };
        let reports = if task.sync {
            ReportQueue::discarding()
        } else {
            ReportQueue::with_hook(mark_ready.clone())
        };
        let reports = Arc::new(reports);
        let cancellation = CancellationToken::new();
        let (info, payload, sync) = parse_task(key, task);
        let context = Context::new(info, reports.clone(), cancellation.clone(), limits, None);
        let scope = scope(&context);
        let span = scope.span();
        let returned = Returned::default();
        let slot = returned.clone();
        let running = async move {
            let run = AssertUnwindSafe(handler.run(&context, payload)).catch_unwind();
            let ended = run.await.unwrap_or_else(|_| Err(panicked()));
            if ended.is_err() {
                span.record("otel.status_code", "ERROR");
            }
            *slot.lock() = Some(ended);
            mark_ready();
        }
        .in_scope(scope);
        let running = tokio::spawn(running);
        Self {
            key,
            sync,
            reports,
            send_window: SendWindow::default(),
            window_bytes: None,
            resends: 0,
            cancellation,
            returned,
            ready_flag,
            max_payload_bytes: limits.max_payload_bytes,
            handler: Some(AbortOnDropHandle::new(running)),
        }
    }

    /// Returns whether the attempt is running: its last report has not been added to the send window.
    pub(crate) fn is_running(&self) -> bool {
        !self.send_window.has_ended()
    }

    /// Notifies the handler that cancellation was requested.
    pub(crate) fn cancel(&self) {
        self.cancellation.cancel();
    }

    /// Stops the handler and releases the attempt for the given reason, if it is running.
    pub(crate) fn release(&mut self, reason: &str) {
        if self.is_running() {
            self.handler = None;
            self.reports.close();
            // Discard pending reports, except the latest checkpoint, from which the next attempt starts.
            let left = std::iter::from_fn(|| self.reports.pop());
            if let Some(checkpoint) =
                left.filter(|r| matches!(r, HandlerReport::Checkpoint(_))).last()
            {
                self.send_window.push(checkpoint);
            }
            self.send_window.end(Kind::Release(Release { reason: reason.to_owned() }));
        }
    }

    /// Records that reports up to `number` are durable, and that at most `window_bytes` may be unacknowledged (0 leaves
    /// the limit unchanged).
    pub(crate) fn acknowledge(&mut self, number: i64, window_bytes: usize) {
        if window_bytes > 0 {
            self.window_bytes = Some(window_bytes);
        }
        self.send_window.acknowledge(number);
    }

    pub(crate) fn resume(&mut self, number: i64) {
        self.window_bytes = None;
        self.resends = 0;
        self.send_window.resume(number);
    }

    /// Resends the reports after `number`, which the server has dropped.
    pub(crate) fn resend(&mut self, number: i64, resends: i32) {
        self.resends = resends;
        self.send_window.resend(number);
    }

    /// Moves reports from the handler to the send window while the window has capacity; returns the reports to send.
    pub(crate) fn collect(&mut self, window: WindowLimits) -> Vec<Report> {
        let bytes = self.window_bytes.unwrap_or(window.bytes).min(window.bytes);
        let window = WindowLimits { bytes, ..window };
        self.ready_flag.clear();
        // Read before the queue: once the handler has returned, the queue contains all its reports.
        let has_returned = self.returned.lock().is_some();
        let mut drained = false;
        while self.send_window.has_room(window) {
            match self.reports.pop() {
                Some(report) => self.send_window.push(report),
                None => {
                    drained = true;
                    break;
                }
            }
        }
        if has_returned
            && drained
            && let Some(returned) = self.returned.lock().take()
        {
            self.send_window.end(self.final_report(returned));
        }
        let ((uid, attempt), resends) = (self.key, self.resends);
        let report = |(number, kind)| Report {
            uid: uid.to_string(),
            attempt: attempt.as_i32(),
            number,
            kind: Some(kind),
            resends,
        };
        std::iter::from_fn(|| self.send_window.next(window)).map(report).collect()
    }

    fn final_report(&self, returned: Result<Bytes, HandlerError>) -> Kind {
        let error = match returned {
            Ok(result) if result.len() <= self.max_payload_bytes => {
                return Kind::Result(json_payload(result));
            }
            Ok(result) => RequestError::new(
                ErrorCode::ProcessingFailed,
                format!(
                    "the result must be at most {} bytes (welcome.max_payload_bytes), is {}",
                    self.max_payload_bytes,
                    result.len()
                ),
            ),
            Err(error) if error.is_released() => {
                let reason = error.into_request_error().message;
                return Kind::Release(Release { reason });
            }
            Err(error) => error.into_request_error(),
        };
        Kind::Error(error_to_proto(&error))
    }
}

impl Drop for Attempt {
    /// Cancels the handler and discards its later reports.
    fn drop(&mut self) {
        self.cancellation.cancel();
        self.reports.close();
    }
}

fn parse_task((uid, attempt): AttemptKey, task: proto::Task) -> (AttemptInfo, Bytes, bool) {
    let (content_type, payload) = payload_into_parts(task.payload);
    let trace_parent = TraceParent::parse(&task.trace_parent);
    let info = AttemptInfo {
        uid,
        request_id: task.request_id,
        tenant: task.tenant_id,
        user: task.user_id,
        action: task.action,
        content_type,
        attempt,
        checkpoint: task.checkpoint.map(compact_bytes),
        trace_parent,
        trace_state: Some(task.trace_state)
            .filter(|state| trace_parent.is_some() && !state.is_empty()),
        deadline: task.deadline.as_ref().map(|at| Timestamp::from_millis(millis(at))),
    };
    // Copied, so that a payload and a checkpoint, which live as long as the attempt, do not keep the receive buffer.
    (info, compact_bytes(payload), task.sync)
}

/// Returns the scope of the handler: with a span if the attempt is sampled, otherwise with the trace context only.
fn scope(context: &Context) -> Scope {
    let parent = context.trace_parent();
    match parent.and_then(|parent| TraceContext::parse(&parent, context.trace_state())) {
        Some(parent) => Scope::follow(&parent, || {
            trace_span!(
                "handler",
                otel.kind = "consumer",
                otel.status_code = Empty,
                streamer.action = context.info().action,
                streamer.attempt = context.attempt(),
                streamer.request_id = context.request_id(),
                streamer.tenant = context.tenant(),
            )
        }),
        None => Scope::default(),
    }
}

fn panicked() -> HandlerError {
    tracing::error!("handler panicked");
    HandlerError::retryable("the handler panicked")
}
