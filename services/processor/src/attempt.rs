//! One attempt: runs the handler and brings what it reports into the log, in order, in batches.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{Fuse, FusedFuture, OptionFuture},
};
use parking_lot::Mutex;
use streamer_core::{
    Clock, ErrorCode, Limits, OutputDigest, RequestError, RetryPolicy, Timestamp, Uid, retry,
};
use streamer_handler::{
    AttemptInfo, Context, DynHandler, HandlerError, Report, ReportQueue, RequestHistory,
};
use streamer_proto::{
    common::v1::{Event, Output, Payload, Progress, event::Kind, payload::Body},
    internal::v1::PublishRequest,
    timestamp,
};
use streamer_rpc::json_payload;
use streamer_store::Claimed;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Code, Status};

use crate::{
    log_client::LogClient,
    outcome::{Ended, Outcome, conclude, event},
};

/// First wait after a publish call that failed; doubled up to [`MAX_PUBLISH_BACKOFF`].
const PUBLISH_BACKOFF: Duration = Duration::from_millis(20);
const MAX_PUBLISH_BACKOFF: Duration = Duration::from_secs(1);

/// How others reach a running attempt.
#[derive(Default)]
pub(crate) struct AttemptHandle {
    /// Tells the handler that cancellation was asked for.
    pub(crate) cancellation: CancellationToken,
    cancel_reason: Mutex<Option<String>>,
    /// The attempt is another's now.
    lost: AtomicBool,
    lost_signal: CancellationToken,
}

impl AttemptHandle {
    /// Cancellation was asked for; the first reason stays.
    pub(crate) fn cancel(&self, reason: &str) {
        self.cancel_reason.lock().get_or_insert_with(|| reason.to_owned());
        self.cancellation.cancel();
    }

    /// The lease is gone: whatever this attempt would still write is refused.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
        self.lost_signal.cancel();
        self.cancellation.cancel();
    }

    fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }
}

/// What an attempt runs with.
pub(crate) struct Environment {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) log: LogClient,
    pub(crate) history: Arc<dyn RequestHistory>,
    pub(crate) limits: Limits,
    pub(crate) cancel_grace: Duration,
}

/// How an attempt left the stage.
pub(crate) enum Finished {
    /// With this last event; another attempt is due at the given time when it is `retrying`.
    Concluded(Kind, Option<Timestamp>),
    /// It was taken over.
    Lost,
}

/// Runs a claimed attempt to its end.
pub(crate) async fn run(
    environment: &Environment,
    claimed: Claimed,
    handler: Arc<dyn DynHandler>,
    policy: RetryPolicy,
    start_to_close: Option<Duration>,
    handle: Arc<AttemptHandle>,
) -> Finished {
    let record = &claimed.record;
    let reports = Arc::new(ReportQueue::default());
    let context = Context::new(
        AttemptInfo {
            uid: record.uid,
            request_id: record.request_id(),
            tenant: record.owner.tenant.clone(),
            user: record.owner.user.clone(),
            action: record.action.clone(),
            attempt: record.attempt,
            checkpoint: claimed.checkpoint.clone(),
            trace_parent: record.trace_parent.clone(),
        },
        reports.clone(),
        handle.cancellation.clone(),
        environment.limits,
        Some(environment.history.clone()),
    );
    let payload = claimed.payload.data.clone();
    // A task of its own: a handler that computes without a pause does not hold up its reports, and
    // one that panics fails alone.
    let work =
        AbortOnDropHandle::new(tokio::spawn(async move { handler.run(&context, payload).await }));
    let attempt = Attempt {
        environment,
        uid: record.uid,
        number: record.attempt,
        attempt_seq: record.attempt_seq,
        next_seq: record.last_seq + 1,
        digest: OutputDigest::default(),
        reports,
        handle,
        policy,
        deadline: start_to_close.map(|limit| Instant::now() + limit),
    };
    attempt.drive(claimed.started, work).await
}

type Work = AbortOnDropHandle<Result<bytes::Bytes, HandlerError>>;
type Sending = Fuse<Pin<Box<dyn Future<Output = Result<Option<String>, Status>> + Send>>>;

