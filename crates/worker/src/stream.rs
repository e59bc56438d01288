//! Stream of a worker (`WorkerService.Work`), from `hello` to its end.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, OptionFuture};
use http::HeaderValue;
use streamer_core::{Clock, Limits, SystemClock, Timestamp, Uid, saturate};
use streamer_handler::Handlers;
use streamer_proto::{
    common::v1::Action,
    millis,
    processor::v1::{
        Capacity, Heartbeat, Hello, RefreshToken, Report, TokenStatus, Welcome, WorkRequest,
        WorkResponse, report, work_request, work_response,
        worker_service_client::WorkerServiceClient,
    },
};
use streamer_rpc::{action_to_proto, error_to_proto, with_authorization};
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{TokenError, TokenSource, WorkerError, attempts::Attempts, send_window::WindowLimits};

/// Maximum number of queued outgoing messages; while the queue is full, incoming messages are not read.
const OUTBOUND_CAPACITY: usize = 1024;
/// Timeout for the arrival of `welcome`.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// Time between the request for a new token and the expiry of the current one; at most half of the remaining time.
const REFRESH_LEAD: Duration = Duration::from_secs(60);
/// Timeout for the acknowledgments after all attempts were released.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// Fields of `hello` that are the same on every stream.
pub(crate) struct Identity {
    worker_id: String,
    /// Secret that the attempts of the worker are bound to; empty before the first `welcome`.
    secret: Bytes,
    display_name: String,
    version: String,
    slots: u32,
    actions: Vec<Action>,
}

impl Identity {
    /// Creates the identity of one run of the worker.
    pub(crate) fn new(slots: u32, version: String, handlers: &Handlers) -> Self {
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "worker".into());
        let host: String = host.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
        let actions = handlers.specs().map(|spec| {
            // The server applies its own threshold.
            action_to_proto(spec, streamer_core::action::DEFAULT_SYNC_THRESHOLD)
        });
        let random = Uid::new(SystemClock.now());
        Self {
            worker_id: format!("{host}-{random}"),
            secret: Bytes::new(),
            display_name: host,
            version,
            slots,
            actions: actions.collect(),
        }
    }

    fn hello(&self, attempts: &Attempts, stopping: bool) -> Hello {
        let slots = if stopping { 0 } else { self.slots };
        Hello {
            worker_id: self.worker_id.clone(),
            version: self.version.clone(),
            sdk: concat!("rust/", env!("CARGO_PKG_VERSION")).to_owned(),
            slots: saturate::to_i32(slots),
            actions: self.actions.clone(),
            attempts: attempts.ids(),
            session_secret: self.secret.clone(),
            display_name: self.display_name.clone(),
        }
    }
}

/// Reason why a stream ended.
pub(crate) enum StreamEnd {
    /// The worker is drained.
    Drained,
    /// The token is about to expire and cannot be refreshed; all attempts were released.
    TokenExpired,
    /// The stream failed before `welcome`.
    BeforeWelcome(Status),
    /// The stream failed after `welcome`, and before a reply to a heartbeat.
    AfterWelcome(Status),
    /// The stream failed after a reply to a heartbeat: it was healthy before.
    AfterHeartbeatReply(Status),
}

pub(crate) struct WorkStream<'a> {
    pub(crate) identity: &'a mut Identity,
    pub(crate) token: &'a dyn TokenSource,
    pub(crate) attempts: &'a mut Attempts,
    pub(crate) shutdown: &'a CancellationToken,
    /// Time at which a worker that is shutting down releases its remaining attempts; the same on every stream.
    pub(crate) drain_deadline: &'a mut Option<Instant>,
    pub(crate) drain_timeout: Duration,
}

