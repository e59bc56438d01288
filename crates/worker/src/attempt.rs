//! One attempt in this worker: its handler, in a task of its own, and what it has to say.

use std::{panic::AssertUnwindSafe, sync::Arc};

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;
use streamer_core::{ErrorCode, Limits, RequestError, Timestamp, TraceParent, Uid};
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
    outgoing::{Outgoing, Window},
    ready::{Flag, Ready},
};

/// Request and attempt number: the fencing token.
pub(crate) type Key = (Uid, u32);

/// What the handler returned, once it has.
type Returned = Arc<Mutex<Option<Result<Bytes, HandlerError>>>>;

pub(crate) struct Attempt {
    key: Key,
    pub(crate) sync: bool,
    reports: Arc<ReportQueue>,
    outgoing: Outgoing,
    /// How many bytes may be unacknowledged, since the server said so on this stream.
    window_bytes: Option<usize>,
    /// How often the server asked for dropped reports on this stream.
    resends: i32,
    cancellation: CancellationToken,
    returned: Returned,
    flag: Arc<Flag>,
    max_payload_bytes: usize,
    handler: Option<AbortOnDropHandle<()>>,
}

impl Attempt {
    /// Starts the handler.
    pub(crate) fn start(
        key: Key,
        task: proto::Task,
        handler: Arc<dyn DynHandler>,
        limits: Limits,
        ready: &Arc<Ready>,
    ) -> Self {
        let flag = Arc::new(Flag::default());
        let note = {
            let (ready, flag) = (ready.clone(), flag.clone());
            move || ready.note(key, &flag)
        };
        let reports = if task.sync {
            ReportQueue::discarding()
        } else {
            ReportQueue::with_hook(note.clone())
        };
        let reports = Arc::new(reports);
        let cancellation = CancellationToken::new();
        let (info, payload, sync) = read(key, task);
        let context = Context::new(info, reports.clone(), cancellation.clone(), limits, None);
        let scope = scope(&context);
        let span = scope.span();
        let returned = Returned::default();
        let place = returned.clone();
        let running = async move {
            let run = AssertUnwindSafe(handler.run(&context, payload)).catch_unwind();
            let ended = run.await.unwrap_or_else(|_| Err(panicked()));
            if ended.is_err() {
                span.record("otel.status_code", "ERROR");
            }
            *place.lock() = Some(ended);
            note();
        }
        .in_scope(scope);
        let running = tokio::spawn(running);
        Self {
            key,
            sync,
            reports,
            outgoing: Outgoing::default(),
            window_bytes: None,
            resends: 0,
            cancellation,
            returned,
            flag,
            max_payload_bytes: limits.max_payload_bytes,
            handler: Some(AbortOnDropHandle::new(running)),
        }
    }

    /// Whether the handler has not returned yet.
    pub(crate) fn is_running(&self) -> bool {
        !self.outgoing.has_ended()
    }

    /// Tells the handler that cancellation was asked for.
    pub(crate) fn cancel(&self) {
        self.cancellation.cancel();
    }

    /// Stops the handler and hands the attempt back.
    pub(crate) fn release(&mut self, reason: &str) {
        if self.is_running() {
            self.handler = None;
            self.reports.close();
            // What it reported is void, but for what the next attempt begins from.
            let left = std::iter::from_fn(|| self.reports.pop());
            if let Some(checkpoint) =
                left.filter(|r| matches!(r, HandlerReport::Checkpoint(_))).last()
            {
                self.outgoing.push(checkpoint);
            }
            self.outgoing.end(Kind::Release(Release { reason: reason.to_owned() }));
        }
    }

    /// Reports up to this number are durable, and `window_bytes` may be unacknowledged (0: unchanged).
    pub(crate) fn acknowledge(&mut self, number: i64, window_bytes: usize) {
        if window_bytes > 0 {
            self.window_bytes = Some(window_bytes);
        }
        self.outgoing.acknowledge(number);
    }

    pub(crate) fn resume(&mut self, number: i64) {
        self.window_bytes = None;
        self.resends = 0;
        self.outgoing.resume(number);
    }

    /// Sends reports again that the server has dropped.
    pub(crate) fn resend(&mut self, number: i64, resends: i32) {
        self.resends = resends;
        self.outgoing.resend(number);
    }

    /// Takes from the handler what there is room for; returns what is to be sent now.
    pub(crate) fn collect(&mut self, window: Window) -> Vec<Report> {
        let bytes = self.window_bytes.unwrap_or(window.bytes).min(window.bytes);
        let window = Window { bytes, ..window };
        self.flag.clear();
        // Looked at first: what was reported before the handler returned is in the queue by then.
        let has_returned = self.returned.lock().is_some();
        let mut drained = false;
        while self.outgoing.has_room(window) {
            match self.reports.pop() {
                Some(report) => self.outgoing.push(report),
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
            self.outgoing.end(self.ending(returned));
        }
        let ((uid, attempt), resends) = (self.key, self.resends);
        let report = |(number, kind)| Report {
            uid: uid.to_string(),
            attempt: i32::try_from(attempt).unwrap_or(i32::MAX),
            number,
            kind: Some(kind),
            resends,
        };
        std::iter::from_fn(|| self.outgoing.next(window)).map(report).collect()
    }

    fn ending(&self, returned: Result<Bytes, HandlerError>) -> Kind {
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
    /// Nothing that the handler still reports counts.
    fn drop(&mut self) {
        self.cancellation.cancel();
        self.reports.close();
    }
}

fn read((uid, attempt): Key, task: proto::Task) -> (AttemptInfo, Bytes, bool) {
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
    // They live as long as the attempt; the buffer that they came in does not have to.
    (info, compact_bytes(payload), task.sync)
}

/// A span of the handler, if the attempt is traced; else its place in the trace.
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
    tracing::error!("a handler panicked");
    HandlerError::retryable("the handler panicked")
}
