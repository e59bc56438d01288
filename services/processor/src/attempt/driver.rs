//! Drives an attempt: runs its handler, and appends its reports to the log, in order and in batches.

use std::{pin::Pin, sync::Arc};

use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{Fuse, FusedFuture, OptionFuture},
};
use streamer_core::{
    ActionSpec, AttemptNumber, ErrorCode, RequestError, Seq, Timestamp, Uid, backoff, validate,
};
use streamer_handler::{HandlerError, ReportQueue, Reservation};
use streamer_proto::{common::v1::Event, internal::v1::PublishRequest};
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::{
    AttemptHandle, AttemptResult, Environment,
    attempt_state::{AttemptEvent, AttemptState, Next},
    event_batch::EventBatch,
    event_log_client::ReportedBatch,
    outcome::{AttemptSummary, FinalEvent, Outcome, final_event},
};

pub(super) type Work = AbortOnDropHandle<Result<Bytes, HandlerError>>;
type Reserving = Fuse<Pin<Box<dyn Future<Output = Reservation> + Send>>>;
type Publishing = Fuse<Pin<Box<dyn Future<Output = Result<Option<String>, Status>> + Send>>>;

/// Attempt whose handler runs.
pub(super) struct Driver<'a> {
    pub(super) environment: &'a Environment,
    pub(super) uid: Uid,
    pub(super) tenant: Arc<str>,
    pub(super) number: AttemptNumber,
    /// Number of earlier attempts that failed.
    pub(super) failed_attempts: u32,
    /// `seq` of the `started` event.
    pub(super) attempt_seq: Seq,
    /// Time from which no attempt may start; `None` if no limit applies.
    pub(super) close_by: Option<Timestamp>,
    pub(super) spec: Arc<ActionSpec>,
    pub(super) reports: Arc<ReportQueue>,
    pub(super) handle: Arc<AttemptHandle>,
    pub(super) state: AttemptState,
    pub(super) batch: EventBatch,
}

