//! Builds the services from a configuration and connects them.

use std::sync::Arc;

use streamer_auth::{AuthLayer, Authenticator, DevKey};
use streamer_cluster::{Instances, Peers, Service, ServiceToken};
use streamer_config::{Config, StoreEngine};
use streamer_core::{Clock, Limits, LimitsByTenant, OpenWatches};
use streamer_gateway::{GatewayServer, PeerGateways};
use streamer_handler::Handlers;
use streamer_processor::{HandlerThreads, Processor};
use streamer_progress::{Progress, Ring};
use streamer_router::{PeerRouters, Router};
use streamer_rpc::{Channel, RpcMetrics, local};
use streamer_store::Store;
use streamer_telemetry::{ActionLabelOptions, Metrics, Telemetry, Traces};
use tokio::{sync::watch, task::JoinHandle};

use crate::server::{
    addresses, authentication,
    connection_limiter::{ConnectionLimiter, ConnectionLimits},
    error::StartError,
    health::{Health, ReadinessCheck},
    incoming_body::UndecodedBudget,
    listener::{ListenerState, Options},
    process_metrics,
    role::Role,
    service_options::{gateway_options, limits, processor_options, size},
    shutdown::Shutdown,
    store_engine, tenant_limits,
};

/// Maximum number of file descriptors that is assumed, even if the system's limit is higher.
const MAX_FILE_DESCRIPTORS: usize = 1 << 20;
/// Minimum number of bytes by which `server.max_undecoded_bytes` exceeds the size of four messages of maximum size.
const UNDECODED_MARGIN: usize = 64 * 1024 * 1024;

/// Services that run in this process, and their shared state.
pub(crate) struct Services {
    pub(crate) router: Option<Router>,
    pub(crate) processor: Option<Processor>,
    pub(crate) progress: Option<Progress>,
    pub(crate) gateway: Option<GatewayServer>,
    /// Authenticates services in separate processes.
    pub(crate) service_token: Option<ServiceToken>,
    pub(crate) role: Role,
    pub(crate) health: Health,
    pub(crate) metrics: Metrics,
    pub(crate) rpc_metrics: RpcMetrics,
    pub(crate) traces: Traces,
    pub(crate) auth: AuthLayer,
    pub(crate) metrics_access: MetricsAccess,
    pub(crate) max_message_bytes: usize,
    pub(crate) tenant_limits: LimitsByTenant,
}

/// Access to the metrics.
#[derive(Clone, Copy)]
pub(crate) struct MetricsAccess {
    /// Whether the metrics have a separate address (`server.metrics_listen`).
    pub(crate) has_separate_address: bool,
    /// Whether the metrics require the token of an operator (`server.metrics_require_operator`).
    pub(crate) needs_operator: bool,
}

/// Input from which the services are built.
pub(crate) struct Plan<'a> {
    pub(crate) config: &'a Config,
    pub(crate) role: Role,
    pub(crate) handlers: Handlers,
    pub(crate) clock: Arc<dyn Clock>,
    /// Address at which other processes reach this process.
    pub(crate) own_address: String,
    pub(crate) telemetry: Telemetry,
}

/// Dependencies that the services of a process share.
struct Shared<'a> {
    config: &'a Config,
    role: Role,
    clock: Arc<dyn Clock>,
    own_address: String,
    store: Arc<dyn Store>,
    authenticator: Arc<Authenticator>,
    auth: AuthLayer,
    metrics: Metrics,
    rpc_metrics: RpcMetrics,
    traces: Traces,
    limits: Limits,
    tenant_limits: LimitsByTenant,
    open_watches: Arc<OpenWatches>,
    /// Services in other processes; `None` if all services run in this process.
    peers: Option<Peers>,
}

