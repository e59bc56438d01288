//! WebSocket upgrade: handshake, authentication and admission.

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
use streamer_core::{CloseCode, ErrorCode, Timestamp, Uid};
use streamer_rpc::{Peer, trace_context};
use streamer_telemetry::TraceContext;
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use crate::{
    access_log,
    connection::Connection,
    connection_handle::ConnectionHandle,
    connections::connection_registry::AdmissionError,
    gateway::Gateway,
    ws::{
        frame,
        handshake::{self, Handshake, JSON_SUBPROTOCOL},
    },
};

/// Close code and reason of a connection that is closed immediately after the handshake. Browsers expose
/// close codes to pages, but not HTTP statuses.
struct Rejection {
    code: CloseCode,
    reason: String,
}

/// Handles `GET /ws`.
pub(crate) async fn handle_upgrade(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
) -> Response {
    let handshake = match handshake::parse(request.method(), request.uri(), request.headers()) {
        Ok(handshake) => handshake,
        Err((status, reason)) => return http_error(status, reason),
    };
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        return http_error(StatusCode::UPGRADE_REQUIRED, "this connection cannot be upgraded");
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
    if let Some(Ok(subprotocol)) = handshake.subprotocol.as_deref().map(HeaderValue::from_str) {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, subprotocol);
    }
    response
}

fn http_error(status: StatusCode, reason: &'static str) -> Response {
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
        tracing::error!("received a WebSocket upgrade on a connection that is not TCP");
        return;
    };
    let socket = parts.io.into_inner();
    // The input is copied, because even an empty slice would keep hyper's whole read buffer allocated.
    let early = Bytes::copy_from_slice(&parts.read_buf);
    drop(parts.read_buf);
    let address = peer.as_ref().map(|peer| peer.address().ip());
    match admit(&gateway, handshake, address).await {
        Ok(handle) => {
            if let Some(peer) = &peer {
                peer.authenticated();
            }
            access_log::opened(&gateway, &handle, peer.as_ref());
            let mut connection = Connection::new(socket, early, gateway, handle, trace, peer);
            connection.send_connected();
            // The connection runs in a separate task, which does not keep the state of the handshake.
            tokio::spawn(connection);
        }
        Err(rejection) => {
            gateway.metrics.connection_rejected(rejection.code);
            access_log::rejected(&gateway, rejection.code, &rejection.reason, peer.as_ref());
            let code = match rejection.code {
                CloseCode::Unauthenticated => Some(tonic::Code::Unauthenticated),
                CloseCode::Forbidden => Some(tonic::Code::PermissionDenied),
                _ => None,
            };
            if let Some(code) = code {
                gateway.audit.record_rejected_connection(code, &rejection.reason, address);
            }
            send_rejection(&gateway, socket, &rejection).await;
        }
    }
}

/// Authenticates the client and checks the limits.
async fn admit(
    gateway: &Arc<Gateway>,
    handshake: Handshake,
    address: Option<IpAddr>,
) -> Result<Arc<ConnectionHandle>, Rejection> {
    let rejection = |code, reason: String| Rejection { code, reason };
    if handshake.unsupported_subprotocol {
        let reason = format!("unsupported subprotocol: use {JSON_SUBPROTOCOL}");
        return Err(rejection(CloseCode::InvalidRequest, reason));
    }
    if let Some(origin) = &handshake.origin
        && !gateway.options.allows_origin(origin)
    {
        let reason = format!("origin {origin} is not allowed (gateway.allowed_origins)");
        return Err(rejection(CloseCode::Forbidden, reason));
    }
    let token = handshake.token.unwrap_or_default();
    if token.is_empty() {
        let reason = "a token is required: header Authorization, subprotocol bearer.<token> or \
                      query parameter token";
        return Err(rejection(CloseCode::Unauthenticated, reason.into()));
    }
    let caller = gateway.authenticator.authenticate(&token).await.map_err(|error| {
        // The token cannot be verified without the keys; the client should retry.
        let unavailable = error.code() == ErrorCode::Unavailable;
        let code = if unavailable { CloseCode::TryAgainLater } else { CloseCode::Unauthenticated };
        rejection(code, error.to_string())
    })?;
    let now = gateway.clock.now();
    let handle =
        Arc::new(ConnectionHandle::new(Uid::new(now), address, handshake.user_agent, now, caller));
    let reached = |what: &str, limit: usize, option: &str| {
        let reason = format!("maximum number of connections{what} reached: {limit} ({option})");
        Err(rejection(CloseCode::LimitExceeded, reason))
    };
    match gateway.registry.add(&handle) {
        Ok(()) => Ok(handle),
        Err(AdmissionError::TooManyPerUser(limit)) => {
            reached(" per user", limit, "gateway.max_connections_per_user")
        }
        Err(AdmissionError::TooManyPerAddress(limit)) => {
            reached(" per address", limit, "gateway.max_connections_per_address")
        }
        Err(AdmissionError::TooMany(limit)) => reached("", limit, "gateway.max_connections"),
        Err(AdmissionError::Draining) => {
            Err(rejection(CloseCode::GoingAway, "the gateway is shutting down".into()))
        }
    }
}

/// Sends a close frame and closes the socket, without keeping other state of the client.
async fn send_rejection(gateway: &Gateway, mut socket: TcpStream, rejection: &Rejection) {
    let frame = frame::close(rejection.code, &rejection.reason);
    let closing = async {
        socket.write_all(&frame).await?;
        socket.shutdown().await?;
        // The client closes first: closing earlier could discard the frame before the client reads it.
        let mut rest = [0; 256];
        while tokio::io::AsyncReadExt::read(&mut socket, &mut rest).await? > 0 {}
        std::io::Result::Ok(())
    };
    if timeout(gateway.options.handshake_timeout, closing).await.is_err() {
        tracing::debug!("a rejected client did not close the connection in time");
    }
}

/// Returns a unique name for a gateway that starts at `now`.
pub(crate) fn gateway_name(now: Timestamp) -> String {
    format!("gateway-{}", Uid::new(now))
}
