//! Admission: authenticate, authorise, validate, run now or queue; queries; cancel.
//!
//! The router writes the request to the store itself, so that work is accepted and kept while
//! every processor is down; what it tells processor and progress afterwards are hints. It refuses
//! bad input with every broken rule at once, and then nothing has changed.

mod admission;
mod catalog;
mod change_limiter;
mod compiled_schemas;
mod front;
mod metrics;
mod operations;
mod peers;
mod queue;
mod quota;
mod redrive;
mod refusal;
mod router_service;
mod submission_rates;
mod wait;

use std::{sync::Arc, time::Duration};

use futures_util::future::OptionFuture;
use streamer_auth::{AuthLayer, AuthService};
use streamer_core::{Clock, Limits, LimitsByTenant};
use streamer_proto::{
    internal::v1::admission_service_server::AdmissionServiceServer,
    longrunning::operations_server::OperationsServer,
    router::v1::router_service_server::RouterServiceServer,
};
use streamer_rpc::{Channel, Members};
use streamer_store::Store;
use streamer_telemetry::Metrics;
use tokio_util::sync::CancellationToken;

use crate::{
    catalog::Catalog,
    change_limiter::ChangeLimiter,
    front::Front,
    metrics::RouterMetrics,
    operations::OperationsApi,
    peers::Peers,
    router_service::RouterApi,
    submission_rates::{SubmissionRates, exchange},
};

pub use submission_rates::{AdmissionApi, OtherRouters};

/// What the router needs.
pub struct Dependencies {
    /// Where requests are kept.
    pub store: Arc<dyn Store>,
    /// For timestamps.
    pub clock: Arc<dyn Clock>,
    /// In front of the public services.
    pub auth: AuthLayer,
    /// The processors' internal services.
    pub processors: Members,
    /// To the progress service's internal service.
    pub event_log: Channel,
    /// To the progress service's public service.
    pub progress: Channel,
    /// Where metrics go.
    pub metrics: Metrics,
    /// Sizes that bound payloads and results.
    pub limits: Limits,
    /// How much tenants and users may submit and have.
    pub tenant_limits: LimitsByTenant,
    /// All routers, where there are others.
    pub others: Option<OtherRouters>,
    /// Whether processors are told of new requests.
    pub hints: bool,
}

/// The largest list of actions, in bytes: 1 MiB of schemas of the tenant, as much for all tenants,
/// and what else is declared.
const ACTIONS_BYTES: usize = 3 * 1024 * 1024;

/// What nobody has offered for so long is not known any more, as the processors have it.
const ACTION_MEMORY: Duration = Duration::from_secs(30 * 24 * 3600);

/// The router, ready to be served.
pub struct Router {
    /// For everybody: `streamer.router.v1`.
    pub public: AuthService<RouterServiceServer<RouterApi>>,
    /// For everybody: `google.longrunning`.
    pub operations: AuthService<OperationsServer<OperationsApi>>,
    /// For other routers: `streamer.internal.v1`.
    pub internal: AdmissionServiceServer<AdmissionApi>,
    others: Option<OtherRouters>,
    front: Arc<Front>,
}

impl Router {
    /// Wires the service.
    #[must_use]
    pub fn build(dependencies: Dependencies) -> Self {
        let max_message_bytes = dependencies.limits.max_message_bytes();
        let peers = Arc::new(Peers::new(
            dependencies.processors,
            dependencies.event_log,
            dependencies.progress,
            dependencies.limits,
            dependencies.hints,
        ));
        let submissions = Arc::new(SubmissionRates::new(dependencies.tenant_limits.clone()));
        let own = dependencies.others.as_ref().map(|others| others.own.clone());
        let admission = AdmissionApi::new(
            submissions.clone(),
            dependencies.clock.clone(),
            own.unwrap_or_default(),
        );
        let front = Arc::new(Front {
            store: dependencies.store,
            clock: dependencies.clock,
            peers,
            catalog: Arc::new(Catalog::default()),
            metrics: RouterMetrics::new(&dependencies.metrics),
            limits: dependencies.limits,
            changes: ChangeLimiter::default(),
            submissions,
            tenant_limits: dependencies.tenant_limits,
        });
        let public = RouterServiceServer::new(RouterApi::new(front.clone()))
            .max_decoding_message_size(max_message_bytes)
            .max_encoding_message_size(
                max_message_bytes.saturating_mul(2).saturating_add(ACTIONS_BYTES),
            );
        let operations = OperationsServer::new(OperationsApi::new(front.clone()))
            .max_encoding_message_size(max_message_bytes.saturating_mul(2));
        let auth = dependencies.auth;
        Self {
            public: auth.wrap(public),
            operations: auth.wrap(operations),
            internal: AdmissionServiceServer::new(admission),
            others: dependencies.others,
            front,
        }
    }

    /// Learns which actions there are, and follows their changes until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        let Front { catalog, peers, store, clock, submissions, .. } = &*self.front;
        let since = clock.now().minus(ACTION_MEMORY);
        let others = self.others.clone();
        let reports = others.map(|others| exchange(submissions, others, shutdown.clone()));
        let catalog = catalog.follow(peers, &**store, since, shutdown);
        tokio::join!(catalog, OptionFuture::from(reports));
    }

    /// Tells whether the actions are known.
    pub fn readiness(&self) -> impl Fn() -> bool + Send + Sync + 'static {
        let catalog = self.front.catalog.clone();
        move || catalog.is_loaded()
    }

    /// Returns once the actions are known.
    pub async fn ready(&self) {
        self.front.catalog.ready().await;
    }
}
