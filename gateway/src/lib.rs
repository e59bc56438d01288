//! Gateway from WebSocket to gRPC.
//!
//! Clients connect with subprotocol `streamer.v1.json` (DESIGN §8). The gateway is an ordinary
//! client of the router and progress services and sends the user's token with every call. It keeps
//! no durable state: a client whose gateway fails reconnects to a different one and resumes with
//! `after_seq`. All local subscribers of a request share one upstream watch; each is a cursor over
//! frames that are encoded once, so that a slow one delays only itself.

mod buffer_budget;
mod client_message;
mod connection;
mod connection_handle;
mod connection_registry;
mod connections_service;
mod fanout;
mod json_writer;
mod large_segments;
mod metrics;
mod peer_gateways;
mod server_message;
mod topic;
mod upgrade;
mod upstreams;
mod ws;

use std::{sync::Arc, time::Duration};

use axum::routing::any;
use streamer_auth::{AuthLayer, AuthService, Authenticator};
use streamer_core::{Clock, OpenWatches};
use streamer_proto::connections::v1::connections_service_server::ConnectionsServiceServer;
use streamer_rpc::{Channel, Instances};
use streamer_store::Store;
use streamer_telemetry::{Metrics, Traces};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    connection_registry::ConnectionRegistry, connections_service::ConnectionsApi, fanout::Fanout,
    metrics::GatewayMetrics, upgrade::Gateway, upstreams::Upstreams,
};

/// Gateway options.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Origins whose pages may connect. Empty allows only pages of this machine; `*` allows all.
    pub allowed_origins: Vec<String>,
    /// Maximum number of connections.
    pub max_connections: usize,
    /// Maximum number of connections of one user.
    pub max_connections_per_user: usize,
    /// Maximum number of connections from one address.
    pub max_connections_per_address: usize,
    /// Maximum number of subscriptions of one connection.
    pub max_subscriptions: usize,
    /// Maximum number of pending calls of one connection; at the limit it is not read from.
    pub max_in_flight_requests: usize,
    /// Maximum rate of messages from one connection, per second; 0 disables the limit.
    pub rate_limit: u32,
    /// Messages accepted in a burst beyond that rate.
    pub rate_limit_burst: u32,
    /// Maximum number of bytes buffered for incomplete client messages.
    pub max_buffered_bytes: usize,
    /// Maximum number of bytes buffered for incomplete messages of one user.
    pub max_buffered_bytes_per_user: usize,
    /// Time within which a message must be complete, once it has begun.
    pub message_timeout: Duration,
    /// Maximum size of a client message.
    pub max_message_bytes: usize,
    /// Interval at which a silent client is pinged; it is dropped after twice the interval.
    pub heartbeat: Duration,
    /// Time after which a connection is closed if its pending output makes no progress.
    pub slow_consumer_timeout: Duration,
    /// Timeout for closing a rejected connection.
    pub handshake_timeout: Duration,
    /// Maximum time that clients wait before they reconnect after a drain.
    pub reconnect_after: Duration,
}

/// Dependencies of the gateway.
pub struct Dependencies {
    /// Stores connection records.
    pub store: Arc<dyn Store>,
    /// Provides timestamps.
    pub clock: Arc<dyn Clock>,
    /// Verifies tokens.
    pub authenticator: Arc<Authenticator>,
    /// Authenticates gRPC calls and writes the audit log.
    pub auth: AuthLayer,
    /// Channel to the router.
    pub router: Channel,
    /// Channel to the progress service.
    pub progress: Channel,
    /// All gateways, if this process is not the only one.
    pub others: Option<PeerGateways>,
    /// Registry of metrics.
    pub metrics: Metrics,
    /// Exports traces and decides which requests are traced.
    pub traces: Traces,
    /// Gateway options.
    pub options: GatewayOptions,
    /// Open watches of tenants and users in this process.
    pub open_watches: Arc<OpenWatches>,
}

/// The other gateways of the deployment.
#[derive(Clone)]
pub struct PeerGateways {
    /// Name of this gateway among the members.
    pub own: String,
    /// All gateways, including this one.
    pub members: Instances,
}

/// Services of the gateway, ready to be served.
pub struct GatewayServer {
    /// `GET /ws`. Must be served over plain TCP by hyper-util's auto server, with upgrades.
    pub http: axum::Router,
    /// `streamer.connections.v1`, for services that send messages to connected users.
    pub connections: AuthService<ConnectionsServiceServer<ConnectionsApi>>,
    gateway: Arc<Gateway>,
}

impl GatewayServer {
    /// Builds the gateway.
    #[must_use]
    pub fn build(dependencies: Dependencies) -> Self {
        let Dependencies {
            store,
            clock,
            authenticator,
            auth,
            router,
            progress,
            others,
            metrics,
            traces,
            options,
            open_watches,
        } = dependencies;
        let options = Arc::new(options);
        let metrics = GatewayMetrics::new(&metrics);
        let upstreams = Arc::new(Upstreams::new(router, progress, options.max_message_bytes));
        let registry = Arc::new(ConnectionRegistry::new(
            upgrade::gateway_name(clock.now()),
            store.clone(),
            clock.clone(),
            options.clone(),
            metrics.clone(),
        ));
        let gateway = Arc::new(Gateway {
            options,
            clock,
            authenticator,
            audit: auth.audit().clone(),
            fanout: Arc::new(Fanout::new(upstreams.clone(), metrics.clone())),
            upstreams,
            registry,
            metrics,
            traces,
            open_watches,
        });
        let api =
            ConnectionsServiceServer::new(ConnectionsApi::new(gateway.clone(), store, others));
        let http = axum::Router::new().route("/ws", any(upgrade::open)).with_state(gateway.clone());
        Self { http, connections: auth.wrap(api), gateway }
    }

    /// Runs the background tasks until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        let Gateway { registry, fanout, .. } = &*self.gateway;
        tokio::join!(
            registry.sweep(shutdown.clone()),
            registry.flush_registrations(shutdown.clone()),
            fanout.run(shutdown),
        );
    }

    /// Closes every connection. Returns once all clients have disconnected, or after `limit`.
    pub async fn drain(&self, limit: Duration) {
        self.gateway.registry.drain(self.gateway.options.reconnect_after);
        if timeout(limit, self.gateway.registry.wait_until_empty()).await.is_err() {
            tracing::warn!("some clients did not disconnect in time");
        }
    }
}
