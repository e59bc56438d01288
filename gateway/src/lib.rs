//! Gateway from WebSocket to gRPC.
//!
//! Clients connect with the subprotocol `streamer.v1.json`. The gateway is a regular client of the
//! router and progress services and sends the user's token with every call. It has no durable state:
//! a client whose gateway fails reconnects to a different gateway and resumes with `after_seq`. All
//! local subscribers of a request share one upstream watch. Each subscriber is a cursor over frames
//! that are encoded once, so that a slow subscriber delays only itself.

mod access_log;
mod buffer_budget;
mod connection;
mod connection_handle;
mod connections;
mod fanout;
mod gateway;
mod grpc_proxy;
mod large_segments;
mod metrics;
mod options;
mod protocol;
mod topic;
mod upgrade;
mod upstreams;
mod ws;

use std::{sync::Arc, time::Duration};

use axum::routing::any;
use streamer_auth::{AuthLayer, AuthService, Authenticator};
use streamer_cluster::Service;
use streamer_core::{Clock, OpenWatches};
use streamer_proto::connections::v1::connections_service_server::ConnectionsServiceServer;
use streamer_rpc::Channel;
use streamer_store::Store;
use streamer_telemetry::{Metrics, Traces};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub use access_log::ACCESS_LOG;
pub use connections::peer_gateways::PeerGateways;
pub use options::GatewayOptions;

use crate::{
    connections::{connection_registry::ConnectionRegistry, connections_service::ConnectionsApi},
    fanout::Fanout,
    gateway::Gateway,
    metrics::GatewayMetrics,
    upstreams::Upstreams,
};

/// Dependencies of the gateway.
pub struct Dependencies {
    /// The store of the connection records.
    pub store: Arc<dyn Store>,
    /// The source of timestamps.
    pub clock: Arc<dyn Clock>,
    /// Verifies tokens.
    pub authenticator: Arc<Authenticator>,
    /// Authenticates gRPC calls and writes the audit log.
    pub auth: AuthLayer,
    /// Channel to the router.
    pub router: Channel,
    /// Channel to the progress service.
    pub progress: Channel,
    /// Channel to the processors for the streams of workers, if the services run in other processes: the gateway
    /// then forwards public gRPC calls.
    pub processor: Option<Channel>,
    /// This gateway and its peers; `None` if this gateway is the only one.
    pub peers: Option<PeerGateways>,
    /// The metrics registry.
    pub metrics: Metrics,
    /// Exports traces and decides which requests are traced.
    pub traces: Traces,
    /// Gateway options.
    pub options: GatewayOptions,
    /// Registry of the open watches of tenants and users in this process.
    pub open_watches: Arc<OpenWatches>,
}

/// The gateway's HTTP and gRPC services and background tasks.
pub struct GatewayServer {
    /// The route `GET /ws`. It must be served over plain TCP by hyper-util's auto server, with upgrades.
    pub http: axum::Router,
    /// The API `streamer.connections.v1`, for services that send messages to connected users.
    pub connections: AuthService<ConnectionsServiceServer<ConnectionsApi>>,
    /// Routes of the public gRPC services of other processes; empty if all services run in this process.
    pub forwarded: axum::Router,
    gateway: Arc<Gateway>,
}

impl GatewayServer {
    /// Creates a gateway from its dependencies.
    #[must_use]
    pub fn build(dependencies: Dependencies) -> Self {
        let Dependencies {
            store,
            clock,
            authenticator,
            auth,
            router,
            progress,
            processor,
            peers,
            metrics,
            traces,
            options,
            open_watches,
        } = dependencies;
        let forwarded = processor.map_or_else(axum::Router::new, |processor| {
            let services = [
                (Service::Router, router.clone()),
                (Service::Processor, processor),
                (Service::Progress, progress.clone()),
            ];
            grpc_proxy::routes(services, clock.clone(), auth.clone())
        });
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
        let api = ConnectionsServiceServer::new(ConnectionsApi::new(gateway.clone(), store, peers));
        let http = axum::Router::new()
            .route("/ws", any(upgrade::handle_upgrade))
            .with_state(gateway.clone());
        Self { http, connections: auth.wrap(api), forwarded, gateway }
    }

    /// Returns whether the HTTP requests of the process are logged.
    #[must_use]
    pub fn logs_access(&self) -> bool {
        self.gateway.options.access_log
    }

    /// Runs the background tasks until `shutdown` is cancelled.
    pub async fn run(&self, shutdown: CancellationToken) {
        let Gateway { registry, fanout, .. } = &*self.gateway;
        tokio::join!(
            registry.sweep(shutdown.clone()),
            registry.flush_registrations(shutdown.clone()),
            fanout.run(shutdown),
        );
    }

    /// Closes every connection and waits until all clients have disconnected, at most for `limit`.
    pub async fn drain(&self, limit: Duration) {
        tracing::info!(
            connections = self.gateway.metrics.connections.get(),
            "draining: disconnecting clients"
        );
        self.gateway.registry.drain(self.gateway.options.reconnect_after);
        if timeout(limit, self.gateway.registry.wait_until_empty()).await.is_err() {
            tracing::warn!("some clients did not disconnect in time");
        }
    }
}