struct Attempt<'a> {
    environment: &'a Environment,
    uid: Uid,
    number: u32,
    attempt_seq: i64,
    next_seq: i64,
    digest: OutputDigest,
    reports: Arc<ReportQueue>,
    handle: Arc<AttemptHandle>,
    policy: RetryPolicy,
    deadline: Option<Instant>,
}

impl Attempt<'_> {
    async fn drive(mut self, started: Event, mut work: Work) -> Finished {
        let mut sending = self.announce(started);
        let mut working = true;
        let mut outcome = None;
        let mut last = None;
        let mut cut_off: Option<Instant> = None;
        loop {
            let deadline = OptionFuture::from(self.deadline.map(sleep_until));
            let grace = OptionFuture::from(cut_off.map(sleep_until));
            tokio::select! {
                biased;
                () = self.handle.lost_signal.cancelled() => {}
                sent = &mut sending, if !sending.is_terminated() => match sent {
                    Ok(Some(reason)) => self.handle.cancel(&reason),
                    Ok(None) => {}
                    Err(status) => {
                        tracing::info!(uid = %self.uid, attempt = self.number, %status, "lost an attempt");
                        self.handle.lose();
                    }
                },
                ended = &mut work, if working => {
                    working = false;
                    outcome = Some(match ended {
                        Ok(ended) => self.check(ended),
                        Err(panic) => Outcome::Failed(panicked(&panic)),
                    });
                }
                Some(()) = deadline, if working => {
                    working = false;
                    work.abort();
                    outcome = Some(Outcome::Failed(RequestError::new(
                        ErrorCode::Timeout,
                        "the attempt took longer than its start-to-close timeout",
                    )));
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
                return Finished::Lost;
            }
            if !sending.is_terminated() {
                continue;
            }
            if let Some((kind, retry_at)) = last.take() {
                return Finished::Concluded(kind, retry_at);
            }
            let mut batch = self.take_reports();
            if let Some(outcome) = outcome.take() {
                // Nothing that is reported from here on counts.
                self.reports.close();
                self.add_reports(&mut batch);
                last = Some(self.add_ending(&mut batch, outcome));
            }
            if !batch.events.is_empty() || batch.checkpoint.is_some() {
                sending = self.publish(batch);
            }
        }
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
    fn check(&self, ended: Result<bytes::Bytes, HandlerError>) -> Outcome {
        let limit = self.environment.limits.max_payload_bytes;
        match ended {
            Ok(result) if result.len() > limit => Outcome::Failed(RequestError::new(
                ErrorCode::ProcessingFailed,
                format!(
                    "the result must be at most {limit} bytes (limits.max_payload_bytes), is {}",
                    result.len()
                ),
            )),
            Ok(result) => Outcome::Succeeded(result),
            Err(error) => Outcome::Failed(error.into_request_error()),
        }
    }

    fn take_reports(&mut self) -> PublishRequest {
        let mut batch = PublishRequest {
            uid: self.uid.to_bytes().to_vec().into(),
            attempt: i32::try_from(self.number).unwrap_or(i32::MAX),
            events: Vec::new(),
            checkpoint: None,
            retry_at: None,
        };
        self.add_reports(&mut batch);
        batch
    }

    fn add_reports(&mut self, batch: &mut PublishRequest) {
        for report in self.reports.take() {
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
            };
            batch.events.push(self.next_event(kind));
        }
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
            cancel_reason: self.handle.cancel_reason.lock().clone(),
            policy: self.policy,
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
    fn publish(&self, batch: PublishRequest) -> Sending {
        let log = self.environment.log.clone();
        let uid = self.uid;
        let publishing = async move {
            let mut wait = PUBLISH_BACKOFF;
            loop {
                match log.publish(batch.clone()).await {
                    Ok(cancel_reason) => return Ok(cancel_reason),
                    Err(status) if status.code() == Code::Aborted => return Err(status),
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

fn panicked(error: &tokio::task::JoinError) -> RequestError {
    tracing::error!(%error, "a handler panicked");
    let error = RequestError::new(ErrorCode::ProcessingFailed, "the handler panicked");
    RequestError { retryable: true, ..error }
}
