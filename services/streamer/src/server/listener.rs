//! Accepts TCP connections and serves HTTP/1 and HTTP/2 on them.

use std::{
    convert::Infallible,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body, extract::Request, response::Response};
use futures_util::future::OptionFuture;
use http::header;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use streamer_cluster::MAX_HTTP2_WINDOW;
use streamer_config::Config;
use streamer_core::saturate;
use streamer_rpc::{Connection, Peer};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::{Service, ServiceExt};

use crate::server::{
    connection_limiter::{ConnectionLimiter, OpenConnection},
    grpc_middleware::is_grpc,
    incoming_body::{IncomingBody, UndecodedBudget},
    role::Role,
    shutdown::Shutdown,
};

/// Delay after a failure to accept a connection, which is usually caused by a lack of file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);
/// Minimum interval between log entries about failures to accept connections.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum lifetime of a connection without a valid token. The connection is closed after its pending requests.
const UNAUTHENTICATED_LIFETIME: Duration = Duration::from_secs(60);
/// Maximum size of the header of an HTTP/1 request, in bytes.
const MAX_HEADER_BYTES: usize = 64 * 1024;
const KEEP_ALIVE: Duration = Duration::from_secs(20);
const HTTP2_WINDOW: u32 = 1024 * 1024;

#[derive(Clone, Copy)]
pub(crate) struct Options {
    header_timeout: Duration,
    max_concurrent_streams: u32,
    connection_window: u32,
}

impl Options {
    pub(crate) fn new(config: &Config, role: Role) -> Self {
        // Behind a gateway, all watches are streams of a few connections, and a stream that is not read
        // must not block the others.
        if !role.has(streamer_cluster::Service::Gateway) {
            return Self {
                header_timeout: config.gateway.handshake_timeout,
                max_concurrent_streams: u32::MAX,
                connection_window: MAX_HTTP2_WINDOW,
            };
        }
        Self {
            connection_window: HTTP2_WINDOW,
            header_timeout: config.gateway.handshake_timeout,
            max_concurrent_streams: saturate::to_u32(config.server.max_concurrent_streams),
        }
    }
}

/// State that the connections of a listener share.
#[derive(Clone)]
pub(crate) struct ListenerState {
    pub(crate) options: Options,
    pub(crate) connections: ConnectionLimiter,
    pub(crate) undecoded: UndecodedBudget,
}

pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    state: ListenerState,
    shutdown: Shutdown,
) {
    let builder = Arc::new(builder(state.options));
    let open = TaskTracker::new();
    let mut last_error: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            () = shutdown.accepting.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_connection_error(&error) => continue,
            Err(error) => {
                // Rate-limited, because every retry may fail.
                if last_error.is_none_or(|at| at.elapsed() > ACCEPT_LOG_INTERVAL) {
                    tracing::error!(%error, "cannot accept connections");
                    last_error = Some(Instant::now());
                }
                sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        match state.connections.admit(peer) {
            Ok(connection) => {
                let (service, builder) = (router.clone(), builder.clone());
                let (state, stop) = (state.clone(), shutdown.accepting.clone());
                let serving = shutdown.serving.clone();
                open.spawn(async move {
                    tokio::select! {
                        () = serve_connection(&builder, service, stream, connection, &state, stop) => {}
                        // Cancels the pending calls of the connection.
                        () = serving.cancelled() => {}
                    }
                });
            }
            Err(option) => tracing::debug!(%peer, option, "connection rejected"),
        }
    }
    drop(listener);
    open.close();
    open.wait().await;
}

fn builder(options: Options) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout)
        .max_buf_size(MAX_HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .initial_stream_window_size(HTTP2_WINDOW)
        .initial_connection_window_size(options.connection_window)
        .max_concurrent_streams(options.max_concurrent_streams);
    builder
}

/// Serves a connection until it ends or must be closed.
async fn serve_connection(
    builder: &Builder<TokioExecutor>,
    router: Router,
    stream: TcpStream,
    connection: Arc<OpenConnection>,
    state: &ListenerState,
    stop: CancellationToken,
) {
    let peer = connection.address();
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "connection closed before it was served");
        return;
    }
    let requests = Requests {
        router,
        peer: Peer::new(connection.clone()),
        undecoded: state.undecoded.clone(),
        has_request: Arc::default(),
    };
    let has_request = requests.has_request.clone();
    let service = TowerToHyperService::new(requests);
    let serving = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let mut stop = Some(Box::pin(stop.cancelled_owned()));
    let mut first_request_timeout = Some(Box::pin(sleep(state.options.header_timeout)));
    let mut lifetime = Some(Box::pin(sleep(UNAUTHENTICATED_LIFETIME)));
    let mut eviction = Some(connection.evicted());
    loop {
        let evicted = OptionFuture::from(eviction.as_mut());
        let stopping = OptionFuture::from(stop.as_mut());
        let timed_out = OptionFuture::from(first_request_timeout.as_mut());
        let expired = OptionFuture::from(lifetime.as_mut());
        tokio::select! {
            ended = &mut serving => {
                if let Err(error) = ended {
                    tracing::debug!(%error, %peer, "connection ended with an error");
                }
                return;
            }
            Some(()) = evicted => {
                eviction = None;
                // The client may have sent a valid token in the meantime.
                if connection.is_unauthenticated() {
                    tracing::debug!(%peer, "unauthenticated connection evicted");
                    return;
                }
            }
            Some(()) = stopping => {
                stop = None;
                serving.as_mut().graceful_shutdown();
            }
            Some(()) = timed_out => {
                first_request_timeout = None;
                if !has_request.load(Ordering::Relaxed) {
                    tracing::debug!(%peer, "connection closed: no request in time");
                    return;
                }
            }
            Some(()) = expired => {
                lifetime = None;
                if connection.is_unauthenticated() {
                    // Pending requests may complete.
                    serving.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// Handles the requests of a connection.
#[derive(Clone)]
struct Requests {
    router: Router,
    peer: Peer,
    undecoded: UndecodedBudget,
    /// Whether a request has been received.
    has_request: Arc<AtomicBool>,
}

impl Service<Request<Incoming>> for Requests {
    type Response = Response;
    type Error = Infallible;
    type Future = tower::util::Oneshot<Router, Request<Body>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        self.has_request.store(true, Ordering::Relaxed);
        let content_type = request.headers().get(header::CONTENT_TYPE);
        let is_grpc = content_type.is_some_and(is_grpc);
        let (parts, body) = request.into_parts();
        let body = if is_grpc {
            Body::new(IncomingBody::new(body, &parts, self.undecoded.clone()))
        } else {
            Body::new(body)
        };
        let mut request = Request::from_parts(parts, body);
        request.extensions_mut().insert(self.peer.clone());
        self.router.clone().oneshot(request)
    }
}

/// Returns whether the error is specific to one connection and does not affect the listener.
fn is_connection_error(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}
