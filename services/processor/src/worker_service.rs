//! `streamer.processor.v1.WorkerService`: the conversation with workers.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures_util::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use streamer_auth::{Authenticator, Caller};
use streamer_core::{Clock, ErrorCode, RequestError, Timestamp, Uid, Violations, limits, validate};
use streamer_proto::{
    processor::v1::{
        Acknowledgment, Attempt, Capacity, Heartbeat, HeartbeatReply, Report, Revoke, TokenStatus,
        Welcome, WorkRequest, WorkResponse, report, work_request, work_response::Message,
        worker_service_server::WorkerService,
    },
    timestamp,
};
use streamer_rpc::{payload_bytes, status, store_status, validation_status};
use streamer_store::StoreError;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    ProcessorOptions,
    actions::{Actions, RememberError},
    dispatcher::Dispatcher,
    grants::Grants,
    hello, mailbox,
    schema_checks::SchemaChecks,
    session_secret::SessionSecret,
    worker::{StreamEnd, Worker},
};

/// Messages that wait for a worker at most.
const OUTBOX: usize = 4096;
/// How long the first message may take.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Slots of one worker at most.
pub(crate) const MAX_SLOTS: i64 = 10_000;
/// Attempts that a worker brings along at most: as many as it has slots, running or ended.
const MAX_ATTEMPTS: usize = 20_000;
/// Revocations in one reply at most: replies wait in memory for a worker that does not read.
const MAX_REVOKED: usize = 64;
/// Attempts that are adopted at once.
const ADOPTIONS: usize = 64;