impl Shared<'_> {
    /// Returns a channel for unary and watch calls to a service: to its instances in other processes, or to the
    /// given one in this process.
    fn channel(
        &self,
        service: Service,
        max_message_bytes: usize,
        local_channel: Option<Channel>,
    ) -> Result<Channel, StartError> {
        match &self.peers {
            Some(peers) => Ok(peers.instances(service).channel(max_message_bytes)),
            None => local_channel.ok_or(StartError::Peers(service)),
        }
    }

    fn progress(&self, serving: watch::Receiver<bool>) -> Progress {
        let max_unread_bytes = size(self.config.limits.max_unread_watch_bytes.0);
        Progress::build(streamer_progress::Dependencies {
            store: self.store.clone(),
            clock: self.clock.clone(),
            auth: self.auth.clone(),
            metrics: self.metrics.clone(),
            limits: self.limits,
            ring: self.peers.as_ref().map(|peers| Ring {
                own: self.own_address.clone(),
                instances: peers.instances(Service::Progress),
                serving,
            }),
            open_watches: self.open_watches.clone(),
            // The limit must allow a message of the maximum size.
            max_unread_bytes: max_unread_bytes
                .max(self.limits.max_message_bytes().saturating_mul(2)),
            is_shared: self.config.store.engine == StoreEngine::Dynamodb,
        })
    }

    fn processor(&self, handlers: Handlers, event_log: Channel) -> Result<Processor, StartError> {
        Ok(Processor::build(streamer_processor::Dependencies {
            store: self.store.clone(),
            clock: self.clock.clone(),
            authenticator: self.authenticator.clone(),
            auth: self.auth.clone(),
            handlers,
            handler_threads: HandlerThreads::start().map_err(StartError::Threads)?,
            event_log,
            metrics: self.metrics.clone(),
            traces: self.traces.clone(),
            options: processor_options(self.config, self.limits, self.peers.is_some()),
        }))
    }

    fn router(&self, processors: Instances, event_log: Channel, progress: Channel) -> Router {
        Router::build(streamer_router::Dependencies {
            store: self.store.clone(),
            clock: self.clock.clone(),
            auth: self.auth.clone(),
            processors,
            event_log,
            progress,
            metrics: self.metrics.clone(),
            limits: self.limits,
            tenant_limits: self.tenant_limits.clone(),
            peers: self.peers.as_ref().map(|peers| PeerRouters {
                own: self.own_address.clone(),
                instances: peers.instances(Service::Router),
            }),
            push_notifications: self.config.execution.push_notifications,
        })
    }

    fn gateway(&self, router: Channel, progress: Channel) -> GatewayServer {
        let peers = self.peers.as_ref();
        GatewayServer::build(streamer_gateway::Dependencies {
            store: self.store.clone(),
            clock: self.clock.clone(),
            authenticator: self.authenticator.clone(),
            auth: self.auth.clone(),
            router,
            progress,
            processor: peers.map(|peers| peers.instances(Service::Processor).streaming_channel()),
            peers: peers.map(|peers| PeerGateways {
                own: self.own_address.clone(),
                instances: peers.instances(Service::Gateway),
            }),
            metrics: self.metrics.clone(),
            traces: self.traces.clone(),
            options: gateway_options(self.config, self.limits),
            open_watches: self.open_watches.clone(),
        })
    }
}

impl Services {
    pub(crate) async fn build(
        plan: Plan<'_>,
        shutdown: &Shutdown,
    ) -> Result<(Self, Option<DevKey>), StartError> {
        let Plan { config, role, handlers, clock, own_address, telemetry } = plan;
        let metrics = Metrics::with_action_labels(ActionLabelOptions {
            limit: size(config.server.metrics_max_actions),
            has_tenant_actions: config.server.metrics_tenant_actions,
        });
        process_metrics::register(&metrics, clock.now());
        telemetry.register(&metrics);
        let (store, max_value_bytes) = store_engine::open(config, &metrics).await?;
        let (authenticator, dev_key) = authentication::authenticator(config, clock.clone())?;
        let audit = authentication::audit(config, &clock, &metrics)?;
        let tenant_limits = tenant_limits::new(config);
        tenant_limits::register(&tenant_limits, &metrics);
        let (service_token, peers) = match role {
            Role::All => (None, None),
            Role::Only(service) => {
                let (file, data) = (&config.peers.shared_secret_file, &config.server.data_dir);
                let service_token = ServiceToken::load(file, data).map_err(StartError::Secret)?;
                let entries = |callee| addresses::configured(config, callee);
                let interval = config.peers.dns_refresh_interval;
                let peers = Peers::new(service, entries, &service_token, interval);
                (Some(service_token), Some(peers))
            }
        };
        let shared = Shared {
            auth: AuthLayer::new(authenticator.clone(), audit),
            open_watches: Arc::new(OpenWatches::new(tenant_limits.clone())),
            limits: limits(config, max_value_bytes),
            config,
            role,
            clock,
            own_address,
            store,
            authenticator,
            rpc_metrics: RpcMetrics::new(&metrics),
            metrics,
            traces: telemetry.traces,
            tenant_limits,
            peers,
        };
        let services = Self::build_services(shared, handlers, service_token, shutdown)?;
        Ok((services, dev_key))
    }

