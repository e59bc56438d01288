//! Request admission: authenticates, authorises and validates requests, then runs or queues them. Also
//! serves queries, cancellation, redrive and the API for operators.
//!
//! The router writes each request to the store, so that it accepts requests while every processor is down;
//! its subsequent notifications to the processors and the progress service are hints. It validates input
//! before it changes any state, and reports all violations together.

mod admin_service;
mod admission;
mod await_outcome;
mod backup_stream;
mod cancellation;
mod catalog;
mod change_limiter;
mod checked_submission;
mod compiled_schemas;
mod error;
mod metrics;
mod operations;
mod permission;
mod queue_position;
mod quota;
mod redrive;
mod request_service;
mod router_service;
mod submission_check;
mod submission_rates;
mod upstreams;

use std::{sync::Arc, time::Duration};

use futures_util::future::OptionFuture;
use streamer_auth::{AuthLayer, AuthService};
use streamer_cluster::Instances;
use streamer_core::{Clock, Limits, LimitsByTenant};
use streamer_proto::{
    admin::v1::admin_service_server::AdminServiceServer,
    internal::v1::admission_service_server::AdmissionServiceServer,
    longrunning::operations_server::OperationsServer, stubs::RouterServiceEndpoint,
};
use streamer_rpc::Channel;
use streamer_store::Store;
use streamer_telemetry::Metrics;
use tokio_util::sync::CancellationToken;

use crate::{
    admin_service::AdminApi,
    catalog::Catalog,
    change_limiter::ChangeLimiter,
    metrics::RouterMetrics,
    operations::OperationsApi,
    request_service::{RequestService, SubmissionOrder},
    router_service::RouterApi,
    submission_rates::{SubmissionRates, exchange_reports},
    upstreams::Upstreams,
};

pub use submission_rates::{AdmissionApi, PeerRouters};

/// Dependencies of the router.
pub struct Dependencies {
    /// The request store.
    pub store: Arc<dyn Store>,
    /// The source of timestamps.
    pub clock: Arc<dyn Clock>,
    /// Authenticates calls to the public services.
    pub auth: AuthLayer,
    /// Instances of the processor's internal API.
    pub processors: Instances,
    /// Channel to the internal API of the progress service.
    pub event_log: Channel,
    /// Channel to the public API of the progress service.
    pub progress: Channel,
    /// The metrics registry.
    pub metrics: Metrics,
    /// Size limits for payloads and results.
    pub limits: Limits,
    /// Rate limits and quotas of tenants and users.
    pub tenant_limits: LimitsByTenant,
    /// This router and its peers; `None` if this router is the only one.
    pub peers: Option<PeerRouters>,
    /// Whether processors are notified of new requests, with hints.
    pub push_notifications: bool,
}

/// Maximum number of bytes by which a `ListActions` response may exceed the payload limit: 1 MiB for the
/// tenant's schemas, 1 MiB for the schemas shared by all tenants, and the other fields.
const ACTIONS_BYTES: usize = 3 * 1024 * 1024;

/// Retention period of an action that no processor offers. Processors use the same period.
const ACTION_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);

/// The router's gRPC services and background tasks.
pub struct Router {
    /// The public API `streamer.router.v1`.
    pub public: AuthService<RouterServiceEndpoint<RouterApi>>,
    /// The public API `google.longrunning`.
    pub operations: AuthService<OperationsServer<OperationsApi>>,
    /// The public API `streamer.admin.v1`.
    pub admin: AuthService<AdminServiceServer<AdminApi>>,
    /// The internal API `streamer.internal.v1`, which other routers call.
    pub internal: AdmissionServiceServer<AdmissionApi>,
    peers: Option<PeerRouters>,
    service: Arc<RequestService>,
}

impl Router {
    /// Creates a router from its dependencies.
    #[must_use]
    pub fn build(dependencies: Dependencies) -> Self {
        let max_message_bytes = dependencies.limits.max_message_bytes();
        let upstreams = Arc::new(Upstreams::new(
            dependencies.processors,
            dependencies.event_log,
            dependencies.progress,
            dependencies.limits,
            dependencies.push_notifications,
        ));
        let submissions = Arc::new(SubmissionRates::new(dependencies.tenant_limits.clone()));
        let own_name = dependencies.peers.as_ref().map(|peers| peers.own.clone());
        let admission = AdmissionApi::new(
            submissions.clone(),
            dependencies.clock.clone(),
            own_name.unwrap_or_default(),
        );
        let auth = dependencies.auth;
        let admin =
            AdminApi::new(dependencies.store.clone(), dependencies.clock.clone(), auth.clone());
        let service = Arc::new(RequestService {
            store: dependencies.store,
            clock: dependencies.clock,
            upstreams,
            catalog: Arc::new(Catalog::default()),
            metrics: Arc::new(RouterMetrics::new(&dependencies.metrics)),
            limits: dependencies.limits,
            changes: ChangeLimiter::default(),
            order: SubmissionOrder::default(),
            submissions,
            tenant_limits: dependencies.tenant_limits,
        });
        let public = RouterServiceEndpoint::new(RouterApi::new(service.clone()))
            .max_decoding_message_size(max_message_bytes)
            .max_encoding_message_size(
                max_message_bytes.saturating_mul(2).saturating_add(ACTIONS_BYTES),
            );
        let operations = OperationsServer::new(OperationsApi::new(service.clone()))
            .max_encoding_message_size(max_message_bytes.saturating_mul(2));
        Self {
            public: auth.wrap(public),
            operations: auth.wrap(operations),
            admin: auth.wrap(AdminServiceServer::new(admin)),
            internal: AdmissionServiceServer::new(admission),
            peers: dependencies.peers,
            service,
        }
    }

    /// Watches the action lists of all processors and exchanges rate reports until `shutdown` is cancelled.
    pub async fn run(&self, shutdown: CancellationToken) {
        let RequestService { catalog, upstreams, store, clock, submissions, .. } = &*self.service;
        let since = clock.now().minus(ACTION_RETENTION);
        let peers = self.peers.clone();
        let reports = peers.map(|peers| exchange_reports(submissions, peers, shutdown.clone()));
        let catalog = catalog.follow(upstreams, &**store, since, shutdown);
        tokio::join!(catalog, OptionFuture::from(reports));
    }

    /// Returns a readiness check that reports whether the action catalog is loaded.
    pub fn readiness(&self) -> impl Fn() -> bool + Send + Sync + 'static {
        let catalog = self.service.catalog.clone();
        move || catalog.is_loaded()
    }

    /// Waits until the action catalog is loaded.
    pub async fn ready(&self) {
        self.service.catalog.ready().await;
    }
}
