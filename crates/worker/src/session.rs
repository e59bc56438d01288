//! One stream, from `hello` to its end.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, OptionFuture};
use http::HeaderValue;
use streamer_core::{Clock, Limits, SystemClock, Timestamp, Uid};
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

use crate::{TokenError, TokenSource, WorkerError, attempts::Attempts, outgoing::Window};

/// Messages that wait to be sent at most; then reading waits too.
const OUTBOX: usize = 1024;
/// How long the server may take to say `welcome`.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// A fresh token is asked for so long before the one in use ends, or at half of what is left.
const REFRESH_BEFORE: Duration = Duration::from_secs(60);
/// How long acknowledgments may take after everything was handed back.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a worker says of itself on each of its streams.
pub(crate) struct Identity {
    worker_id: String,
    /// What its attempts are bound to; empty before the first `welcome`.
    secret: Bytes,
    display_name: String,
    version: String,
    slots: u32,
    actions: Vec<Action>,
}

impl Identity {
    /// A new one for each run.
    pub(crate) fn new(slots: u32, version: String, handlers: &Handlers) -> Self {
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "worker".into());
        let host: String = host.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
        let actions = handlers.specs().map(|spec| {
            // What takes less than this on the server is sync there, whatever is said here.
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
            slots: i32::try_from(slots).unwrap_or(i32::MAX),
            actions: self.actions.clone(),
            attempts: attempts.named(),
            session_secret: self.secret.clone(),
            display_name: self.display_name.clone(),
        }
    }
}

/// How a stream ended.
pub(crate) enum Ended {
    /// The worker has nothing left to do.
    Drained,
    /// The token, which cannot be renewed, is about to expire, and everything was handed back.
    TokenExpired,
    /// Before the server had said `welcome`.
    Before(Status),
    /// After that.
    After(Status),
    /// After the server had answered a heartbeat too: the stream was a good one.
    AfterGood(Status),
}

pub(crate) struct Session<'a> {
    pub(crate) identity: &'a mut Identity,
    pub(crate) token: &'a dyn TokenSource,
    pub(crate) attempts: &'a mut Attempts,
    pub(crate) shutdown: &'a CancellationToken,
    /// When what still runs is handed back, once the worker stops; the same on every stream.
    pub(crate) drain_at: &'a mut Option<Instant>,
    pub(crate) drain_timeout: Duration,
}

impl Session<'_> {
    pub(crate) async fn run(
        self,
        mut client: WorkerServiceClient<Channel>,
    ) -> Result<Ended, WorkerError> {
        let token = self.token.token().await?;
        let authorization = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| TokenError("it is not visible ASCII".into()))?;
        let (outbound, messages) = mpsc::channel(OUTBOX);
        let hello = work_request::Message::Hello(
            self.identity.hello(self.attempts, self.shutdown.is_cancelled()),
        );
        let hello = WorkRequest { message: Some(hello) };
        if outbound.send(hello).await.is_err() {
            return Ok(Ended::Before(Status::unavailable("the stream was not opened")));
        }
        let call = with_authorization(ReceiverStream::new(messages), authorization);
        let opening = async {
            let mut inbound = client.work(call).await?.into_inner();
            match inbound.message().await?.and_then(|first| first.message) {
                Some(work_response::Message::Welcome(welcome)) => Ok((inbound, welcome)),
                _ => Err(Status::internal("the server did not begin with welcome")),
            }
        };
        let late = Err(Status::deadline_exceeded("the server did not say welcome in time"));
        let nothing_left = async {
            self.shutdown.cancelled().await;
            if !self.attempts.is_empty() {
                std::future::pending::<()>().await;
            }
        };
        let opened = tokio::select! {
            opened = timeout(WELCOME_TIMEOUT, opening) => opened.unwrap_or(late),
            () = nothing_left => return Ok(Ended::Drained),
        };
        let (inbound, welcome) = match opened {
            Ok(opened) => opened,
            Err(status) => return Ok(Ended::Before(status)),
        };
        tracing::info!(processor = welcome.processor, "connected");
        // An older server sends none.
        if !welcome.session_secret.is_empty() {
            self.identity.secret = welcome.session_secret.clone();
        }
        self.attempts.resume(&welcome.resumed);
        let heartbeat = duration(welcome.heartbeat_ms).max(Duration::from_millis(1));
        let mut heartbeats = interval(heartbeat);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let conversation = Conversation {
            outbound: Some(outbound),
            inbound,
            terms: Terms::of(&welcome),
            heartbeats,
            heard_at: Instant::now(),
            doubted: false,
            answered: false,
            refresh_at: None,
            refreshing: None,
            token_ends_at: None,
            token,
            drain: Drain::Not,
            session: self,
        };
        Ok(conversation.run().await)
    }
}

/// What `welcome` says.
#[derive(Clone, Copy)]
struct Terms {
    limits: Limits,
    window: Window,
    lease: Duration,
}

