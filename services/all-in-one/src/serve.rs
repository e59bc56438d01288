//! Accepts TCP connections and speaks HTTP/1 and HTTP/2 on them.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request, response::Response};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto::Builder, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use parking_lot::Mutex;
use streamer_config::Config;
use streamer_rpc::PeerAddress;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tower::{Service, ServiceExt};

use crate::{Role, Shutdown};

/// After an accept that failed for want of something (file descriptors mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that have not asked for anything yet at most; others wait to be accepted. What is
/// not known to be a client must not use up the file descriptors of those who are.
const MAX_SILENT: usize = 4096;
const KEEP_ALIVE: Duration = Duration::from_secs(20);
const HTTP2_WINDOW: u32 = 1024 * 1024;
/// As RFC 9113 has it.
pub(crate) const MAX_HTTP2_WINDOW: u32 = (1 << 31) - 1;

#[derive(Clone, Copy)]
pub(crate) struct Options {
    header_timeout: Duration,
    max_concurrent_streams: u32,
    connection_window: u32,
}

impl Options {
    pub(crate) fn new(config: &Config, role: Role) -> Self {
        // Behind a gateway every watch is a stream of a few connections, and one that is not read
        // must not hold up the others.
        if !matches!(role, Role::All | Role::Gateway) {
            return Self {
                header_timeout: Duration::from_millis(config.gateway.handshake_timeout_ms),
                max_concurrent_streams: u32::MAX,
                connection_window: MAX_HTTP2_WINDOW,
            };
        }
        Self {
            connection_window: HTTP2_WINDOW,
            header_timeout: Duration::from_millis(config.gateway.handshake_timeout_ms),
            max_concurrent_streams: u32::try_from(config.server.max_concurrent_streams)
                .unwrap_or(u32::MAX),
        }
    }
}

pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    options: Options,
    shutdown: Shutdown,
) {
    let builder = builder(options);
    let graceful = GracefulShutdown::new();
    let silent = Arc::new(Semaphore::new(MAX_SILENT));
    loop {
        let next = async {
            let place = silent.clone().acquire_owned().await.map_err(io::Error::other)?;
            Ok((place, listener.accept().await?))
        };
        let accepted = tokio::select! {
            () = shutdown.accepting.cancelled() => break,
            accepted = next => accepted,
        };
        match accepted {
            Ok((place, (stream, peer))) => {
                let first = FirstRequest::new(place);
                let service = WithPeer { router: router.clone(), peer, first };
                accept(&builder, &graceful, service, stream, options.header_timeout);
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    tokio::select! {
        () = graceful.shutdown() => {}
        () = shutdown.serving.cancelled() => {}
    }
}

fn builder(options: Options) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(options.header_timeout);
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

fn accept(
    builder: &Builder<TokioExecutor>,
    graceful: &GracefulShutdown,
    service: WithPeer,
    stream: TcpStream,
    patience: Duration,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection was gone before it was served");
        return;
    }
    let (peer, first) = (service.peer, service.first.clone());
    let service = TowerToHyperService::new(service);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let connection = graceful.watch(connection.into_owned());
    tokio::spawn(async move {
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = first.has_not_come_in(patience) => {
                tracing::debug!(%peer, "a connection asked for nothing");
                return;
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, %peer, "a connection ended badly");
        }
    });
}

/// Whether a connection has asked for something.
#[derive(Clone)]
struct FirstRequest(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl FirstRequest {
    fn new(place: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(Mutex::new(Some(place))))
    }

    /// It has come: the connection's place among the silent ones is another's.
    fn has_come(&self) {
        drop(self.0.lock().take());
    }

    /// Returns after so long if it has not come by then, else never.
    async fn has_not_come_in(&self, patience: Duration) {
        sleep(patience).await;
        if self.0.lock().is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// Tells requests where they come from.
#[derive(Clone)]
struct WithPeer {
    router: Router,
    peer: SocketAddr,
    first: FirstRequest,
}

impl Service<Request<Incoming>> for WithPeer {
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
        self.first.has_come();
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(PeerAddress(self.peer));
        self.router.clone().oneshot(request)
    }
}

/// The client was gone before it was accepted; the listener is well.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}
