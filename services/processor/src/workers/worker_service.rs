//! Implementation of `streamer.processor.v1.WorkerService`, the stream protocol of workers.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures_util::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use streamer_auth::{Authenticator, Caller};
use streamer_core::{AttemptNumber, Clock, ErrorCode, Timestamp, Uid, limits, saturate, validate};
use streamer_proto::{
    processor::v1::{
        Acknowledgment, Attempt, Capacity, Heartbeat, HeartbeatReply, Report, Revoke, TokenStatus,
        Welcome, WorkRequest, WorkResponse, report, work_request, work_response::Message,
        worker_service_server::WorkerService,
    },
    timestamp,
};
use streamer_rpc::{code_name, error_status, payload_bytes, store_status, violation_status};
use streamer_store::StoreError;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    actions::{Actions, SaveDeclarationsError},
    dispatcher::Dispatcher,
    options::ProcessorOptions,
    workers::{
        grants::Grants,
        hello, report_buffer,
        schema_checks::SchemaChecks,
        session_secret::SessionSecret,
        worker_session::{MAX_SLOTS, StreamEnd, WorkerSession},
    },
};

/// Maximum number of messages queued for a worker.
const OUTBOUND_CAPACITY: usize = 4096;
/// Timeout for the arrival of `hello`, the first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of attempts that a worker may list: one running and one finished attempt per slot.
const MAX_ATTEMPTS: usize = 20_000;
/// Maximum number of revocations in one heartbeat reply, because replies stay in memory until the worker reads them.
const MAX_REVOKED: usize = 64;
/// Maximum number of attempts of one worker that are resumed concurrently.
const MAX_CONCURRENT_RESUMES: usize = 64;

/// Worker API of the processor.
pub struct WorkerApi {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    dispatcher: Arc<Dispatcher>,
    actions: Arc<Actions>,
    authenticator: Arc<Authenticator>,
    clock: Arc<dyn Clock>,
    options: ProcessorOptions,
    schema_checks: SchemaChecks,
}

impl WorkerApi {
    pub(crate) fn new(
        name: String,
        dispatcher: Arc<Dispatcher>,
        actions: Arc<Actions>,
        authenticator: Arc<Authenticator>,
        clock: Arc<dyn Clock>,
        options: ProcessorOptions,
    ) -> Self {
        let schema_checks = SchemaChecks::default();
        let shared =
            Shared { name, dispatcher, actions, authenticator, clock, options, schema_checks };
        Self { shared: Arc::new(shared) }
    }
}

#[tonic::async_trait]
impl WorkerService for WorkerApi {
    type WorkStream = BoxStream<'static, Result<WorkResponse, Status>>;

