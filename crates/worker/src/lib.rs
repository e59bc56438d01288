//! Worker SDK: runs handlers in a separate process, which connects to a processor over gRPC. The [`Handler`] trait is
//! the same as in the processor, so moving a handler from the processor to a worker changes one line.
//!
//! Implements `docs/worker-protocol.md`. Invariants: reports are kept until the server acknowledges them as durable,
//! and are resent after a stream is lost; the number of pending reports is limited, so a handler that produces reports
//! faster than the server stores them waits; a revoked attempt is stopped and sends no further reports.
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
mod attempt_key;
mod attempts;
mod error;
mod ready_set;
mod send_window;
mod stream;

use std::{sync::Arc, time::Duration};

use streamer_core::{Backoff, ErrorCode};
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

pub use error::WorkerError;
pub use streamer_rpc::{TokenError, TokenFile, TokenSource};

use crate::{
    attempts::Attempts,
    stream::{Identity, StreamEnd, WorkStream},
};

/// Maximum size of a message to or from the server, in bytes.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between HTTP/2 keep-alive pings, and timeout for their acknowledgment.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// Configures and runs a worker.
pub struct Worker {
    server: String,
    token: Arc<dyn TokenSource>,
    handlers: Handlers,
    slots: u32,
    drain_timeout: Duration,
    version: String,
}

impl Worker {
    /// Creates a worker that runs `handlers` for the server at the given `http://` URL. For the action of each handler,
    /// the token needs the permission `worker:<action>`.
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

    /// Sets the maximum number of concurrent attempts, from 1 to 10,000. The default is 8.
    #[must_use]
    pub fn slots(mut self, slots: u32) -> Self {
        self.slots = slots;
        self
    }

    /// Sets the time that running attempts have to finish when the worker shuts down; the remaining ones are then
    /// released. The default is 30 s.
    #[must_use]
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_timeout = timeout;
        self
    }

    /// Sets the human-readable version of the worker's build, at most 128 bytes.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// Runs until the process receives SIGTERM or SIGINT, then drains. A second signal ends the drain immediately;
    /// attempts that are still running are retried when their leases expire.
    ///
    /// # Errors
    /// Fails in the same cases as [`Self::run`], or if the signal handlers cannot be installed.
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

    /// Runs until `shutdown` is cancelled, and reconnects whenever the stream is lost. Then drains running attempts
    /// within the drain timeout, releases the remaining ones, and returns.
    ///
    /// # Errors
    /// Fails if the configuration or the token is invalid, or if the server rejects the worker and a retry cannot
    /// succeed.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), WorkerError> {
        if self.handlers.is_empty() {
            return Err(WorkerError::NoHandlers);
        }
        let channel = self.channel()?;
        let mut identity = Identity::new(self.slots, self.version, &self.handlers);
        let mut attempts = Attempts::new(self.handlers);
        let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
        let mut drain_deadline: Option<Instant> = None;
        loop {
            let client = WorkerServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            let stream = WorkStream {
                identity: &mut identity,
                token: self.token.as_ref(),
                attempts: &mut attempts,
                shutdown: &shutdown,
                drain_deadline: &mut drain_deadline,
                drain_timeout: self.drain_timeout,
            };
            let status = match stream.run(client).await? {
                StreamEnd::Drained => return Ok(()),
                StreamEnd::TokenExpired => return Err(WorkerError::TokenExpired),
                StreamEnd::BeforeWelcome(status) if is_permanent(&status) => {
                    return Err(WorkerError::Rejected(request_error(&status)));
                }
                StreamEnd::BeforeWelcome(status) => status,
                // After a retry, two workers with the same ID would only replace each other.
                StreamEnd::AfterWelcome(status) | StreamEnd::AfterHeartbeatReply(status)
                    if status.code() == Code::AlreadyExists =>
                {
                    return Err(WorkerError::Rejected(request_error(&status)));
                }
                StreamEnd::AfterWelcome(status) | StreamEnd::AfterHeartbeatReply(status)
                    if status.code() == Code::InvalidArgument =>
                {
                    tracing::error!(status = %status.message(), "the worker violated the protocol");
                    status
                }
                StreamEnd::AfterWelcome(status) => status,
                StreamEnd::AfterHeartbeatReply(status) => {
                    backoff.reset();
                    status
                }
            };
            attempts.drop_sync();
            let wait = backoff.wait();
            tracing::warn!(status = %status.message(), ?wait, "lost the stream to the server");
            if shutdown.is_cancelled() {
                // Attempts that cannot be released are recovered when their leases expire.
                let at = *drain_deadline.get_or_insert_with(|| Instant::now() + self.drain_timeout);
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

/// Returns whether an error before `welcome` is permanent.
fn is_permanent(status: &Status) -> bool {
    matches!(
        request_error(status).code,
        ErrorCode::Unauthorized | ErrorCode::Forbidden | ErrorCode::ValidationError
    )
}
