//! Access log: lines about the WebSocket connections of clients.

use std::time::Duration;

use streamer_core::{CloseCode, validate};
use streamer_rpc::Peer;

use crate::{connection_handle::ConnectionHandle, gateway::Gateway};

/// Target of the lines of the access log, for filters.
pub const ACCESS_LOG: &str = "streamer::access";

/// Logs an opened connection.
pub(crate) fn opened(gateway: &Gateway, handle: &ConnectionHandle, peer: Option<&Peer>) {
    if gateway.options.access_log {
        let client = client(peer);
        let (connection_id, principal) = (handle.id, handle.principal());
        let (user_id, tenant_id) = (&principal.user, &principal.tenant);
        tracing::info!(target: ACCESS_LOG, client, %connection_id, user_id, tenant_id, "connection opened");
    }
}

/// Logs a rejected connection.
pub(crate) fn rejected(gateway: &Gateway, code: CloseCode, reason: &str, peer: Option<&Peer>) {
    if gateway.options.access_log {
        let (client, code) = (client(peer), code.code());
        // The reason may contain the origin that the client sent.
        let reason = validate::logged_text(reason);
        tracing::info!(target: ACCESS_LOG, client, code, reason, "connection rejected");
    }
}

/// Logs a connection that ended, with the close code if it had one.
pub(crate) fn closed(
    gateway: &Gateway,
    handle: &ConnectionHandle,
    peer: Option<&Peer>,
    code: Option<CloseCode>,
    duration: Duration,
) {
    if gateway.options.access_log {
        let (client, code) = (client(peer), code.map(CloseCode::code));
        let (connection_id, principal) = (handle.id, handle.principal());
        let (user_id, tenant_id) = (&principal.user, &principal.tenant);
        let duration_ms = duration.as_secs_f64() * 1000.0;
        tracing::info!(
            target: ACCESS_LOG, client, %connection_id, user_id, tenant_id, code, duration_ms, "connection closed"
        );
    }
}

fn client(peer: Option<&Peer>) -> Option<impl tracing::Value> {
    peer.map(|peer| tracing::field::display(peer.address().ip()))
}
