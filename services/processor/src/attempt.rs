//! One attempt: runs the handler and brings what it reports into the log, in order, in batches.

mod handle;
mod time_limit;

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{Fuse, FusedFuture, OptionFuture},
};
use streamer_core::{
    ActionSpec, Clock, ErrorCode, Limits, OutputDigest, RequestError, Timestamp, Uid, retry,
};
use streamer_handler::{
    AttemptInfo, Context, DynHandler, HandlerError, Report, ReportBatch, ReportQueue,
    RequestHistory, Reservation,
};
use streamer_proto::{
    common::v1::{Event, Output, Payload, Progress, event::Kind, payload::Body},
    internal::v1::PublishRequest,
    timestamp,
};
use streamer_rpc::{error_from_proto, json_payload};
use streamer_store::{RequestRecord, StoredPayload};
use streamer_telemetry::{InScope, Scope, TraceContext, trace_span};
use tokio::{
    runtime::Handle,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};
use tracing::{Span, field::Empty};

use crate::{
    log_client::LogClient,
    outcome::{Ended, Outcome, conclude, event},
};

pub(crate) use handle::AttemptHandle;
use time_limit::TimeLimit;

/// First wait after a publish call that failed; doubled up to [`MAX_PUBLISH_BACKOFF`].
const PUBLISH_BACKOFF: Duration = Duration::from_millis(20);
const MAX_PUBLISH_BACKOFF: Duration = Duration::from_secs(1);

/// What an attempt runs with.
pub(crate) struct Environment {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) log: LogClient,
    /// Where handlers of this process run.
    pub(crate) handlers: Handle,
    pub(crate) history: Arc<dyn RequestHistory>,
    pub(crate) limits: Limits,
    pub(crate) cancel_grace: Duration,
}

/// An attempt to run, or to go on with.
pub(crate) struct Launch {
    pub(crate) record: RequestRecord,
    pub(crate) spec: Arc<ActionSpec>,
    pub(crate) handler: Arc<dyn DynHandler>,
    pub(crate) reports: Arc<ReportQueue>,
    pub(crate) payload: StoredPayload,
    pub(crate) checkpoint: Option<Bytes>,
    /// The stored `started` event; absent when the attempt has been running elsewhere.
    pub(crate) started: Option<Event>,
    /// What it has put out so far.
    pub(crate) output: OutputDigest,
    /// Runs in a worker.
    pub(crate) is_remote: bool,
}

/// How an attempt left the stage.
pub(crate) enum Finished {
    /// With this last event; another attempt is due at the given time when it is `retrying`. And why
    /// cancellation was asked for, when it was.
    Concluded(Kind, Option<Timestamp>, Option<String>),
    /// It was taken over, or left to whoever will.
    Lost,
}

impl Finished {
    /// Its outcome, for traces.
    pub(crate) fn outcome(&self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Concluded(kind, ..) => match kind {
                Kind::Succeeded(_) => "succeeded",
                Kind::Failed(_) => "failed",
                Kind::Cancelled(_) => "cancelled",
                Kind::Retrying(_) => "retrying",
                Kind::Accepted(_) | Kind::Started(_) | Kind::Progress(_) | Kind::Output(_) => {
                    "unknown"
                }
            },
        }
    }

    /// Code of the error that it ended with.
    pub(crate) fn error(&self) -> Option<&'static str> {
        let error = match self {
            Self::Lost => return Some(ErrorCode::Unavailable.as_str()),
            Self::Concluded(Kind::Failed(failed), ..) => failed.error.as_ref(),
            Self::Concluded(Kind::Retrying(retrying), ..) => retrying.error.as_ref(),
            Self::Concluded(..) => return None,
        };
        error.map(|error| error_from_proto(error).code.as_str())
    }
}

/// Runs an attempt to its end.
pub(crate) async fn run(
    environment: &Environment,
    launch: Launch,
    handle: Arc<AttemptHandle>,
) -> Finished {
    let Launch { record, spec, handler, reports, payload, checkpoint, started, output, is_remote } =
        launch;
    let scope = Scope::of(handler_span(is_remote));
    let trace = scope.trace_context();
    let now = environment.clock.now();
    let (began, limit) = (record.start_time.unwrap_or(now), spec.start_to_close);
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
            deadline: [limit.map(|limit| began.plus(limit)), record.close_by]
                .into_iter()
                .flatten()
                .min(),
        },
        reports.clone(),
        handle.cancellation.clone(),
        environment.limits,
        Some(environment.history.clone()),
    );
    // A task of its own: one that panics fails alone.
    let span = scope.span();
    let work = async move {
        let ended = handler.run(&context, payload.data).await;
        note_failure(&span, &ended);
        ended
    };
    let work = work.in_scope(scope);
    // What a worker does is only passed on here.
    let work = if is_remote { tokio::spawn(work) } else { environment.handlers.spawn(work) };
    let work = AbortOnDropHandle::new(work);
    let attempt = Attempt {
        environment,
        uid: record.uid,
        tenant: record.owner.tenant.as_str().into(),
        number: record.attempt,
        attempt_seq: record.attempt_seq,
        next_seq: record.last_seq + 1,
        digest: output,
        reports,
        handle,
        deadline: TimeLimit::nearest(&record, &spec, now),
        close_by: record.close_by,
        published_at: Instant::now(),
        spec,
    };
    attempt.drive(started, work).await
}