/// Serves workers.
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
            return Err(refusal(ErrorCode::Unauthorized, "a token is required".into()));
        };
        let mut inbound = request.into_inner();
        let first = timeout(HELLO_TIMEOUT, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("hello did not come in time"))??;
        let Some(work_request::Message::Hello(hello)) = first.and_then(|first| first.message)
        else {
            return Err(broken("message", "the first one must be hello"));
        };
        let secret = hello::secret_of(&hello)?;
        let worker = hello::introduce(&hello, &secret, &caller, &self.shared.actions)?;
        let tenant = &caller.principal.tenant;
        self.shared.schema_checks.check(tenant, &hello.actions).await?;
        let kept = self.shared.dispatcher.remember_actions(&worker).await;
        kept.map_err(|error| remember_status(&error))?;
        self.shared.check_open()?;
        if hello.session_secret.is_empty() {
            self.shared.actions.workers.supersede(&worker);
        }
        let worker = self.shared.actions.workers.enter(worker);
        // From here on it gets no tasks, so that none is missed below.
        worker.detach();
        let resumed = self.shared.resume(&worker, &hello.attempts).await?;
        if let Err(stopping) = self.shared.check_open() {
            self.shared.dispatcher.leave_to(&worker);
            return Err(stopping);
        }
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        for message in self.shared.greeting(&secret, resumed, &caller) {
            // There is room for these.
            drop(outbox.try_send(Ok(WorkResponse { message: Some(message) })));
        }
        let (stream, end) = self.shared.actions.workers.connect(&worker, outbox.clone());
        for task in worker.tasks() {
            // What became durable in between was acknowledged to nobody.
            worker.send(Message::Acknowledgment(task.acknowledgment(false)));
        }
        tracing::info!(worker = worker.id, hello.sdk, hello.version, "a worker came");
        let mut conversation =
            Conversation { shared: self.shared.clone(), worker, caller, inbound };
        tokio::spawn(async move {
            let ending = conversation.run(&end).await;
            conversation.worker.disconnect(stream);
            conversation.shared.actions.workers.changed();
            tracing::info!(worker = conversation.worker.id, ?ending, "a worker's stream ended");
            if let Err(status) = ending {
                // The worker may be gone already.
                drop(outbox.try_send(Err(status)));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

impl Shared {
    /// Goes on with the attempts that the worker says it has, and gives up those it does not name.
    async fn resume(
        &self,
        worker: &Arc<Worker>,
        attempts: &[Attempt],
    ) -> Result<Vec<Acknowledgment>, Status> {
        if attempts.len() > MAX_ATTEMPTS {
            let rule = format!("must have at most {MAX_ATTEMPTS} entries, has {}", attempts.len());
            return Err(broken("hello.attempts", &rule));
        }
        let named: HashSet<(Uid, u32)> = attempts
            .iter()
            .map(|attempt| identity(&attempt.uid, attempt.attempt))
            .collect::<Result<_, _>>()?;
        for task in worker.tasks() {
            if !named.contains(&(task.uid, task.attempt)) {
                task.forgotten("the worker came back without the attempt");
            }
        }
        let resuming = named.into_iter().map(|(uid, number)| async move {
            worker.seen();
            match worker.task(uid, number) {
                Some(task) => {
                    task.restart();
                    Ok(Some(task))
                }
                None => self.dispatcher.adopt(worker, uid, number).await,
            }
        });
        let resumed = stream::iter(resuming).buffer_unordered(ADOPTIONS);
        let tasks: Vec<_> =
            resumed.try_collect().await.map_err(|error: StoreError| store_status(&error))?;
        Ok(tasks.into_iter().flatten().map(|task| task.acknowledgment(false)).collect())
    }

    /// Whether workers may still come.
    fn check_open(&self) -> Result<(), Status> {
        if self.dispatcher.is_stopping() {
            return Err(refusal(ErrorCode::Unavailable, "the processor stops".into()));
        }
        Ok(())
    }

    fn greeting(
        &self,
        secret: &SessionSecret,
        resumed: Vec<Acknowledgment>,
        caller: &Caller,
    ) -> [Message; 2] {
        let limits = &self.options.limits;
        let number = |size: usize| i64::try_from(size).unwrap_or(i64::MAX);
        let millis =
            |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).max(1);
        let welcome = Welcome {
            processor: self.name.clone(),
            heartbeat_ms: millis(self.heartbeat()),
            lease_ms: millis(self.options.lease),
            max_payload_bytes: number(limits.max_result_bytes()),
            max_output_chunk_bytes: number(limits.max_output_chunk_bytes),
            max_unacknowledged: i32::try_from(mailbox::MAX_REPORTS).unwrap_or(i32::MAX),
            max_unacknowledged_bytes: number(mailbox::MAX_BYTES),
            resumed,
            session_secret: secret.to_bytes(),
        };
        [Message::Welcome(welcome), token_status(caller, self.clock.now())]
    }

    fn heartbeat(&self) -> Duration {
        self.options.lease / 3
    }
}

/// One stream of one worker.
struct Conversation {
    shared: Arc<Shared>,
    worker: Arc<Worker>,
    caller: Caller,
    inbound: Streaming<WorkRequest>,
}

impl Conversation {
    /// Goes on until the worker ends it, or breaks a rule, or another stream takes its place.
    async fn run(&mut self, end: &StreamEnd) -> Result<(), Status> {
        loop {
            let accepted_until = self.shared.authenticator.accepted_until(&self.caller);
            let left = accepted_until.since(self.shared.clock.now());
            tokio::select! {
                biased;
                status = end.ended() => return Err(status),
                () = sleep_until(Instant::now() + left) => {
                    return Err(refusal(ErrorCode::Unauthorized, "the token has expired".into()));
                }
                message = self.inbound.message() => match message? {
                    Some(message) => self.hear(message, end).await?,
                    None => return Ok(()),
                }
            }
        }
    }

    async fn hear(&mut self, request: WorkRequest, end: &StreamEnd) -> Result<(), Status> {
        if self.worker.seen() {
            tracing::info!(worker = self.worker.id, "a silent worker is heard of again");
            self.shared.actions.workers.changed();
        }
        match request.message {
            Some(work_request::Message::Report(report)) => self.report(report, end),
            Some(work_request::Message::Heartbeat(heartbeat)) => self.heartbeat(&heartbeat),
            Some(work_request::Message::Capacity(capacity)) => self.capacity(&capacity),
            Some(work_request::Message::RefreshToken(refresh)) => {
                self.refresh_token(&refresh.token, end).await
            }
            Some(work_request::Message::Hello(_)) => Err(broken("hello", "comes once, first")),
            None => Err(broken("message", "is required, or of a kind that is not known here")),
        }
    }

    fn report(&self, mut report: Report, end: &StreamEnd) -> Result<(), Status> {
        let (uid, attempt) = identity(&report.uid, report.attempt)?;
        let Some(kind) = report.kind.take() else {
            return Err(broken("report.kind", "is required"));
        };
        self.check_sizes(&kind)?;
        match self.worker.task(uid, attempt) {
            Some(task) => task.deliver(&report, kind, || end.is_over()),
            None => {
                self.worker.send(Message::Revoke(not_yours(report.uid, report.attempt)));
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
            // A result that is too large fails its request, not its worker.
            report::Kind::Result(_) | report::Kind::Error(_) | report::Kind::KeepAlive(_) => {
                return Ok(());
            }
        };
        if size <= limit {
            return Ok(());
        }
        Err(broken(
            &format!("report.{field}"),
            &format!("must be at most {limit} bytes, is {size}"),
        ))
    }

    fn heartbeat(&self, heartbeat: &Heartbeat) -> Result<(), Status> {
        if heartbeat.attempts.len() > MAX_ATTEMPTS {
            let count = heartbeat.attempts.len();
            let rule = format!("must have at most {MAX_ATTEMPTS} entries, has {count}");
            return Err(broken("heartbeat.attempts", &rule));
        }
        let mut reply = HeartbeatReply::default();
        let mut named = HashSet::with_capacity(heartbeat.attempts.len());
        for attempt in &heartbeat.attempts {
            let (uid, number) = identity(&attempt.uid, attempt.attempt)?;
            if !named.insert((uid, number)) {
                continue;
            }
            match self.worker.task(uid, number) {
                Some(task) => reply.cancelled.extend(task.cancel()),
                // The next heartbeat names the others again.
                None if reply.revoked.len() >= MAX_REVOKED => {}
                None => reply.revoked.push(not_yours(attempt.uid.clone(), attempt.attempt)),
            }
        }
        for task in self.worker.tasks() {
            if !named.contains(&(task.uid, task.attempt))
                && task.should_be_named(self.shared.heartbeat() * 2)
            {
                task.forgotten("the worker no longer runs the attempt");
            }
        }
        self.worker.send(Message::HeartbeatReply(reply));
        Ok(())
    }

    fn capacity(&self, capacity: &Capacity) -> Result<(), Status> {
        let slots = i64::from(capacity.slots);
        if let Err(rule) = validate::in_range(slots, 0, MAX_SLOTS, "") {
            return Err(broken("capacity.slots", &rule));
        }
        self.worker.set_slots(u32::try_from(capacity.slots).unwrap_or(0));
        self.shared.actions.workers.changed();
        Ok(())
    }

    async fn refresh_token(&mut self, token: &str, end: &StreamEnd) -> Result<(), Status> {
        let fresh = self.shared.authenticator.authenticate(token).await;
        let fresh = fresh.map_err(|error| refusal(error.code(), error.to_string()))?;
        let same = |of: &Caller| (of.principal.tenant.clone(), of.principal.user.clone());
        if same(&fresh) != same(&self.caller) {
            let rule = "must be for the same tenant and user";
            return Err(broken("refresh_token.token", rule));
        }
        if end.is_over() {
            // A newer stream has a token of its own.
            return Ok(());
        }
        self.worker.set_grants(Grants::of(&fresh.principal));
        self.shared.actions.workers.changed();
        self.caller = fresh;
        let now = self.shared.clock.now();
        self.worker.send(token_status(&self.caller, now));
        Ok(())
    }
}

fn remember_status(error: &RememberError) -> Status {
    match error {
        RememberError::Store(error) => store_status(error),
        RememberError::TooMuch(_) => refusal(ErrorCode::RateLimited, error.to_string()),
    }
}

fn token_status(caller: &Caller, now: Timestamp) -> Message {
    let expires_at = caller.principal.expires_at;
    let left = i64::try_from(expires_at.since(now).as_millis()).unwrap_or(i64::MAX);
    let expire_time = Some(timestamp(expires_at.as_millis()));
    Message::TokenStatus(TokenStatus { expire_time, time_left_ms: left.max(1) })
}

fn not_yours(uid: String, attempt: i32) -> Revoke {
    let reason = "the attempt is not this worker's: its lease ran out, it has ended, or it was \
                  never given here";
    Revoke { uid, attempt, reason: reason.into() }
}

fn identity(uid: &str, attempt: i32) -> Result<(Uid, u32), Status> {
    let uid = uid.parse().map_err(|_| broken("uid", "must be a ULID of 26 characters"))?;
    match u32::try_from(attempt) {
        Ok(attempt) if attempt > 0 => Ok((uid, attempt)),
        _ => Err(broken("attempt", &format!("must be at least 1, is {attempt}"))),
    }
}

pub(crate) fn broken(field: &str, rule: &str) -> Status {
    let mut violations = Violations::default();
    violations.push(field, rule);
    validation_status(&violations)
}

pub(crate) fn refusal(code: ErrorCode, message: String) -> Status {
    status(&RequestError::new(code, message))
}
