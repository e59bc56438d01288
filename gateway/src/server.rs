//! Lets WebSockets in.

use std::{net::IpAddr, sync::Arc};

use axum::{
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::future::OptionFuture;
use http::{HeaderValue, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use streamer_auth::{Audit, Authenticator};
use streamer_core::{Clock, ErrorCode, OpenWatches, Timestamp, Uid, is_loopback_host};
use streamer_rpc::{Peer, trace_context};
use streamer_telemetry::{TraceContext, Traces};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use crate::{
    GatewayOptions,
    connection::Connection,
    handle::{ConnectionHandle, close_code},
    hub::Hub,
    metrics::GatewayMetrics,
    peers::Peers,
    registry::{Refused, Registry},
    ws::{
        frame,
        handshake::{self, Handshake, JSON_PROTOCOL},
    },
};

/// What every connection works with.
pub(crate) struct Gateway {
    pub(crate) options: Arc<GatewayOptions>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: GatewayMetrics,
    pub(crate) audit: Audit,
    pub(crate) traces: Traces,
    pub(crate) open_watches: Arc<OpenWatches>,
}

/// A reason to close right after the handshake. Browsers see close codes, but not HTTP statuses.
struct Refusal {
    code: u16,
    reason: String,
}

/// `GET /ws`
pub(crate) async fn open(State(gateway): State<Arc<Gateway>>, mut request: Request) -> Response {
    let handshake = match handshake::read(request.method(), request.uri(), request.headers()) {
        Ok(handshake) => handshake,
        Err((status, reason)) => return refuse_http(status, reason),
    };
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        return refuse_http(StatusCode::UPGRADE_REQUIRED, "this connection cannot be upgraded");
    };
    let peer = request.extensions_mut().remove::<Peer>();
    let trace = trace_context(request.headers());
    let response = switch_protocols(&handshake);
    let evicted = peer.as_ref().map(Peer::evicted);
    let serving = Box::pin(serve(gateway, handshake, peer, trace, upgrade));
    tokio::spawn(async move {
        tokio::select! {
            () = serving => {}
            Some(()) = OptionFuture::from(evicted) => {}
        }
    });
    response
}

fn switch_protocols(handshake: &Handshake) -> Response {
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    if let Ok(accept) = HeaderValue::from_str(&handshake.accept) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    if let Some(Ok(protocol)) = handshake.protocol.as_deref().map(HeaderValue::from_str) {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    response
}

fn refuse_http(status: StatusCode, reason: &'static str) -> Response {
    let mut response = Response::new(Body::from(format!("{reason}\n")));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, HeaderValue::from_static("GET"));
    }
    if status == StatusCode::UPGRADE_REQUIRED {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    }
    response
}

async fn serve(
    gateway: Arc<Gateway>,
    handshake: Handshake,
    peer: Option<Peer>,
    trace: Option<TraceContext>,
    upgrade: OnUpgrade,
) {
    let Ok(upgraded) = upgrade.await else { return };
    let Ok(parts) =
        hyper_util::server::conn::auto::upgrade::downcast::<TokioIo<TcpStream>>(upgraded)
    else {
        tracing::error!("a WebSocket came over something that is not a TCP connection");
        return;
    };
    let socket = parts.io.into_inner();
    // Copied, since even an empty slice of it would keep hyper's whole read buffer alive.
    let early = Bytes::copy_from_slice(&parts.read_buf);
    drop(parts.read_buf);
    let address = peer.as_ref().map(|peer| peer.address().ip());
    match admit(&gateway, handshake, address).await {
        Ok(handle) => {
            if let Some(peer) = &peer {
                peer.authenticated();
            }
            let mut connection = Connection::new(socket, early, gateway, handle, trace, peer);
            connection.greet();
            // A task of its own, which holds the connection and nothing of the handshake.
            tokio::spawn(connection);
        }
        Err(refusal) => {
            gateway.metrics.refused.inc();
            let code = match refusal.code {
                close_code::UNAUTHENTICATED => Some(tonic::Code::Unauthenticated),
                close_code::FORBIDDEN => Some(tonic::Code::PermissionDenied),
                _ => None,
            };
            if let Some(code) = code {
                gateway.audit.refused_connection(code, &refusal.reason, address);
            }
            turn_away(&gateway, socket, &refusal).await;
        }
    }
}