impl Terms {
    fn of(welcome: &Welcome) -> Self {
        let size = |value: i64| usize::try_from(value).unwrap_or(usize::MAX);
        Self {
            limits: Limits {
                payload_rule: streamer_core::limits::PAYLOAD_OPTION,
                max_payload_bytes: size(welcome.max_payload_bytes),
                max_output_chunk_bytes: size(welcome.max_output_chunk_bytes),
            },
            window: Window {
                reports: size(welcome.max_unacknowledged.into()),
                bytes: size(welcome.max_unacknowledged_bytes),
            },
            lease: duration(welcome.lease_ms),
        }
    }
}

/// How far the worker is with stopping.
#[derive(Clone, Copy)]
enum Drain {
    Not,
    /// No more tasks; what runs may end until then.
    Ending(Instant),
    /// Everything was handed back; acknowledgments may come until then.
    Released(Instant),
    /// The same, because the token is about to expire.
    TokenEnds(Instant),
}

struct Conversation<'a> {
    session: Session<'a>,
    outbound: Option<mpsc::Sender<WorkRequest>>,
    inbound: Streaming<WorkResponse>,
    terms: Terms,
    heartbeats: Interval,
    /// When the server last said something.
    heard_at: Instant,
    /// At the last heartbeat, it had not said anything for a lease.
    doubted: bool,
    /// The server has answered a heartbeat.
    answered: bool,
    refresh_at: Option<Instant>,
    refreshing: Option<BoxFuture<'a, Result<String, TokenError>>>,
    token: String,
    /// When everything is handed back, because the token cannot be renewed.
    token_ends_at: Option<Instant>,
    drain: Drain,
}

