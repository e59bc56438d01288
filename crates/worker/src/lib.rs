//! Runs handlers in a process of their own, for a processor that it reaches over gRPC: the same
//! [`Handler`] trait as in the processor, so that moving a handler out changes one line.
//!
//! The conversation is that of `docs/worker-protocol.md`. Invariants: what a handler reports is kept
//! until the server says that it is durable, and sent again after a broken stream; what waits is
//! bounded, and a handler that is faster than the log waits; an attempt that is taken away is
//! stopped and says nothing any more.
//!
//! ```no_run
//! use streamer_worker::{Handlers, Worker};
//! # async fn run(handlers: Handlers) -> Result<(), streamer_worker::WorkerError> {
//! Worker::new("http://127.0.0.1:8080", "a token with permission worker:*", handlers)
//!     .slots(16)
//!     .run_until_terminated()
//!     .await
//! # }
//! ```

mod attempt;
mod attempts;
mod outgoing;
mod ready;
mod session;

use std::{sync::Arc, time::Duration};

use streamer_core::{ErrorCode, RequestError, retry::Backoff};
pub use streamer_handler::{
    ActionSpec, Context, Handler, HandlerError, Handlers, RetryPolicy, async_trait,
};
use streamer_proto::processor::v1::worker_service_client::WorkerServiceClient;
use streamer_rpc::request_error;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

pub use streamer_rpc::{TokenError, TokenFile, TokenSource};

use crate::{
    attempts::Attempts,
    session::{Ended, Identity, Session},
};

/// Largest task that is taken, in bytes.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection on which nothing comes back for so long is given up.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// Why a worker does not go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The server's URL cannot be used.
    #[error("server URL {0:?} must be like http://127.0.0.1:8080")]
    Url(String),
    /// There is no token, or it cannot be sent.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// There is nothing to run.
    #[error("a worker needs at least one handler")]
    NoHandlers,
    /// The token has expired, and there is no other.
    #[error(
        "the token has expired and cannot be renewed; give a file with it (--token-file) or a \
         TokenSource, and keep that up to date"
    )]
    TokenExpired,
    /// The server refuses this worker; trying again as it is would not help.
    #[error("the server refuses this worker: {0}")]
    Refused(RequestError),
    /// Signals cannot be listened for.
    #[error("cannot listen for signals: {0}")]
    Signal(std::io::Error),
}

/// A worker that is ready to run.
pub struct Worker {
    server: String,
    token: Arc<dyn TokenSource>,
    handlers: Handlers,
    slots: u32,
    drain_timeout: Duration,
    version: String,
}

impl Worker {
    /// Will run these handlers for the server at an `http://` URL. The token needs permission
    /// `worker:<action>` for each of them.
    pub fn new(server: impl Into<String>, token: impl TokenSource, handlers: Handlers) -> Self {
        Self {
            server: server.into(),
            token: Arc::new(token),
            handlers,
            slots: 8,
            drain_timeout: Duration::from_secs(30),
            version: String::new(),
        }
    }

    /// Sets how many attempts run at once: 1 to 10,000, by default 8.
    #[must_use]
    pub fn slots(mut self, slots: u32) -> Self {
        self.slots = slots;
        self
    }

    /// Sets how long running attempts may go on when the worker stops, by default 30 s; what is
    /// left then is handed back.
    #[must_use]
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_timeout = timeout;
        self
    }

    /// Sets what the worker says of its build, for people: at most 128 bytes.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// Runs until SIGTERM or SIGINT, then drains. A second signal ends the drain at once; attempts
    /// that still run are retried when their leases expire.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn run_until_terminated(self) -> Result<(), WorkerError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(WorkerError::Signal)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(WorkerError::Signal)?;
        let shutdown = CancellationToken::new();
        let mut stop_signal = async move || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let stop = shutdown.clone();
        let signals = async move {
            stop_signal().await;
            stop.cancel();
            stop_signal().await;
        };
        tokio::select! {
            ended = self.run(shutdown) => ended,
            () = signals => Ok(()),
        }
    }

    /// Runs until `shutdown`, connecting again whenever the stream is lost; then lets running
    /// attempts end within the drain timeout, hands the rest back, and returns.
    ///
    /// # Errors
    /// When going on would not help: the server refuses the worker or its token.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), WorkerError> {
        if self.handlers.is_empty() {
            return Err(WorkerError::NoHandlers);
        }
        let channel = self.channel()?;
        let mut identity = Identity::new(self.slots, self.version, &self.handlers);
        let mut attempts = Attempts::new(self.handlers);
        let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
        let mut drain_at: Option<Instant> = None;
        loop {
            let client = WorkerServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            let session = Session {
                identity: &mut identity,
                token: self.token.as_ref(),
                attempts: &mut attempts,
                shutdown: &shutdown,
                drain_at: &mut drain_at,
                drain_timeout: self.drain_timeout,
            };
            let lost = match session.run(client).await? {
                Ended::Drained => return Ok(()),
                Ended::TokenExpired => return Err(WorkerError::TokenExpired),
                Ended::Before(status) if is_final(&status) => {
                    return Err(WorkerError::Refused(request_error(&status)));
                }
                Ended::Before(status) => status,
                // Two of one name would only push each other out.
                Ended::After(status) | Ended::AfterGood(status)
                    if status.code() == Code::AlreadyExists =>
                {
                    return Err(WorkerError::Refused(request_error(&status)));
                }
                Ended::After(status) | Ended::AfterGood(status)
                    if status.code() == Code::InvalidArgument =>
                {
                    tracing::error!(status = %status.message(), "this worker broke the protocol");
                    status
                }
                Ended::After(status) => status,
                Ended::AfterGood(status) => {
                    backoff.reset();
                    status
                }
            };
            attempts.drop_sync();
            let wait = backoff.wait();
            tracing::warn!(status = %lost.message(), ?wait, "lost the stream to the server");
            if shutdown.is_cancelled() {
                // Somebody else takes over what cannot be handed back.
                let at = *drain_at.get_or_insert_with(|| Instant::now() + self.drain_timeout);
                if attempts.is_empty() || timeout_at(at, sleep(wait)).await.is_err() {
                    return Ok(());
                }
                continue;
            }
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = sleep(wait) => {}
            }
        }
    }

    fn channel(&self) -> Result<Channel, WorkerError> {
        let endpoint = Endpoint::from_shared(self.server.clone());
        let endpoint = endpoint.map_err(|_| WorkerError::Url(self.server.clone()))?;
        if endpoint.uri().scheme_str() != Some("http") {
            return Err(WorkerError::Url(self.server.clone()));
        }
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        Ok(endpoint.connect_lazy())
    }
}

/// Before `welcome`, these do not go away by themselves.
fn is_final(status: &Status) -> bool {
    matches!(
        request_error(status).code,
        ErrorCode::Unauthorized | ErrorCode::Forbidden | ErrorCode::ValidationError
    )
}