impl Driver<'_> {
    /// Drives the attempt until it is recorded or fenced. `started` is announced first.
    pub(super) async fn run(mut self, started: Option<Event>, mut work: Work) -> AttemptResult {
        let mut publishing = match started {
            Some(started) => self.announce(started),
            None => Fuse::terminated(),
        };
        let mut reserving: Reserving = Fuse::terminated();
        let mut reserved_space = Reservation::default();
        let mut last: Option<FinalEvent> = None;
        loop {
            let event = self.next_event(&mut work, &mut publishing, &mut reserving).await;
            let event = match event {
                // Nothing is published after the lease is lost.
                _ if self.handle.is_fenced() => AttemptEvent::Fenced,
                Happened::Event(event) => event,
                Happened::Reserved(space) => {
                    reserved_space = space;
                    AttemptEvent::Reserved
                }
            };
            let mut effects = self.state.step(event, Instant::now());
            if effects.stop_handler {
                work.abort();
            }
            if let Some(bytes) = effects.reserve {
                let mut reserve = self.reserve(bytes);
                match (&mut reserve).now_or_never() {
                    // Reserved without waiting, so that the final event is part of the last batch.
                    Some(space) => {
                        reserved_space = space;
                        effects = self.state.step(AttemptEvent::Reserved, Instant::now());
                    }
                    None => reserving = reserve,
                }
            }
            let mut source = ReportedBatch::default();
            match effects.next {
                Next::Wait => continue,
                Next::Fenced => {
                    self.reports.close();
                    drop(self.reports.take_batch());
                    return AttemptResult::Fenced;
                }
                Next::Recorded => {
                    let Some(FinalEvent { kind, retry_at }) = last else {
                        return AttemptResult::Fenced;
                    };
                    return AttemptResult::Recorded(kind, retry_at, self.handle.cancel_reason());
                }
                Next::PublishReports => self.add_reports(&mut source),
                Next::PublishFinal(outcome) => {
                    self.add_reports(&mut source);
                    // Later reports are discarded.
                    self.reports.close();
                    self.handle.mark_finishing();
                    self.add_reports(&mut source);
                    source.reserve(std::mem::take(&mut reserved_space));
                    last = Some(self.add_final_event(outcome));
                }
            }
            if let Some(batch) = self.batch.take() {
                publishing = self.publish(batch, source);
            }
        }
    }

    /// Waits for the next event of the attempt.
    async fn next_event(
        &self,
        work: &mut Work,
        publishing: &mut Publishing,
        reserving: &mut Reserving,
    ) -> Happened {
        let state = &self.state;
        let is_running = state.is_handler_running();
        let timer = |at: Option<Instant>| OptionFuture::from(at.map(sleep_until));
        let event = tokio::select! {
            biased;
            () = self.handle.fenced() => AttemptEvent::Fenced,
            published = &mut *publishing, if !publishing.is_terminated() => self.published(published),
            ended = &mut *work, if is_running => {
                let outcome = match ended {
                    Ok(ended) => self.check(ended),
                    Err(error) if error.is_cancelled() => Outcome::Released(RequestError::new(
                        ErrorCode::Unavailable,
                        "the processor is shutting down",
                    )),
                    Err(panic) => Outcome::Failed(panicked(&panic)),
                };
                AttemptEvent::HandlerEnded(outcome)
            }
            space = &mut *reserving, if !reserving.is_terminated() => return Happened::Reserved(space),
            Some(()) = timer(state.time_limit()) => AttemptEvent::TimeLimitPassed,
            Some(()) = timer(state.heartbeat_deadline(self.reports.last_activity())) => {
                AttemptEvent::HeartbeatDue(self.reports.last_activity())
            }
            reason = self.handle.released(), if is_running => AttemptEvent::Released(reason),
            () = self.handle.cancellation.cancelled(), if state.may_be_cancelled() => {
                AttemptEvent::CancellationRequested
            }
            Some(()) = timer(state.grace_period_end()) => AttemptEvent::GracePeriodPassed,
            () = self.reports.filled(), if is_running && !state.is_publishing() => {
                AttemptEvent::Reported
            }
        };
        Happened::Event(event)
    }

    /// Applies the response of the log to a batch.
    fn published(&self, published: Result<Option<String>, Status>) -> AttemptEvent {
        match published {
            Ok(cancel_reason) => {
                // The final event of an attempt is not a report from its handler.
                let final_events = i64::from(self.state.is_finishing());
                self.reports.set_durable(self.batch.event_count() - final_events);
                if let Some(reason) = cancel_reason {
                    self.handle.cancel(&reason);
                }
                AttemptEvent::Published
            }
            Err(status) => {
                tracing::info!(uid = %self.uid, attempt = self.number.as_u32(), %status, "attempt fenced");
                self.handle.fence();
                AttemptEvent::Rejected
            }
        }
    }

    /// Reserves buffer space for the result.
    fn reserve(&self, bytes: usize) -> Reserving {
        let reports = self.reports.clone();
        async move { reports.reserve(bytes).await }.boxed().fuse()
    }

    /// Announces the `started` event, which the claim has already stored.
    fn announce(&mut self, started: Event) -> Publishing {
        self.state.publishing();
        let (log, uid) = (self.environment.log.clone(), self.uid);
        let announced = async move {
            log.announce(uid, vec![started]).await;
            Ok(None)
        };
        announced.boxed().fuse()
    }

    /// Publishes a batch until it is stored or the attempt is fenced.
    fn publish(&mut self, batch: PublishRequest, source: ReportedBatch) -> Publishing {
        self.state.publishing();
        let log = self.environment.log.clone();
        let (uid, tenant) = (self.uid, self.tenant.clone());
        async move { log.publish(uid, &tenant, batch, source).await }.boxed().fuse()
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

    /// Adds pending reports to the batch.
    fn add_reports(&mut self, source: &mut ReportedBatch) {
        let mut taken = self.reports.take_batch();
        let reports = std::mem::take(&mut taken.reports);
        source.add(taken);
        self.batch.add_reports(reports);
    }

    fn add_final_event(&mut self, outcome: Outcome) -> FinalEvent {
        let summary = AttemptSummary {
            attempt: self.number,
            failed_attempts: self.failed_attempts,
            attempt_seq: self.attempt_seq,
            output: self.batch.digest(),
            cancel_reason: self.handle.cancel_reason(),
            policy: self.spec.retry,
            close_by: self.close_by,
            now: self.environment.clock.now(),
            random: backoff::random_fraction(),
        };
        let event = final_event(outcome, &summary);
        self.batch.add_final(&event);
        event
    }
}

/// Event of an attempt, or the buffer space that the driver keeps for it.
enum Happened {
    Event(AttemptEvent),
    Reserved(Reservation),
}

fn panicked(error: &tokio::task::JoinError) -> RequestError {
    let error = validate::logged_text(&error.to_string());
    tracing::error!(error, "handler panicked");
    let error = RequestError::new(ErrorCode::ProcessingFailed, "the handler panicked");
    RequestError { retryable: true, ..error }
}