impl Conversation<'_> {
    /// Goes on until the worker is drained, or the stream is lost.
    async fn run(mut self) -> Ended {
        let ended = self.converse().await;
        match ended {
            Ok(()) if matches!(self.drain, Drain::TokenEnds(_)) => Ended::TokenExpired,
            // Not acknowledged in time, or not before the token had expired.
            Err(status)
                if matches!(self.drain, Drain::TokenEnds(_))
                    && matches!(status.code(), Code::DeadlineExceeded | Code::Unauthenticated) =>
            {
                Ended::TokenExpired
            }
            Ok(()) => Ended::Drained,
            Err(status) if self.answered => Ended::AfterGood(status),
            Err(status) => Ended::After(status),
        }
    }

    async fn converse(&mut self) -> Result<(), Status> {
        let left = self.session.attempts.collect_all(self.terms.window);
        self.report(left).await?;
        loop {
            if self.is_drained() {
                return self.leave().await;
            }
            let ready = self.session.attempts.ready.clone();
            let step = {
                let refresh = OptionFuture::from(self.refresh_at.map(sleep_until));
                let refreshed = OptionFuture::from(self.refreshing.as_mut());
                let drain_step = OptionFuture::from(self.drain.until().map(sleep_until));
                let token_ends = OptionFuture::from(self.token_ends_at.map(sleep_until));
                tokio::select! {
                    message = self.inbound.message() => Step::Heard(message?.map(Box::new)),
                    keys = ready.take() => Step::Ready(keys),
                    _ = self.heartbeats.tick() => Step::Heartbeat,
                    Some(()) = refresh => Step::Refresh,
                    Some(token) = refreshed => Step::Refreshed(token),
                    Some(()) = drain_step => Step::DrainOn,
                    Some(()) = token_ends => Step::TokenEnds,
                    () = self.session.shutdown.cancelled(), if matches!(self.drain, Drain::Not) => {
                        Step::BeginDrain
                    }
                }
            };
            self.take(step).await?;
        }
    }

    async fn take(&mut self, step: Step) -> Result<(), Status> {
        match step {
            Step::Heard(None) => Err(Status::unavailable("the server ended the stream")),
            Step::Heard(Some(response)) => {
                self.heard_at = Instant::now();
                self.hear(*response).await
            }
            Step::Ready(keys) => {
                for key in keys {
                    let reports = self.session.attempts.collect(key, self.terms.window);
                    self.report(reports).await?;
                }
                Ok(())
            }
            Step::Heartbeat => {
                // It may be this process that stood still: what has come meanwhile is read first.
                let silent = self.heard_at.elapsed() > self.terms.lease;
                if std::mem::replace(&mut self.doubted, silent) && silent {
                    return Err(Status::unavailable("the server was not heard of for a lease"));
                }
                let attempts = self.session.attempts.named();
                self.send(work_request::Message::Heartbeat(Heartbeat { attempts })).await
            }
            Step::Refresh => {
                self.refresh_at = None;
                self.refreshing = Some(self.session.token.token());
                Ok(())
            }
            Step::Refreshed(token) => self.refreshed(token).await,
            Step::BeginDrain => {
                tracing::info!(running = self.session.attempts.len(), "draining");
                let timeout = self.session.drain_timeout;
                let at = *self.session.drain_at.get_or_insert_with(|| Instant::now() + timeout);
                self.drain = Drain::Ending(at);
                self.send(work_request::Message::Capacity(Capacity { slots: 0 })).await
            }
            Step::DrainOn => match self.drain {
                Drain::Released(_) | Drain::TokenEnds(_) => {
                    Err(Status::deadline_exceeded("not acknowledged in time"))
                }
                Drain::Not | Drain::Ending(_) => {
                    self.drain = Drain::Released(Instant::now() + RELEASE_TIMEOUT);
                    self.release_all("the worker stops").await
                }
            },
            // It stops already.
            Step::TokenEnds if matches!(self.drain, Drain::Released(_)) => {
                self.token_ends_at = None;
                Ok(())
            }
            Step::TokenEnds => {
                self.token_ends_at = None;
                self.drain = Drain::TokenEnds(Instant::now() + RELEASE_TIMEOUT);
                self.send(work_request::Message::Capacity(Capacity { slots: 0 })).await?;
                self.release_all("the token of the worker expires").await
            }
        }
    }

    async fn hear(&mut self, response: WorkResponse) -> Result<(), Status> {
        use work_response::Message;
        let attempts = &mut *self.session.attempts;
        match response.message {
            Some(Message::Task(task)) => self.start(task).await,
            Some(Message::Acknowledgment(said)) => {
                let reports = attempts.acknowledge(&said, self.terms.window);
                self.report(reports).await
            }
            Some(Message::Resend(resend)) => {
                let reports = attempts.resend(&resend, self.terms.window);
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
                self.answered = true;
                for cancel in &reply.cancelled {
                    attempts.cancel(&cancel.uid, cancel.attempt);
                }
                reply.revoked.iter().for_each(|revoke| attempts.revoke(revoke));
                Ok(())
            }
            Some(Message::TokenStatus(status)) => {
                self.note_expiry(&status);
                Ok(())
            }
            Some(Message::Drain(_)) => {
                tracing::info!("the server stops; what runs goes on");
                Ok(())
            }
            Some(Message::Welcome(_)) | None => Ok(()),
        }
    }

    /// Plans what comes before the token expires.
    fn note_expiry(&mut self, status: &TokenStatus) {
        let Some(expires) = &status.expire_time else { return };
        let expires_at = Timestamp::from_millis(millis(expires));
        let left = match duration(status.time_left_ms) {
            Duration::ZERO => expires_at.since(SystemClock.now()),
            left => left,
        };
        if !self.session.token.is_fixed() {
            self.refresh_at = Some(Instant::now() + before(left, REFRESH_BEFORE));
            return;
        }
        tracing::warn!(
            %expires_at,
            "the token cannot be renewed: before it expires, the worker releases its running attempts \
             and exits; a token that is renewed avoids this (--token-file, TokenSource)"
        );
        self.token_ends_at = Some(Instant::now() + before(left, RELEASE_TIMEOUT));
    }

    async fn release_all(&mut self, reason: &str) -> Result<(), Status> {
        self.session.attempts.release_all(reason);
        let reports = self.session.attempts.collect_all(self.terms.window);
        self.report(reports).await
    }

    async fn start(&mut self, task: streamer_proto::processor::v1::Task) -> Result<(), Status> {
        let (uid, attempt, action) = (task.uid.clone(), task.attempt, task.action.clone());
        if self.session.attempts.start(task, self.terms.limits) {
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
            // It cannot be renewed; the server ends the stream when it is over.
            Ok(token) if token == self.token => Ok(()),
            Ok(token) => {
                self.token.clone_from(&token);
                self.send(work_request::Message::RefreshToken(RefreshToken { token })).await
            }
            Err(error) => {
                tracing::warn!(%error, "could not renew the token, will try again");
                self.refresh_at = Some(Instant::now() + REFRESH_BEFORE / 10);
                Ok(())
            }
        }
    }

    fn is_drained(&self) -> bool {
        !matches!(self.drain, Drain::Not) && self.session.attempts.is_empty()
    }

    /// Closes our side, and waits until the server has taken in everything.
    async fn leave(&mut self) -> Result<(), Status> {
        self.outbound = None;
        let rest = async { while let Ok(Some(_)) = self.inbound.message().await {} };
        // The acknowledgments are here: nothing depends on the rest.
        if timeout(RELEASE_TIMEOUT, rest).await.is_err() {
            tracing::debug!("the server did not end the stream");
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

/// What happened.
enum Step {
    Heard(Option<Box<WorkResponse>>),
    Ready(Vec<crate::attempt::Key>),
    Heartbeat,
    Refresh,
    Refreshed(Result<String, TokenError>),
    BeginDrain,
    DrainOn,
    TokenEnds,
}

impl Drain {
    fn until(self) -> Option<Instant> {
        match self {
            Self::Not => None,
            Self::Ending(at) | Self::Released(at) | Self::TokenEnds(at) => Some(at),
        }
    }
}

/// Time until `lead` before the end, or until half of what is left.
fn before(left: Duration, lead: Duration) -> Duration {
    left.saturating_sub(lead).max(left / 2)
}

fn duration(millis: i64) -> Duration {
    Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}