    async fn work(
        &self,
        request: Request<Streaming<WorkRequest>>,
    ) -> Result<Response<Self::WorkStream>, Status> {
        let Some(caller) = request.extensions().get::<Caller>().cloned() else {
            return Err(error_status(ErrorCode::Unauthorized, "a token is required"));
        };
        let mut inbound = request.into_inner();
        let first = timeout(HELLO_TIMEOUT, inbound.message()).await.map_err(|_| {
            Status::deadline_exceeded(format!("hello did not arrive within {HELLO_TIMEOUT:?}"))
        })??;
        let Some(work_request::Message::Hello(hello)) = first.and_then(|first| first.message)
        else {
            return Err(violation_status("message", "must be `hello` in the first message"));
        };
        let secret = hello::session_secret(&hello)?;
        let worker = hello::validate_hello(&hello, &secret, &caller, &self.shared.actions)?;
        let tenant = &caller.principal.tenant;
        self.shared.schema_checks.check(tenant, &hello.actions).await?;
        let saved = self.shared.dispatcher.save_declarations(&worker).await;
        saved.map_err(|error| save_status(&error))?;
        self.shared.check_accepting()?;
        if hello.session_secret.is_empty() {
            self.shared.actions.workers.supersede(&worker);
        }
        let worker = self.shared.actions.workers.register(worker);
        // Without a stream the worker receives no tasks while its attempts are resumed, so that none is missed.
        worker.detach();
        let resumed = self.shared.resume(&worker, &hello.attempts).await?;
        if let Err(stopping) = self.shared.check_accepting() {
            self.shared.dispatcher.detach_attempts_of(&worker);
            return Err(stopping);
        }
        let (outbox, outgoing) = mpsc::channel(OUTBOUND_CAPACITY);
        for message in self.shared.welcome_messages(&secret, resumed, &caller) {
            // The channel is empty and has capacity.
            drop(outbox.try_send(Ok(WorkResponse { message: Some(message) })));
        }
        let (stream_number, end) = self.shared.actions.workers.connect(&worker, outbox.clone());
        for task in worker.tasks() {
            // Acknowledge reports that became durable while the worker had no stream.
            worker.send(Message::Acknowledgment(task.acknowledgment(false)));
        }
        tracing::info!(worker = worker.id, hello.sdk, hello.version, "worker connected");
        let mut worker_stream =
            WorkerStream { shared: self.shared.clone(), worker, caller, inbound };
        tokio::spawn(async move {
            let ending = worker_stream.run(&end).await;
            worker_stream.worker.disconnect(stream_number);
            worker_stream.shared.actions.workers.notify_changed();
            log_disconnected(&worker_stream.worker.id, &ending);
            if let Err(status) = ending {
                // The worker may already have disconnected.
                drop(outbox.try_send(Err(status)));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

impl Shared {
    /// Resumes the attempts that the worker lists, and revokes its other attempts as lost.
    async fn resume(
        &self,
        worker: &Arc<WorkerSession>,
        attempts: &[Attempt],
    ) -> Result<Vec<Acknowledgment>, Status> {
        if attempts.len() > MAX_ATTEMPTS {
            let rule = format!("must have at most {MAX_ATTEMPTS} entries, has {}", attempts.len());
            return Err(violation_status("hello.attempts", &rule));
        }
        let named: HashSet<(Uid, AttemptNumber)> = attempts
            .iter()
            .map(|attempt| parse_attempt(&attempt.uid, attempt.attempt))
            .collect::<Result<_, _>>()?;
        for task in worker.tasks() {
            if !named.contains(&(task.uid, task.attempt)) {
                task.lost_on_worker("the worker reconnected without the attempt");
            }
        }
        let resuming = named.into_iter().map(|(uid, number)| async move {
            worker.record_activity();
            match worker.task(uid, number) {
                Some(task) => {
                    task.restart();
                    Ok(Some(task))
                }
                None => self.dispatcher.resume_attempt(worker, uid, number).await,
            }
        });
        let resumed = stream::iter(resuming).buffer_unordered(MAX_CONCURRENT_RESUMES);
        let tasks: Vec<_> =
            resumed.try_collect().await.map_err(|error: StoreError| store_status(&error))?;
        Ok(tasks.into_iter().flatten().map(|task| task.acknowledgment(false)).collect())
    }

    /// Returns an error if the processor is shutting down.
    fn check_accepting(&self) -> Result<(), Status> {
        if self.dispatcher.is_stopping() {
            return Err(error_status(ErrorCode::Unavailable, "the processor is shutting down"));
        }
        Ok(())
    }

    fn welcome_messages(
        &self,
        secret: &SessionSecret,
        resumed: Vec<Acknowledgment>,
        caller: &Caller,
    ) -> [Message; 2] {
        let limits = &self.options.limits;
        let millis = |duration: Duration| saturate::to_millis(duration).max(1);
        let welcome = Welcome {
            processor: self.name.clone(),
            heartbeat_ms: millis(self.heartbeat()),
            lease_ms: millis(self.options.lease),
            max_payload_bytes: saturate::to_i64(limits.max_result_bytes()),
            max_output_chunk_bytes: saturate::to_i64(limits.max_output_chunk_bytes),
            max_unacknowledged: saturate::to_i32(report_buffer::MAX_REPORTS),
            max_unacknowledged_bytes: saturate::to_i64(report_buffer::MAX_BYTES),
            resumed,
            session_secret: secret.to_bytes(),
        };
        [Message::Welcome(welcome), token_status(caller, self.clock.now())]
    }

    fn heartbeat(&self) -> Duration {
        self.options.lease / 3
    }
}

/// One stream of one worker, and its context.
struct WorkerStream {
    shared: Arc<Shared>,
    worker: Arc<WorkerSession>,
    caller: Caller,
    inbound: Streaming<WorkRequest>,
}

impl WorkerStream {
    /// Handles messages until the worker ends the stream or violates the protocol, the token expires, or a newer stream
    /// replaces this one.
    async fn run(&mut self, end: &StreamEnd) -> Result<(), Status> {
        loop {
            let accepted_until = self.shared.authenticator.accepted_until(&self.caller);
            let left = accepted_until.since(self.shared.clock.now());
            tokio::select! {
                biased;
                status = end.ended() => return Err(status),
                () = sleep_until(Instant::now() + left) => {
                    return Err(error_status(ErrorCode::Unauthorized, "the token has expired"));
                }
                message = self.inbound.message() => match message? {
                    Some(message) => self.handle_message(message, end).await?,
                    None => return Ok(()),
                }
            }
        }
    }

    async fn handle_message(
        &mut self,
        request: WorkRequest,
        end: &StreamEnd,
    ) -> Result<(), Status> {
        if self.worker.record_activity() {
            tracing::info!(worker = self.worker.id, "worker recovered");
            self.shared.actions.workers.notify_changed();
        }
        match request.message {
            Some(work_request::Message::Report(report)) => self.report(report, end),
            Some(work_request::Message::Heartbeat(heartbeat)) => self.heartbeat(&heartbeat),
            Some(work_request::Message::Capacity(capacity)) => self.capacity(&capacity),
            Some(work_request::Message::RefreshToken(refresh)) => {
                self.refresh_token(&refresh.token, end).await
            }
            Some(work_request::Message::Hello(_)) => {
                Err(violation_status("hello", "is allowed only as the first message"))
            }
            None => Err(violation_status("message", "is missing or of an unknown kind")),
        }
    }

    fn report(&self, mut report: Report, end: &StreamEnd) -> Result<(), Status> {
        let (uid, attempt) = parse_attempt(&report.uid, report.attempt)?;
        let Some(kind) = report.kind.take() else {
            return Err(violation_status("report.kind", "is required"));
        };
        self.check_sizes(&kind)?;
        match self.worker.task(uid, attempt) {
            Some(task) => task.deliver(&report, kind, || end.has_ended()),
            None => {
                self.worker.send(Message::Revoke(revoke_unowned(report.uid, report.attempt)));
                Ok(())
            }
        }
    }

    fn check_sizes(&self, kind: &report::Kind) -> Result<(), Status> {
        let limits = self.shared.options.limits;
        let bytes = |payload| payload_bytes(Some(payload)).len();
        let (field, size, limit) = match kind {
            report::Kind::Output(output) => {
                ("output", bytes(output), limits.max_output_chunk_bytes)
            }
            report::Kind::Checkpoint(data) => {
                ("checkpoint", data.len(), limits::MAX_CHECKPOINT_BYTES)
            }
            report::Kind::Release(release) => {
                ("release.reason", release.reason.len(), limits::MAX_REASON_BYTES)
            }
            report::Kind::Progress(progress) => {
                ("progress.message", progress.message.len(), limits::MAX_PROGRESS_MESSAGE_BYTES)
            }
            // A result that is too large fails its request, but does not end the stream.
            report::Kind::Result(_) | report::Kind::Error(_) | report::Kind::KeepAlive(_) => {
                return Ok(());
            }
        };
        if size <= limit {
            return Ok(());
        }
        Err(violation_status(
            &format!("report.{field}"),
            &format!("must be at most {limit} bytes, is {size}"),
        ))
    }

    fn heartbeat(&self, heartbeat: &Heartbeat) -> Result<(), Status> {
        if heartbeat.attempts.len() > MAX_ATTEMPTS {
            let count = heartbeat.attempts.len();
            let rule = format!("must have at most {MAX_ATTEMPTS} entries, has {count}");
            return Err(violation_status("heartbeat.attempts", &rule));
        }
        let mut reply = HeartbeatReply::default();
        let mut named = HashSet::with_capacity(heartbeat.attempts.len());
        for attempt in &heartbeat.attempts {
            let (uid, number) = parse_attempt(&attempt.uid, attempt.attempt)?;
            if !named.insert((uid, number)) {
                continue;
            }
            match self.worker.task(uid, number) {
                Some(task) => reply.cancelled.extend(task.cancel()),
                // The next heartbeat lists the remaining attempts again.
                None if reply.revoked.len() >= MAX_REVOKED => {}
                None => reply.revoked.push(revoke_unowned(attempt.uid.clone(), attempt.attempt)),
            }
        }
        if self.worker.tasks().iter().any(|task| task.ignores_resend(self.shared.options.lease)) {
            let reason = "the worker did not resend a report requested with `resend`";
            return Err(error_status(ErrorCode::Unavailable, reason));
        }
        for task in self.worker.tasks() {
            if !named.contains(&(task.uid, task.attempt))
                && task.past_heartbeat_grace(self.shared.heartbeat() * 2)
            {
                task.lost_on_worker("the worker no longer runs the attempt");
            }
        }
        self.worker.send(Message::HeartbeatReply(reply));
        Ok(())
    }

    fn capacity(&self, capacity: &Capacity) -> Result<(), Status> {
        let slots = i64::from(capacity.slots);
        if let Err(rule) = validate::in_range(slots, 0, MAX_SLOTS, "") {
            return Err(violation_status("capacity.slots", &rule));
        }
        self.worker.set_slots(capacity.slots.unsigned_abs());
        self.shared.actions.workers.notify_changed();
        Ok(())
    }

    async fn refresh_token(&mut self, token: &str, end: &StreamEnd) -> Result<(), Status> {
        let fresh = self.shared.authenticator.authenticate(token).await;
        let fresh = fresh.map_err(|error| error_status(error.code(), error.to_string()))?;
        let same = |of: &Caller| (of.principal.tenant.clone(), of.principal.user.clone());
        if same(&fresh) != same(&self.caller) {
            let rule = "must be for the same tenant and user";
            return Err(violation_status("refresh_token.token", rule));
        }
        if end.has_ended() {
            // A newer stream has its own token.
            return Ok(());
        }
        self.worker.set_grants(Grants::from_principal(&fresh.principal));
        self.shared.actions.workers.notify_changed();
        self.caller = fresh;
        let now = self.shared.clock.now();
        self.worker.send(token_status(&self.caller, now));
        Ok(())
    }
}

fn log_disconnected(worker: &str, ending: &Result<(), Status>) {
    let error = ending.as_ref().err();
    let code = error.map(|status| code_name(status.code()));
    // The message may contain text of the worker.
    let reason = error.map(|status| validate::logged_text(status.message()));
    tracing::info!(worker, code, reason, "worker disconnected");
}

fn save_status(error: &SaveDeclarationsError) -> Status {
    match error {
        SaveDeclarationsError::Store(error) => store_status(error),
        SaveDeclarationsError::TooMany(_) => {
            error_status(ErrorCode::RateLimited, error.to_string())
        }
    }
}

fn token_status(caller: &Caller, now: Timestamp) -> Message {
    let expires_at = caller.principal.expires_at;
    let left = saturate::to_millis(expires_at.since(now));
    let expire_time = Some(timestamp(expires_at.as_millis()));
    Message::TokenStatus(TokenStatus { expire_time, time_left_ms: left.max(1) })
}

fn revoke_unowned(uid: String, attempt: i32) -> Revoke {
    let reason = "the attempt does not belong to this worker: its lease expired, it has ended, or it \
                  was never assigned to this worker";
    Revoke { uid, attempt, reason: reason.into() }
}

fn parse_attempt(uid: &str, attempt: i32) -> Result<(Uid, AttemptNumber), Status> {
    let uid =
        uid.parse().map_err(|_| violation_status("uid", "must be a ULID of 26 characters"))?;
    match AttemptNumber::from_i32(attempt) {
        Ok(number) if number >= AttemptNumber::FIRST => Ok((uid, number)),
        _ => Err(violation_status("attempt", &format!("must be at least 1, is {attempt}"))),
    }
}