impl WorkStream<'_> {
    pub(crate) async fn run(
        self,
        mut client: WorkerServiceClient<Channel>,
    ) -> Result<StreamEnd, WorkerError> {
        let token = self.token.token().await?;
        let authorization = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| TokenError("the token must consist of visible ASCII".into()))?;
        let (outbound, messages) = mpsc::channel(OUTBOUND_CAPACITY);
        let hello = work_request::Message::Hello(
            self.identity.hello(self.attempts, self.shutdown.is_cancelled()),
        );
        let hello = WorkRequest { message: Some(hello) };
        if outbound.send(hello).await.is_err() {
            return Ok(StreamEnd::BeforeWelcome(Status::unavailable("failed to open the stream")));
        }
        let call = with_authorization(ReceiverStream::new(messages), authorization);
        let opening = async {
            let mut inbound = client.work(call).await?.into_inner();
            match inbound.message().await?.and_then(|first| first.message) {
                Some(work_response::Message::Welcome(welcome)) => Ok((inbound, welcome)),
                _ => Err(Status::internal("the first message from the server must be welcome")),
            }
        };
        let timed_out = Err(Status::deadline_exceeded(format!(
            "the server did not send welcome within {WELCOME_TIMEOUT:?}"
        )));
        let already_drained = async {
            self.shutdown.cancelled().await;
            if !self.attempts.is_empty() {
                std::future::pending::<()>().await;
            }
        };
        let opened = tokio::select! {
            opened = timeout(WELCOME_TIMEOUT, opening) => opened.unwrap_or(timed_out),
            () = already_drained => return Ok(StreamEnd::Drained),
        };
        let (inbound, welcome) = match opened {
            Ok(opened) => opened,
            Err(status) => return Ok(StreamEnd::BeforeWelcome(status)),
        };
        tracing::info!(processor = welcome.processor, "connected");
        // An older server sends no secret.
        if !welcome.session_secret.is_empty() {
            self.identity.secret = welcome.session_secret.clone();
        }
        self.attempts.resume(&welcome.resumed);
        let heartbeat = saturate::from_millis(welcome.heartbeat_ms).max(Duration::from_millis(1));
        let mut heartbeats = interval(heartbeat);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let open = OpenStream {
            outbound: Some(outbound),
            inbound,
            limits: ServerLimits::of(&welcome),
            heartbeats,
            last_message_at: Instant::now(),
            was_silent: false,
            heartbeat_answered: false,
            refresh_at: None,
            refreshing: None,
            token_release_at: None,
            token,
            drain: Drain::Inactive,
            stream: self,
        };
        Ok(open.run().await)
    }
}

/// Limits that the server sends in `welcome`.
#[derive(Clone, Copy)]
struct ServerLimits {
    payload_limits: Limits,
    window: WindowLimits,
    lease: Duration,
}

impl ServerLimits {
    fn of(welcome: &Welcome) -> Self {
        let size = |value: i64| usize::try_from(value).unwrap_or(usize::MAX);
        Self {
            payload_limits: Limits {
                payload_option: streamer_core::limits::PAYLOAD_OPTION,
                max_payload_bytes: size(welcome.max_payload_bytes),
                max_output_chunk_bytes: size(welcome.max_output_chunk_bytes),
            },
            window: WindowLimits {
                reports: size(welcome.max_unacknowledged.into()),
                bytes: size(welcome.max_unacknowledged_bytes),
            },
            lease: saturate::from_millis(welcome.lease_ms),
        }
    }
}

/// State of the drain.
#[derive(Clone, Copy)]
enum Drain {
    Inactive,
    /// The worker accepts no tasks; running attempts may finish until the given time.
    Waiting(Instant),
    /// All attempts were released; acknowledgments may arrive until the given time.
    Released(Instant),
    /// Same as `Released`, but the reason is that the token is about to expire.
    TokenExpiring(Instant),
}

struct OpenStream<'a> {
    stream: WorkStream<'a>,
    outbound: Option<mpsc::Sender<WorkRequest>>,
    inbound: Streaming<WorkResponse>,
    limits: ServerLimits,
    heartbeats: Interval,
    /// Time at which the last message from the server arrived.
    last_message_at: Instant,
    /// Whether the server had been silent for a lease duration at the last heartbeat.
    was_silent: bool,
    /// Whether the server has replied to a heartbeat.
    heartbeat_answered: bool,
    refresh_at: Option<Instant>,
    refreshing: Option<BoxFuture<'a, Result<String, TokenError>>>,
    token: String,
    /// Time at which all attempts are released because the token cannot be refreshed.
    token_release_at: Option<Instant>,
    drain: Drain,
}