/// Marks the span of a handler that failed.
pub(crate) fn note_failure<T>(span: &Span, ended: &Result<T, HandlerError>) {
    if ended.is_err() {
        span.record("otel.status_code", "ERROR");
    }
}

/// What a handler runs in, here or in a worker.
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
    number: u32,
    attempt_seq: i64,
    next_seq: i64,
    digest: OutputDigest,
    reports: Arc<ReportQueue>,
    handle: Arc<AttemptHandle>,
    spec: Arc<ActionSpec>,
    deadline: Option<TimeLimit>,
    close_by: Option<Timestamp>,
    published_at: Instant,
}

impl Attempt<'_> {
    async fn drive(mut self, started: Option<Event>, mut work: Work) -> Finished {
        let mut sending = match started {
            Some(started) => self.announce(started),
            None => Fuse::terminated(),
        };
        let mut working = true;
        let mut outcome = None;
        // Room for the result. The handler has ended by then, so that no time limit applies.
        let mut reserving: Reserving = Fuse::terminated();
        let mut result_reserved = Reservation::default();
        let mut last = None;
        let mut cut_off: Option<Instant> = None;
        loop {
            let deadline =
                OptionFuture::from(self.deadline.as_ref().map(|limit| sleep_until(limit.at)));
            let silent_at = self.silent_at(!sending.is_terminated());
            let silence = OptionFuture::from(silent_at.map(sleep_until));
            let grace = OptionFuture::from(cut_off.map(sleep_until));
            tokio::select! {
                biased;
                () = self.handle.until_lost() => {}
                sent = &mut sending, if !sending.is_terminated() => match sent {
                    Ok(cancel_reason) => {
                        self.published_at = Instant::now();
                        // The last event of an attempt is no report of its handler.
                        let ending = i64::from(last.is_some());
                        self.reports.note_durable(self.next_seq - 1 - self.attempt_seq - ending);
                        if let Some(reason) = cancel_reason {
                            self.handle.cancel(&reason);
                        }
                    }
                    Err(status) => {
                        tracing::info!(uid = %self.uid, attempt = self.number, %status, "lost an attempt");
                        self.handle.lose();
                    }
                },
                ended = &mut work, if working => {
                    working = false;
                    let ended = match ended {
                        Ok(ended) => self.check(ended),
                        Err(error) if error.is_cancelled() => Outcome::Released(RequestError::new(
                            ErrorCode::Unavailable,
                            "the processor stops",
                        )),
                        Err(panic) => Outcome::Failed(panicked(&panic)),
                    };
                    if let Outcome::Succeeded(result) = &ended {
                        let mut reserve = self.reserve(result.len());
                        match (&mut reserve).now_or_never() {
                            // So that its event goes with the last reports.
                            Some(reserved) => result_reserved = reserved,
                            None => reserving = reserve,
                        }
                    }
                    outcome = Some(ended);
                }
                reserved = &mut reserving, if !reserving.is_terminated() => {
                    result_reserved = reserved;
                }
                Some(()) = deadline, if working => {
                    working = false;
                    work.abort();
                    outcome = self.deadline.take().map(|limit| Outcome::Failed(limit.error));
                }
                Some(()) = silence, if working => {
                    // It may have reported since the timer was set.
                    if self.silent_at(false).is_some_and(|at| at <= Instant::now()) {
                        working = false;
                        work.abort();
                        outcome = Some(Outcome::Failed(RequestError::new(
                            ErrorCode::Timeout,
                            "the handler reported nothing for longer than its heartbeat timeout",
                        )));
                    }
                }
                reason = self.handle.released(), if working => {
                    working = false;
                    work.abort();
                    outcome = Some(Outcome::Released(RequestError::new(ErrorCode::Unavailable, reason)));
                }
                () = self.handle.cancellation.cancelled(), if cut_off.is_none() => {
                    cut_off = Some(Instant::now() + self.environment.cancel_grace);
                }
                Some(()) = grace, if working => {
                    working = false;
                    work.abort();
                    outcome = Some(Outcome::Failed(HandlerError::cancelled().into_request_error()));
                }
                () = self.reports.filled(), if sending.is_terminated() && working => {}
            }
            if self.handle.is_lost() {
                self.reports.close();
                drop(self.reports.take_batch());
                return Finished::Lost;
            }
            if !sending.is_terminated() {
                continue;
            }
            if let Some((kind, retry_at)) = last.take() {
                return Finished::Concluded(kind, retry_at, self.handle.cancel_reason());
            }
            let mut batch = self.new_batch();
            let mut reserved = self.add_reports(&mut batch);
            if reserving.is_terminated()
                && let Some(outcome) = outcome.take()
            {
                // Nothing that is reported from here on counts.
                self.reports.close();
                self.handle.note_ending();
                reserved.merge(self.add_reports(&mut batch));
                reserved.merge(std::mem::take(&mut result_reserved));
                last = Some(self.add_ending(&mut batch, outcome));
            }
            if !batch.events.is_empty() || batch.checkpoint.is_some() {
                sending = self.publish(batch, reserved);
            }
        }
    }

    /// Reserves the bytes of the result.
    fn reserve(&self, bytes: usize) -> Reserving {
        let reports = self.reports.clone();
        async move { reports.reserve(bytes).await }.boxed().fuse()
    }

    /// Delivers the `started` event, which the claim has made durable.
    fn announce(&self, started: Event) -> Sending {
        let (log, uid) = (self.environment.log.clone(), self.uid);
        let announced = async move {
            log.announce(uid, vec![started]).await;
            Ok(None)
        };
        announced.boxed().fuse()
    }

    /// A result beyond the limit is a failure that no repetition cures.
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

    /// When the handler will have been silent for too long. While what it reported is on its way to
    /// the log, it may be waiting for that.
    fn silent_at(&self, sending: bool) -> Option<Instant> {
        let limit = self.spec.heartbeat_timeout.filter(|_| !sending)?;
        Some(self.reports.last_push().max(self.published_at) + limit)
    }

    fn new_batch(&self) -> PublishRequest {
        PublishRequest {
            uid: self.uid.to_bytes().to_vec().into(),
            attempt: i32::try_from(self.number).unwrap_or(i32::MAX),
            events: Vec::new(),
            checkpoint: None,
            retry_at: None,
        }
    }

    /// Adds what was reported; returns what is reserved for it.
    fn add_reports(&mut self, batch: &mut PublishRequest) -> Reservation {
        let ReportBatch { reports, reserved } = self.reports.take_batch();
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
        reserved
    }

    fn add_ending(
        &mut self,
        batch: &mut PublishRequest,
        outcome: Outcome,
    ) -> (Kind, Option<Timestamp>) {
        let ended = Ended {
            attempt: self.number,
            attempt_seq: self.attempt_seq,
            output: &self.digest,
            cancel_reason: self.handle.cancel_reason(),
            policy: self.spec.retry,
            close_by: self.close_by,
            now: self.environment.clock.now(),
            random: retry::random_fraction(),
        };
        let ending = conclude(outcome, &ended);
        batch.retry_at = ending.retry_at.map(|at| timestamp(at.as_millis()));
        batch.events.push(self.next_event(ending.kind.clone()));
        (ending.kind, ending.retry_at)
    }

    fn next_event(&mut self, kind: Kind) -> Event {
        let seq = self.next_seq;
        self.next_seq += 1;
        event(seq, self.number, self.environment.clock.now(), kind)
    }

    /// Sends a batch, again and again until it is stored or this attempt may not write any more.
    /// The numbers of its events make repeating safe.
    fn publish(&self, batch: PublishRequest, reserved: Reservation) -> Sending {
        let log = self.environment.log.clone();
        let (uid, tenant) = (self.uid, self.tenant.clone());
        let publishing = async move {
            let _reserved = reserved;
            let mut wait = PUBLISH_BACKOFF;
            loop {
                match log.publish(&tenant, batch.clone()).await {
                    Ok(cancel_reason) => return Ok(cancel_reason),
                    // Another's, or such that no repetition helps: whoever takes it over ends it.
                    Err(status) if is_final(&status) => return Err(status),
                    Err(status) => {
                        tracing::warn!(%uid, %status, ?wait, "could not publish, will try again");
                        sleep(wait.mul_f64(retry::random_fraction())).await;
                        wait = (wait * 2).min(MAX_PUBLISH_BACKOFF);
                    }
                }
            }
        };
        publishing.boxed().fuse()
    }
}

fn is_final(status: &Status) -> bool {
    match status.code() {
        Code::Aborted
        | Code::InvalidArgument
        | Code::OutOfRange
        | Code::FailedPrecondition
        | Code::Unimplemented
        | Code::DataLoss => true,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::Internal
        | Code::Unavailable
        | Code::Unauthenticated => false,
    }
}

fn panicked(error: &tokio::task::JoinError) -> RequestError {
    tracing::error!(%error, "a handler panicked");
    let error = RequestError::new(ErrorCode::ProcessingFailed, "the handler panicked");
    RequestError { retryable: true, ..error }
}

#[cfg(test)]
mod tests;