/// Checks who is there, and the limits.
async fn admit(
    gateway: &Arc<Gateway>,
    handshake: Handshake,
    address: Option<IpAddr>,
) -> Result<Arc<ConnectionHandle>, Refusal> {
    let refusal = |code, reason: String| Refusal { code, reason };
    if handshake.unknown_protocol {
        let reason = format!("the subprotocol spoken here is {JSON_PROTOCOL}");
        return Err(refusal(close_code::BAD_PROTOCOL, reason));
    }
    if let Some(origin) = &handshake.origin
        && !gateway.options.allows_origin(origin)
    {
        let reason = format!("origin {origin} is not allowed (gateway.allowed_origins)");
        return Err(refusal(close_code::FORBIDDEN, reason));
    }
    let token = handshake.token.unwrap_or_default();
    if token.is_empty() {
        let reason = "a token is required: header Authorization, subprotocol bearer.<token> or \
                      query parameter token";
        return Err(refusal(close_code::UNAUTHENTICATED, reason.into()));
    }
    let caller = gateway.authenticator.authenticate(&token).await.map_err(|error| {
        // Without the keys nobody can tell whether the token is good: the client should come back.
        let unavailable = error.code() == ErrorCode::Unavailable;
        let code =
            if unavailable { close_code::TRY_AGAIN_LATER } else { close_code::UNAUTHENTICATED };
        refusal(code, error.to_string())
    })?;
    let now = gateway.clock.now();
    let handle =
        Arc::new(ConnectionHandle::new(Uid::new(now), address, handshake.user_agent, now, caller));
    match gateway.registry.add(&handle) {
        Ok(()) => Ok(handle),
        Err(Refused::User(limit)) => Err(refusal(
            close_code::TOO_MANY,
            format!("more than {limit} connections of one user (gateway.max_connections_per_user)"),
        )),
        Err(Refused::Address(limit)) => Err(refusal(
            close_code::TOO_MANY,
            format!(
                "more than {limit} connections from one address \
                 (gateway.max_connections_per_address)"
            ),
        )),
        Err(Refused::Total(limit)) => Err(refusal(
            close_code::TOO_MANY,
            format!("more than {limit} connections (gateway.max_connections)"),
        )),
        Err(Refused::Draining) => {
            Err(refusal(close_code::GOING_AWAY, "the gateway is stopping".into()))
        }
    }
}

/// Says why and closes, without keeping anything of the client.
async fn turn_away(gateway: &Gateway, mut socket: TcpStream, refusal: &Refusal) {
    let frame = frame::close(refusal.code, &refusal.reason);
    let farewell = async {
        socket.write_all(&frame).await?;
        socket.shutdown().await?;
        // Until the client has closed too: closing first could tear the frame from its hands.
        let mut rest = [0; 256];
        while tokio::io::AsyncReadExt::read(&mut socket, &mut rest).await? > 0 {}
        std::io::Result::Ok(())
    };
    if timeout(gateway.options.handshake_timeout, farewell).await.is_err() {
        tracing::debug!("a client that was turned away did not close in time");
    }
}

impl GatewayOptions {
    /// Whether a page of this origin may connect. Without a list, only pages served from this
    /// machine may.
    fn allows_origin(&self, origin: &str) -> bool {
        if self.allowed_origins.is_empty() {
            let host = origin.split_once("://").map_or(origin, |(_, rest)| rest);
            let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
            return is_loopback_host(name) || is_loopback_host(host);
        }
        self.allowed_origins.iter().any(|allowed| allowed == "*" || allowed == origin)
    }
}

/// This moment's name for a gateway.
pub(crate) fn gateway_name(now: Timestamp) -> String {
    format!("gateway-{}", Uid::new(now))
}
