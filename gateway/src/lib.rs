//! The edge: WebSocket to gRPC.
//!
//! Outside clients speak subprotocol `streamer.v1.json` here (DESIGN §8); inside, the gateway is a
//! client of router and progress like any other and carries the user's token on every call. It
//! keeps no state that matters: a client that loses its gateway goes on at another with
//! `after_seq`. One upstream watch serves all local watchers of a request; each of them is a cursor
//! into frames that were encoded once, so that a slow one costs only itself.

mod api;
mod buffers;
mod connection;
mod elsewhere;
mod handle;
mod hub;
mod json;
mod large_segments;
mod messages;
mod metrics;
mod peers;
mod protocol;
mod registry;
mod server;
mod topic;
mod ws;

use std::{sync::Arc, time::Duration};

use axum::routing::any;
use streamer_auth::{AuthLayer, AuthService, Authenticator};
use streamer_core::{Clock, OpenWatches};
use streamer_proto::connections::v1::connections_service_server::ConnectionsServiceServer;
use streamer_rpc::{Channel, Members};
use streamer_store::Store;
use streamer_telemetry::{Metrics, Traces};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    api::ConnectionsApi, hub::Hub, metrics::GatewayMetrics, peers::Peers, registry::Registry,
    server::Gateway,
};

/// What the operator sets.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Origins whose pages may connect; empty means pages of this machine only, `*` all.
    pub allowed_origins: Vec<String>,
    /// Connections in all.
    pub max_connections: usize,
    /// Connections of one user.
    pub max_connections_per_user: usize,
    /// Connections from one address.
    pub max_connections_per_address: usize,
    /// Subscriptions of one connection.
    pub max_subscriptions: usize,
    /// Unanswered calls of one connection; beyond that it is not read from.
    pub max_in_flight: usize,
    /// Messages a second from one connection; 0 for no limit.
    pub messages_per_second: u32,
    /// Messages at once beyond that rate.
    pub message_burst: u32,
    /// Bytes of messages of clients that are not whole, in all.
    pub max_buffered_bytes: usize,
    /// The same, of one user.
    pub max_buffered_bytes_per_user: usize,
    /// How long a message may take to come, once it has begun.
    pub message_timeout: Duration,
    /// Largest message from a client.
    pub max_message_bytes: usize,
    /// A quiet client is pinged so often, and dropped after twice that.
    pub heartbeat: Duration,
    /// A socket that takes nothing for so long, though something waits, is closed.
    pub slow_consumer_timeout: Duration,
    /// How long turning a client away may take.
    pub handshake_timeout: Duration,
    /// What clients are told to wait, at most, before they come back after a drain.
    pub reconnect_after: Duration,
}

/// What the gateway needs.
pub struct Dependencies {
    /// Where connections are noted.
    pub store: Arc<dyn Store>,
    /// For timestamps.
    pub clock: Arc<dyn Clock>,
    /// Verifies tokens.
    pub authenticator: Arc<Authenticator>,
    /// The same, in front of gRPC services, with the audit log.
    pub auth: AuthLayer,
    /// To the router.
    pub router: Channel,
    /// To the progress service.
    pub progress: Channel,
    /// All gateways, where there are others.
    pub others: Option<OtherGateways>,
    /// Where metrics go.
    pub metrics: Metrics,
    /// Where traces go, and which requests are traced.
    pub traces: Traces,
    /// What the operator sets.
    pub options: GatewayOptions,
    /// How many watches tenants and users have open in this process.
    pub open_watches: Arc<OpenWatches>,
}

/// The gateways beside this one.
#[derive(Clone)]
pub struct OtherGateways {
    /// The name of this one among the members.
    pub own: String,
    /// All of them.
    pub members: Members,
}

/// The gateway, ready to be served.
pub struct GatewayServer {
    /// `GET /ws`. Must be served over plain TCP by hyper-util's auto server, with upgrades.
    pub http: axum::Router,
    /// For services that speak to connected users: `streamer.connections.v1`.
    pub connections: AuthService<ConnectionsServiceServer<ConnectionsApi>>,
    gateway: Arc<Gateway>,
}

impl GatewayServer {
    /// Wires the service.
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
        let peers = Arc::new(Peers::new(router, progress, options.max_message_bytes));
        let registry = Arc::new(Registry::new(
            server::gateway_name(clock.now()),
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
            hub: Arc::new(Hub::new(peers.clone(), metrics.clone())),
            peers,
            registry,
            metrics,
            traces,
            open_watches,
        });
        let api =
            ConnectionsServiceServer::new(ConnectionsApi::new(gateway.clone(), store, others));
        let http = axum::Router::new().route("/ws", any(server::open)).with_state(gateway.clone());
        Self { http, connections: auth.wrap(api), gateway }
    }

    /// Looks after connections until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        let Gateway { registry, hub, .. } = &*self.gateway;
        tokio::join!(
            registry.sweep(shutdown.clone()),
            registry.keep_notes(shutdown.clone()),
            hub.run(shutdown),
        );
    }

    /// Sends every client elsewhere; returns once all have gone, or after `limit`.
    pub async fn drain(&self, limit: Duration) {
        self.gateway.registry.drain(self.gateway.options.reconnect_after);
        if timeout(limit, self.gateway.registry.empty()).await.is_err() {
            tracing::warn!("some clients did not close in time");
        }
    }
}