impl OpenStream<'_> {
    /// Handles events until the worker is drained or the stream is lost.
    async fn run(mut self) -> StreamEnd {
        let ended = self.run_until_drained().await;
        match ended {
            Ok(()) if matches!(self.drain, Drain::TokenExpiring(_)) => StreamEnd::TokenExpired,
            // The release was not acknowledged in time, or before the token expired.
            Err(status)
                if matches!(self.drain, Drain::TokenExpiring(_))
                    && matches!(status.code(), Code::DeadlineExceeded | Code::Unauthenticated) =>
            {
                StreamEnd::TokenExpired
            }
            Ok(()) => StreamEnd::Drained,
            Err(status) if self.heartbeat_answered => StreamEnd::AfterHeartbeatReply(status),
            Err(status) => StreamEnd::AfterWelcome(status),
        }
    }

    async fn run_until_drained(&mut self) -> Result<(), Status> {
        let left = self.stream.attempts.collect_all(self.limits.window);
        self.report(left).await?;
        loop {
            if self.is_drained() {
                return self.close().await;
            }
            let ready = self.stream.attempts.ready.clone();
            let event = {
                let refresh = OptionFuture::from(self.refresh_at.map(sleep_until));
                let refreshed = OptionFuture::from(self.refreshing.as_mut());
                let drain_due = OptionFuture::from(self.drain.until().map(sleep_until));
                let release_due = OptionFuture::from(self.token_release_at.map(sleep_until));
                tokio::select! {
                    message = self.inbound.message() => Event::Message(message?.map(Box::new)),
                    keys = ready.take() => Event::Ready(keys),
                    _ = self.heartbeats.tick() => Event::Heartbeat,
                    Some(()) = refresh => Event::Refresh,
                    Some(token) = refreshed => Event::Refreshed(token),
                    Some(()) = drain_due => Event::DrainDeadline,
                    Some(()) = release_due => Event::TokenExpiring,
                    () = self.stream.shutdown.cancelled(), if matches!(self.drain, Drain::Inactive) => {
                        Event::BeginDrain
                    }
                }
            };
            self.handle_event(event).await?;
        }
    }

    async fn handle_event(&mut self, event: Event) -> Result<(), Status> {
        match event {
            Event::Message(None) => Err(Status::unavailable("the server ended the stream")),
            Event::Message(Some(response)) => {
                self.last_message_at = Instant::now();
                self.handle_message(*response).await
            }
            Event::Ready(keys) => {
                for key in keys {
                    let reports = self.stream.attempts.collect(key, self.limits.window);
                    self.report(reports).await?;
                }
                Ok(())
            }
            Event::Heartbeat => {
                // This process may have been suspended: read pending messages before the stream is considered lost.
                let silent = self.last_message_at.elapsed() > self.limits.lease;
                if std::mem::replace(&mut self.was_silent, silent) && silent {
                    return Err(Status::unavailable(format!(
                        "no message from the server for more than {:?}",
                        self.limits.lease
                    )));
                }
                let attempts = self.stream.attempts.ids();
                self.send(work_request::Message::Heartbeat(Heartbeat { attempts })).await
            }
            Event::Refresh => {
                self.refresh_at = None;
                self.refreshing = Some(self.stream.token.token());
                Ok(())
            }
            Event::Refreshed(token) => self.refreshed(token).await,
            Event::BeginDrain => {
                tracing::info!(running = self.stream.attempts.len(), "draining");
                let timeout = self.stream.drain_timeout;
                let at =
                    *self.stream.drain_deadline.get_or_insert_with(|| Instant::now() + timeout);
                self.drain = Drain::Waiting(at);
                self.send(work_request::Message::Capacity(Capacity { slots: 0 })).await
            }
            Event::DrainDeadline => match self.drain {
                Drain::Released(_) | Drain::TokenExpiring(_) => {
                    Err(Status::deadline_exceeded(format!(
                        "the released attempts were not acknowledged within {RELEASE_TIMEOUT:?}"
                    )))
                }
                Drain::Inactive | Drain::Waiting(_) => {
                    self.drain = Drain::Released(Instant::now() + RELEASE_TIMEOUT);
                    self.release_all("the worker is shutting down").await
                }
            },
            // The worker is already shutting down.
            Event::TokenExpiring if matches!(self.drain, Drain::Released(_)) => {
                self.token_release_at = None;
                Ok(())
            }
            Event::TokenExpiring => {
                self.token_release_at = None;
                self.drain = Drain::TokenExpiring(Instant::now() + RELEASE_TIMEOUT);
                self.send(work_request::Message::Capacity(Capacity { slots: 0 })).await?;
                self.release_all("the worker's token is about to expire").await
            }
        }
    }

    async fn handle_message(&mut self, response: WorkResponse) -> Result<(), Status> {
        use work_response::Message;
        let attempts = &mut *self.stream.attempts;
        match response.message {
            Some(Message::Task(task)) => self.start(task).await,
            Some(Message::Acknowledgment(acknowledgment)) => {
                let reports = attempts.acknowledge(&acknowledgment, self.limits.window);
                self.report(reports).await
            }
            Some(Message::Resend(resend)) => {
                let reports = attempts.resend(&resend, self.limits.window);
                self.report(reports).await
            }
            Some(Message::Cancel(cancel)) => {
                attempts.cancel(&cancel.uid, cancel.attempt);
                Ok(())
            }
            Some(Message::Revoke(revoke)) => {
                attempts.revoke(&revoke);
                Ok(())
            }
            Some(Message::HeartbeatReply(reply)) => {
                self.heartbeat_answered = true;
                for cancel in &reply.cancelled {
                    attempts.cancel(&cancel.uid, cancel.attempt);
                }
                reply.revoked.iter().for_each(|revoke| attempts.revoke(revoke));
                Ok(())
            }
            Some(Message::TokenStatus(status)) => {
                self.schedule_expiry(&status);
                Ok(())
            }
            Some(Message::Drain(_)) => {
                tracing::info!("the server is shutting down; running attempts continue");
                Ok(())
            }
            Some(Message::Welcome(_)) | None => Ok(()),
        }
    }

    /// Schedules the refresh of the token or, if it cannot be refreshed, the release of all attempts before it expires.
    fn schedule_expiry(&mut self, status: &TokenStatus) {
        let Some(expires) = &status.expire_time else { return };
        let expires_at = Timestamp::from_millis(millis(expires));
        let left = match saturate::from_millis(status.time_left_ms) {
            Duration::ZERO => expires_at.since(SystemClock.now()),
            left => left,
        };
        if !self.stream.token.is_fixed() {
            self.refresh_at = Some(Instant::now() + delay_before_expiry(left, REFRESH_LEAD));
            return;
        }
        tracing::warn!(
            %expires_at,
            "the token cannot be refreshed: the worker releases its running attempts and exits before the token \
             expires; to avoid this, use a token that can be refreshed (--token-file, TokenSource)"
        );
        self.token_release_at = Some(Instant::now() + delay_before_expiry(left, RELEASE_TIMEOUT));
    }

    async fn release_all(&mut self, reason: &str) -> Result<(), Status> {
        self.stream.attempts.release_all(reason);
        let reports = self.stream.attempts.collect_all(self.limits.window);
        self.report(reports).await
    }

    async fn start(&mut self, task: streamer_proto::processor::v1::Task) -> Result<(), Status> {
        let (uid, attempt, action) = (task.uid.clone(), task.attempt, task.action.clone());
        if self.stream.attempts.start(task, self.limits.payload_limits) {
            return Ok(());
        }
        let message = format!("this worker has no handler for {action:?}");
        let error = streamer_handler::HandlerError::retryable(message).into_request_error();
        let kind = Some(report::Kind::Error(error_to_proto(&error)));
        self.report(vec![Report { uid, attempt, number: 0, kind, resends: 0 }]).await
    }

    async fn refreshed(&mut self, token: Result<String, TokenError>) -> Result<(), Status> {
        self.refreshing = None;
        match token {
            // The token cannot be refreshed; the server ends the stream when the token expires.
            Ok(token) if token == self.token => Ok(()),
            Ok(token) => {
                self.token.clone_from(&token);
                self.send(work_request::Message::RefreshToken(RefreshToken { token })).await
            }
            Err(error) => {
                let retry_in = REFRESH_LEAD / 10;
                tracing::warn!(%error, "failed to refresh the token; retrying in {retry_in:?}");
                self.refresh_at = Some(Instant::now() + retry_in);
                Ok(())
            }
        }
    }

    fn is_drained(&self) -> bool {
        !matches!(self.drain, Drain::Inactive) && self.stream.attempts.is_empty()
    }

    /// Closes the sending side, and waits until the server ends the stream.
    async fn close(&mut self) -> Result<(), Status> {
        self.outbound = None;
        let rest = async { while let Ok(Some(_)) = self.inbound.message().await {} };
        // All acknowledgments have arrived, so later messages are ignored.
        if timeout(RELEASE_TIMEOUT, rest).await.is_err() {
            tracing::debug!("the server did not end the stream in time");
        }
        Ok(())
    }

    async fn report(&self, reports: Vec<Report>) -> Result<(), Status> {
        for report in reports {
            self.send(work_request::Message::Report(report)).await?;
        }
        Ok(())
    }

    async fn send(&self, message: work_request::Message) -> Result<(), Status> {
        let gone = || Status::unavailable("the stream is closed");
        let outbound = self.outbound.as_ref().ok_or_else(gone)?;
        outbound.send(WorkRequest { message: Some(message) }).await.map_err(|_| gone())
    }
}

/// Events that the loop of a stream handles.
enum Event {
    Message(Option<Box<WorkResponse>>),
    Ready(Vec<crate::attempt_key::AttemptKey>),
    Heartbeat,
    Refresh,
    Refreshed(Result<String, TokenError>),
    BeginDrain,
    DrainDeadline,
    TokenExpiring,
}

impl Drain {
    fn until(self) -> Option<Instant> {
        match self {
            Self::Inactive => None,
            Self::Waiting(at) | Self::Released(at) | Self::TokenExpiring(at) => Some(at),
        }
    }
}

/// Returns the delay until `lead` before the expiry, but at least half of `left`, the time until the expiry.
fn delay_before_expiry(left: Duration, lead: Duration) -> Duration {
    left.saturating_sub(lead).max(left / 2)
}
