//! An attempt: its state, its driver, and the events that it appends to the log.

mod attempt_state;
mod driver;
mod event_batch;
pub(crate) mod event_log_client;
mod handle;
pub(crate) mod log_lines;
pub(crate) mod outcome;
pub(crate) mod recovery;
mod time_limit;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use streamer_core::{Clock, ErrorCode, Limits, OutputDigest, Timestamp};
use streamer_handler::{
    AttemptInfo, Context, DynHandler, HandlerError, ReportQueue, RequestHistory,
};
use streamer_proto::common::v1::{Event, event::Kind};
use streamer_rpc::error_from_proto;
use streamer_store::{RequestRecord, StoredPayload};
use streamer_telemetry::{InScope, Scope, TraceContext, trace_span};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Span, field::Empty};

use crate::{
    declaration::Declaration, handlers::handler_threads::HandlerSpawner, metrics::OutcomeLabel,
};
use attempt_state::AttemptState;
use driver::Driver;
use event_batch::EventBatch;
use event_log_client::EventLogClient;
pub(crate) use handle::AttemptHandle;
use time_limit::TimeLimit;

/// Dependencies that all attempts share.
pub(crate) struct Environment {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) log: EventLogClient,
    /// Spawns the handlers that run in this process.
    pub(crate) handlers: HandlerSpawner,
    pub(crate) history: Arc<dyn RequestHistory>,
    pub(crate) limits: Limits,
    pub(crate) cancellation_grace_period: Duration,
}

/// An attempt to start or to resume.
pub(crate) struct AttemptSpec {
    pub(crate) record: RequestRecord,
    pub(crate) declared: Arc<Declaration>,
    pub(crate) handler: Arc<dyn DynHandler>,
    pub(crate) reports: Arc<ReportQueue>,
    pub(crate) payload: StoredPayload,
    pub(crate) checkpoint: Option<Bytes>,
    /// Stored `started` event; `None` when the attempt is resumed.
    pub(crate) started: Option<Event>,
    /// Digest of the output that the attempt has already produced.
    pub(crate) output: OutputDigest,
    /// Whether a worker runs the attempt.
    pub(crate) is_remote: bool,
}

/// Result of an attempt on this processor.
pub(crate) enum AttemptResult {
    /// The final event is durable. Contains the event, the time of the next attempt if the event is `retrying`, and the
    /// cancellation reason if cancellation was requested.
    Recorded(Kind, Option<Timestamp>, Option<String>),
    /// The attempt was fenced: a different holder owns the attempt, or will recover it.
    Fenced,
}

impl AttemptResult {
    /// Returns the outcome as the value of a trace attribute.
    pub(crate) fn outcome(&self) -> &'static str {
        match self {
            Self::Fenced => "lost",
            Self::Recorded(kind, ..) => OutcomeLabel::of(kind).map_or("unknown", Into::into),
        }
    }

    /// Returns the code of the error with which the attempt finished, if any.
    pub(crate) fn error(&self) -> Option<&'static str> {
        let error = match self {
            Self::Fenced => return Some(ErrorCode::Unavailable.as_str()),
            Self::Recorded(Kind::Failed(failed), ..) => failed.error.as_ref(),
            Self::Recorded(Kind::Retrying(retrying), ..) => retrying.error.as_ref(),
            Self::Recorded(..) => return None,
        };
        error.map(|error| error_from_proto(error).code.as_str())
    }
}

/// Runs an attempt until it finishes or is fenced.
pub(crate) async fn run(
    environment: &Environment,
    attempt_spec: AttemptSpec,
    handle: Arc<AttemptHandle>,
) -> AttemptResult {
    let AttemptSpec {
        record,
        declared,
        handler,
        reports,
        payload,
        checkpoint,
        started,
        output,
        is_remote,
    } = attempt_spec;
    let spec = declared.spec.clone();
    let scope = Scope::of(handler_span(is_remote));
    let trace = scope.trace_context();
    let now = environment.clock.now();
    let (start_time, limit) = (record.start_time.unwrap_or(now), spec.start_to_close);
    let context = Context::new(
        AttemptInfo {
            uid: record.uid,
            request_id: record.request_id(),
            tenant: record.owner.tenant.clone(),
            user: record.owner.user.clone(),
            action: record.action.clone(),
            content_type: payload.content_type,
            attempt: record.attempt,
            checkpoint,
            trace_parent: trace.as_ref().map(TraceContext::header),
            trace_state: trace.as_ref().and_then(TraceContext::trace_state),
            deadline: [limit.map(|limit| start_time.plus(limit)), record.close_by]
                .into_iter()
                .flatten()
                .min(),
        },
        reports.clone(),
        handle.cancellation.clone(),
        environment.limits,
        Some(environment.history.clone()),
    );
    // A separate task isolates panics.
    let span = scope.span();
    let work = async move {
        let ended = handler.run(&context, payload.data).await;
        record_failure(&span, &ended);
        ended
    };
    let work = work.in_scope(scope);
    let tenant: Arc<str> = record.owner.tenant.as_str().into();
    // For a worker's attempt, the task only forwards messages.
    let work = if is_remote {
        tokio::spawn(work)
    } else {
        environment.handlers.spawn(tenant.clone(), work)
    };
    let work = AbortOnDropHandle::new(work);
    let seqs = (record.attempt_seq, record.last_seq);
    let clock = environment.clock.clone();
    let driver = Driver {
        environment,
        uid: record.uid,
        tenant,
        number: record.attempt,
        failed_attempts: record.failed_attempts,
        attempt_seq: record.attempt_seq,
        close_by: record.close_by,
        state: AttemptState::new(
            TimeLimit::earliest(&record, &spec, now),
            spec.heartbeat_timeout,
            environment.cancellation_grace_period,
            Instant::now(),
        ),
        batch: EventBatch::new(record.uid, record.attempt, seqs, output, clock),
        spec,
        reports,
        handle,
    };
    driver.run(started, work).await
}

/// Marks the span of a handler as failed if the handler has failed.
pub(crate) fn record_failure<T>(span: &Span, ended: &Result<T, HandlerError>) {
    if ended.is_err() {
        span.record("otel.status_code", "ERROR");
    }
}

/// Creates the span of a handler: on a worker if `is_remote`, otherwise in this process.
pub(crate) fn handler_span(is_remote: bool) -> Span {
    if is_remote {
        trace_span!("worker.task", otel.kind = "client", otel.status_code = Empty)
    } else {
        trace_span!("handler", otel.status_code = Empty)
    }
}

#[cfg(test)]
#[path = "attempt/driver_tests.rs"]
mod tests;