    /// Builds the services of the role, each with channels to those that it calls.
    fn build_services(
        shared: Shared<'_>,
        handlers: Handlers,
        service_token: Option<ServiceToken>,
        shutdown: &Shutdown,
    ) -> Result<Self, StartError> {
        let role = shared.role;
        let (limits, server) = (shared.limits, &shared.config.server);
        let (serving, serving_updates) = watch::channel(true);
        let progress = role.has(Service::Progress).then(|| shared.progress(serving_updates));
        let event_log_channel = shared.channel(
            Service::Progress,
            limits.max_batch_bytes(),
            progress.as_ref().map(|progress| local(progress.internal.clone(), &shared.rpc_metrics)),
        )?;
        let progress_channel = shared.channel(
            Service::Progress,
            limits.max_message_bytes(),
            progress.as_ref().map(|progress| local(progress.public.clone(), &shared.rpc_metrics)),
        )?;
        let processor = role.has(Service::Processor);
        let processor = processor.then(|| shared.processor(handlers, event_log_channel.clone()));
        let processor = processor.transpose()?;
        let processors = match (&processor, &shared.peers) {
            (_, Some(peers)) => peers.instances(Service::Processor),
            (Some(processor), None) => Instances::one(
                Service::Processor,
                local(processor.internal.clone(), &shared.rpc_metrics),
            ),
            (None, None) => return Err(StartError::Peers(Service::Processor)),
        };
        let router = role
            .has(Service::Router)
            .then(|| shared.router(processors, event_log_channel, progress_channel.clone()));
        let router_channel = shared.channel(
            Service::Router,
            limits.max_message_bytes(),
            router.as_ref().map(|router| local(router.public.clone(), &shared.rpc_metrics)),
        )?;
        let gateway = role.has(Service::Gateway);
        let gateway = gateway.then(|| shared.gateway(router_channel, progress_channel));
        let mut readiness_checks: Vec<ReadinessCheck> = Vec::new();
        if let Some(peers) = shared.peers {
            readiness_checks.push(Box::new(peers.readiness()));
            peers.spawn(&shutdown.ended);
        }
        if let Some(router) = &router {
            let is_ready = router.readiness();
            readiness_checks.push(Box::new(move || {
                if is_ready() { Ok(()) } else { Err("no action is registered yet".into()) }
            }));
        }
        Ok(Self {
            router,
            processor,
            progress,
            gateway,
            service_token,
            role,
            health: Health::new(shared.store, role, readiness_checks, serving),
            metrics: shared.metrics,
            rpc_metrics: shared.rpc_metrics,
            traces: shared.traces,
            auth: shared.auth,
            metrics_access: MetricsAccess {
                has_separate_address: !server.metrics_listen.is_empty(),
                needs_operator: server.metrics_require_operator,
            },
            max_message_bytes: limits.max_message_bytes(),
            tenant_limits: shared.tenant_limits,
        })
    }

    /// Returns the state that the connections of a listener share.
    pub(crate) fn listener_state(&self, config: &Config) -> ListenerState {
        let section = &config.server;
        let total = match size(section.max_connections) {
            0 => (max_file_descriptors() / 5 * 4).max(16),
            limit => limit.min(max_file_descriptors()),
        };
        let per_address = match size(section.max_connections_per_address) {
            0 => (total / 10 * 9).max(1),
            per_address => per_address,
        };
        let limits = ConnectionLimits { total, per_address };
        let connections = ConnectionLimiter::new(limits, &self.metrics);
        let undecoded = match self.role {
            // The limit must allow messages of the maximum size.
            Role::All | Role::Only(Service::Gateway) => size(section.max_undecoded_bytes.0)
                .max(self.max_message_bytes.saturating_mul(4).saturating_add(UNDECODED_MARGIN)),
            // Only services call these roles, and services limit the bytes that they send.
            Role::Only(Service::Router | Service::Processor | Service::Progress) => usize::MAX,
        };
        let timeout = section.body_timeout;
        ListenerState {
            options: Options::new(config, self.role),
            connections,
            undecoded: UndecodedBudget::new(undecoded, timeout, &self.metrics),
        }
    }

    /// Starts the background tasks.
    pub(crate) fn spawn(self: Arc<Self>, shutdown: &Shutdown) -> Vec<JoinHandle<()>> {
        let mut tasks = Vec::new();
        let (services, stop) = (self.clone(), shutdown.working.clone());
        tasks.push(tokio::spawn(async move {
            if let Some(processor) = &services.processor {
                processor.run(stop).await;
            }
        }));
        let (services, stop) = (self.clone(), shutdown.serving.clone());
        tasks.push(tokio::spawn(async move {
            if let Some(router) = &services.router {
                router.run(stop).await;
            }
        }));
        let (services, stop) = (self.clone(), shutdown.serving.clone());
        tasks.push(tokio::spawn(async move {
            if let Some(progress) = &services.progress {
                progress.run(stop).await;
            }
        }));
        let (services, stop) = (self.clone(), shutdown.serving.clone());
        tasks.push(tokio::spawn(async move {
            if let Some(gateway) = &services.gateway {
                gateway.run(stop).await;
            }
        }));
        let limits = self.tenant_limits.clone();
        tasks.push(tokio::spawn(tenant_limits::rotate_use(limits, shutdown.serving.clone())));
        let stop = shutdown.serving.clone();
        tasks.push(tokio::spawn(async move { self.health.watch(stop).await }));
        tasks
    }
}

/// Returns the maximum number of file descriptors that this process may open.
fn max_file_descriptors() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit
        .and_then(|limit| usize::try_from(limit).ok())
        .unwrap_or(MAX_FILE_DESCRIPTORS)
        .min(MAX_FILE_DESCRIPTORS)
}
