//! Runs the handler of one attempt, and appends its reports to the log, in order and in batches.

mod handle;
mod time_limit;

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{Fuse, FusedFuture, OptionFuture},
};
use streamer_core::{
    ActionSpec, AttemptNumber, Clock, ErrorCode, Limits, OutputDigest, RequestError, Seq,
    Timestamp, Uid, backoff, validate,
};
use streamer_handler::{
    AttemptInfo, Context, DynHandler, HandlerError, Report, ReportQueue, RequestHistory,
    Reservation,
};
use streamer_proto::{
    common::v1::{Event, Output, Payload, Progress, event::Kind, payload::Body},
    internal::v1::PublishRequest,
    timestamp,
};
use streamer_rpc::{error_from_proto, json_payload};
use streamer_store::{RequestRecord, StoredPayload, log_event};
use streamer_telemetry::{InScope, Scope, TraceContext, trace_span};
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tracing::{Span, field::Empty};

use crate::{
    declaration::Declaration,
    event_log_client::{EventLogClient, ReportedBatch},
    handlers::handler_threads::HandlerSpawner,
    metrics::OutcomeLabel,
    outcome::{AttemptSummary, Outcome, final_event},
};

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
    let attempt = Attempt {
        environment,
        uid: record.uid,
        tenant,
        number: record.attempt,
        failed_attempts: record.failed_attempts,
        attempt_seq: record.attempt_seq,
        next_seq: record.last_seq.next(),
        digest: output,
        reports,
        handle,
        deadline: TimeLimit::earliest(&record, &spec, now),
        close_by: record.close_by,
        published_at: Instant::now(),
        spec,
    };
    attempt.drive(started, work).await
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

type Work = AbortOnDropHandle<Result<Bytes, HandlerError>>;
type Reserving = Fuse<Pin<Box<dyn Future<Output = Reservation> + Send>>>;
type Sending = Fuse<Pin<Box<dyn Future<Output = Result<Option<String>, Status>> + Send>>>;

struct Attempt<'a> {
    environment: &'a Environment,
    uid: Uid,
    tenant: Arc<str>,
    number: AttemptNumber,
    failed_attempts: u32,
    attempt_seq: Seq,
    next_seq: Seq,
    digest: OutputDigest,
    reports: Arc<ReportQueue>,
    handle: Arc<AttemptHandle>,
    spec: Arc<ActionSpec>,
    deadline: Option<TimeLimit>,
    close_by: Option<Timestamp>,
    published_at: Instant,
}

impl Attempt<'_> {
    async fn drive(mut self, started: Option<Event>, mut work: Work) -> AttemptResult {
        let mut sending = match started {
            Some(started) => self.announce(started),
            None => Fuse::terminated(),
        };
        let mut handler_running = true;
        let mut outcome = None;
        // Pending reservation for the result. The handler has already returned, so no time limit applies.
        let mut reserving: Reserving = Fuse::terminated();
        let mut result_reserved = Reservation::default();
        let mut last = None;
        let mut abort_at: Option<Instant> = None;
        loop {
            let deadline =
                OptionFuture::from(self.deadline.as_ref().map(|limit| sleep_until(limit.at)));
            let heartbeat_deadline = self.heartbeat_deadline(!sending.is_terminated());
            let heartbeat_expired = OptionFuture::from(heartbeat_deadline.map(sleep_until));
            let grace = OptionFuture::from(abort_at.map(sleep_until));
            tokio::select! {
                biased;
                () = self.handle.fenced() => {}
                sent = &mut sending, if !sending.is_terminated() => match sent {
                    Ok(cancel_reason) => {
                        self.published_at = Instant::now();
                        // The final event of an attempt is not a report from its handler.
                        let final_events = i64::from(last.is_some());
                        let events = self.next_seq.previous().events_since(self.attempt_seq);
                        self.reports.set_durable(events - final_events);
                        if let Some(reason) = cancel_reason {
                            self.handle.cancel(&reason);
                        }
                    }
                    Err(status) => {
                        tracing::info!(uid = %self.uid, attempt = self.number.as_u32(), %status, "attempt fenced");
                        self.handle.fence();
                    }
                },
                ended = &mut work, if handler_running => {
                    handler_running = false;
                    let ended = match ended {
                        Ok(ended) => self.check(ended),
                        Err(error) if error.is_cancelled() => Outcome::Released(RequestError::new(
                            ErrorCode::Unavailable,
                            "the processor is shutting down",
                        )),
                        Err(panic) => Outcome::Failed(panicked(&panic)),
                    };
                    if let Outcome::Succeeded(result) = &ended {
                        let mut reserve = self.reserve(result.len());
                        match (&mut reserve).now_or_never() {
                            // Reserved without waiting, so that the final event is part of the last batch.
                            Some(reserved) => result_reserved = reserved,
                            None => reserving = reserve,
                        }
                    }
                    outcome = Some(ended);
                }
                reserved = &mut reserving, if !reserving.is_terminated() => {
                    result_reserved = reserved;
                }
                Some(()) = deadline, if handler_running => {
                    handler_running = false;
                    work.abort();
                    outcome = self.deadline.take().map(|limit| Outcome::Failed(limit.error));
                }
                Some(()) = heartbeat_expired, if handler_running => {
                    // The handler may have reported since the timer was set.
                    if self.heartbeat_deadline(false).is_some_and(|at| at <= Instant::now()) {
                        handler_running = false;
                        work.abort();
                        outcome = Some(Outcome::Failed(RequestError::new(
                            ErrorCode::Timeout,
                            "the handler sent no report within its heartbeat timeout",
                        )));
                    }
                }
                reason = self.handle.released(), if handler_running => {
                    handler_running = false;
                    work.abort();
                    outcome = Some(Outcome::Released(RequestError::new(ErrorCode::Unavailable, reason)));
                }
                () = self.handle.cancellation.cancelled(), if abort_at.is_none() => {
                    abort_at = Some(Instant::now() + self.environment.cancellation_grace_period);
                }
                Some(()) = grace, if handler_running => {
                    handler_running = false;
                    work.abort();
                    outcome = Some(Outcome::Failed(HandlerError::cancelled().into_request_error()));
                }
                () = self.reports.filled(), if sending.is_terminated() && handler_running => {}
            }
            if self.handle.is_fenced() {
                self.reports.close();
                drop(self.reports.take_batch());
                return AttemptResult::Fenced;
            }
            if !sending.is_terminated() {
                continue;
            }
            if let Some((kind, retry_at)) = last.take() {
                return AttemptResult::Recorded(kind, retry_at, self.handle.cancel_reason());
            }
            let mut batch = self.new_batch();
            let mut source = ReportedBatch::default();
            self.add_reports(&mut batch, &mut source);
            if reserving.is_terminated()
                && let Some(outcome) = outcome.take()
            {
                // Later reports are discarded.
                self.reports.close();
                self.handle.mark_finishing();
                self.add_reports(&mut batch, &mut source);
                source.reserve(std::mem::take(&mut result_reserved));
                last = Some(self.add_final_event(&mut batch, outcome));
            }
            if !batch.events.is_empty() || batch.checkpoint.is_some() {
                sending = self.publish(batch, source);
            }
        }
    }

    /// Reserves buffer space for the result.
    fn reserve(&self, bytes: usize) -> Reserving {
        let reports = self.reports.clone();
        async move { reports.reserve(bytes).await }.boxed().fuse()
    }

    /// Announces the `started` event, which the claim has already stored.
    fn announce(&self, started: Event) -> Sending {
        let (log, uid) = (self.environment.log.clone(), self.uid);
        let announced = async move {
            log.announce(uid, vec![started]).await;
            Ok(None)
        };
        announced.boxed().fuse()
    }

    /// Checks the size of the result. A result that is too large is not retried: a retry would exceed the limit too.
    fn check(&self, ended: Result<Bytes, HandlerError>) -> Outcome {
        match ended {
            Ok(result) => match self.environment.limits.check_result(result.len()) {
                Ok(()) => Outcome::Succeeded(result),
                Err(rule) => Outcome::Failed(RequestError::new(ErrorCode::ProcessingFailed, rule)),
            },
            Err(error) if error.is_released() => Outcome::Released(error.into_request_error()),
            Err(error) => Outcome::Failed(error.into_request_error()),
        }
    }

    /// Returns the time at which the heartbeat timeout expires; `None` if the action has no heartbeat timeout, or while
    /// reports are being published, because the handler may be waiting for that.
    fn heartbeat_deadline(&self, sending: bool) -> Option<Instant> {
        let limit = self.spec.heartbeat_timeout.filter(|_| !sending)?;
        Some(self.reports.last_activity().max(self.published_at) + limit)
    }

    fn new_batch(&self) -> PublishRequest {
        PublishRequest {
            uid: self.uid.to_bytes().to_vec().into(),
            attempt: self.number.as_i32(),
            events: Vec::new(),
            checkpoint: None,
            retry_at: None,
        }
    }

    /// Adds pending reports to the batch.
    fn add_reports(&mut self, batch: &mut PublishRequest, source: &mut ReportedBatch) {
        let mut taken = self.reports.take_batch();
        let reports = std::mem::take(&mut taken.reports);
        source.add(taken);
        for report in reports {
            let kind = match report {
                Report::Progress { percentage, message, metadata } => Kind::Progress(Progress {
                    percentage,
                    message,
                    metadata: metadata.map(json_payload),
                }),
                Report::Output { content_type, data } => {
                    let chunk_index = self.digest.chunks();
                    self.digest.push(&data);
                    let data = Payload { content_type, body: Some(Body::Data(data)) };
                    Kind::Output(Output { data: Some(data), chunk_index })
                }
                Report::Checkpoint(data) => {
                    batch.checkpoint = Some(data);
                    continue;
                }
                Report::KeepAlive => continue,
            };
            batch.events.push(self.next_event(kind));
        }
    }

    fn add_final_event(
        &mut self,
        batch: &mut PublishRequest,
        outcome: Outcome,
    ) -> (Kind, Option<Timestamp>) {
        let summary = AttemptSummary {
            attempt: self.number,
            failed_attempts: self.failed_attempts,
            attempt_seq: self.attempt_seq,
            output: &self.digest,
            cancel_reason: self.handle.cancel_reason(),
            policy: self.spec.retry,
            close_by: self.close_by,
            now: self.environment.clock.now(),
            random: backoff::random_fraction(),
        };
        let final_event = final_event(outcome, &summary);
        batch.retry_at = final_event.retry_at.map(|at| timestamp(at.as_millis()));
        batch.events.push(self.next_event(final_event.kind.clone()));
        (final_event.kind, final_event.retry_at)
    }

    fn next_event(&mut self, kind: Kind) -> Event {
        let seq = self.next_seq;
        self.next_seq = seq.next();
        log_event(seq, self.number, self.environment.clock.now(), kind)
    }

    /// Publishes a batch until it is stored or the attempt is fenced.
    fn publish(&self, batch: PublishRequest, source: ReportedBatch) -> Sending {
        let log = self.environment.log.clone();
        let (uid, tenant) = (self.uid, self.tenant.clone());
        async move { log.publish(uid, &tenant, batch, source).await }.boxed().fuse()
    }
}

fn panicked(error: &tokio::task::JoinError) -> RequestError {
    let error = validate::logged_text(&error.to_string());
    tracing::error!(error, "handler panicked");
    let error = RequestError::new(ErrorCode::ProcessingFailed, "the handler panicked");
    RequestError { retryable: true, ..error }
}

#[cfg(test)]
mod tests;
