//! Builds the services from a configuration and connects them.

use std::sync::Arc;

use streamer_auth::{
    Audit, AuthLayer, Authenticator, DEV_AUDIENCE, DEV_ISSUER, DevKey, JwksRefresh, JwksSource,
    TokenRules, VerificationKey,
};
use streamer_config::{Config, StoreEngine};
use streamer_core::{Clock, LimitsByTenant, OpenWatches};
use streamer_gateway::{GatewayServer, PeerGateways};
use streamer_handler::Handlers;
use streamer_processor::{HandlerThreads, Processor};
use streamer_progress::{Progress, Ring};
use streamer_router::{PeerRouters, Router};
use streamer_rpc::{Instance, Instances, local};
use streamer_store::Store;
use streamer_store_dynamodb::DynamoStore;
use streamer_telemetry::{Metrics, Traces};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    Role, Shutdown, StartError,
    connection_limiter::{ConnectionLimiter, ConnectionLimits},
    discovery::{PeerList, ServiceToken},
    grpc_middleware::GrpcProxy,
    incoming_body::UndecodedBudget,
    listener::{Options, Server},
    routes::{Health, MetricsAccess, ReadinessCheck},
    service_options::{dynamo_options, gateway_options, limits, processor_options, size},
    tenant_limits,
};

/// Maximum number of file descriptors that is assumed, even if the system's limit is higher.
const MAX_DESCRIPTORS: usize = 1 << 20;
/// Minimum number of bytes by which `server.max_undecoded_bytes` exceeds the size of four messages of maximum size.
const UNDECODED_MARGIN: usize = 64 * 1024 * 1024;

/// Services that run in this process, and their shared state.
pub(crate) struct Services {
    pub(crate) router: Option<Router>,
    pub(crate) processor: Option<Processor>,
    pub(crate) progress: Option<Progress>,
    pub(crate) gateway: Option<GatewayServer>,
    /// Forwards calls to public services of other processes.
    pub(crate) proxy: Option<GrpcProxy>,
    /// Authenticates services in separate processes.
    pub(crate) token: Option<ServiceToken>,
    pub(crate) role: Role,
    pub(crate) health: Health,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
    pub(crate) auth: AuthLayer,
    pub(crate) metrics_access: MetricsAccess,
    pub(crate) max_message_bytes: usize,
    pub(crate) tenant_limits: LimitsByTenant,
}

/// Input from which the services are built.
pub(crate) struct Plan<'a> {
    pub(crate) config: &'a Config,
    pub(crate) role: Role,
    pub(crate) handlers: Handlers,
    pub(crate) clock: Arc<dyn Clock>,
    /// Address at which other processes reach this process.
    pub(crate) own_address: String,
    pub(crate) traces: Traces,
}

/// Services that run in other processes.
struct RemotePeers {
    lists: Vec<PeerList>,
    gateway: Instances,
    router: Instances,
    processor: Instances,
    progress: Instances,
}

impl RemotePeers {
    fn new(config: &Config, role: Role, token: &ServiceToken) -> Self {
        let peers = &config.peers;
        let interval = peers.dns_refresh_interval;
        // Peers that this process does not call are not probed.
        let list = |service, entries: &[String], called_by: &[Role]| {
            let entries = if called_by.contains(&role) { entries } else { &[] };
            PeerList::new(service, entries, token.clone(), interval)
        };
        let lists = vec![
            list("gateway", &peers.gateway, &[Role::Gateway]),
            list("router", &peers.router, &[Role::Gateway, Role::Router]),
            list("processor", &peers.processor, &[Role::Gateway, Role::Router]),
            list("progress service", &peers.progress, &[role]),
        ];
        Self {
            gateway: lists[0].members(),
            router: lists[1].members(),
            processor: lists[2].members(),
            progress: lists[3].members(),
            lists,
        }
    }
}

impl Services {
    pub(crate) async fn build(
        plan: Plan<'_>,
        shutdown: &Shutdown,
    ) -> Result<(Self, Option<DevKey>), StartError> {
        let Plan { config, role, handlers, clock, own_address, traces } = plan;
        let metrics = Metrics::new();
        traces.register(&metrics);
        let (store, largest) = open_store(config, &metrics).await?;
        let (authenticator, dev_key) = authenticator(config, clock.clone())?;
        let auth = AuthLayer::new(authenticator.clone(), audit(config, &clock, &metrics)?);
        let limits = limits(config, largest);
        let tenant_limits = tenant_limits::new(config);
        tenant_limits::register(&tenant_limits, &metrics);
        let open_watches = Arc::new(OpenWatches::new(tenant_limits.clone()));
        let single_process = role == Role::All;
        let load = || ServiceToken::load(&config.peers.shared_secret_file, &config.server.data_dir);
        let token = (!single_process).then(load).transpose().map_err(StartError::Secret)?;
        let remote_peers = token.as_ref().map(|token| RemotePeers::new(config, role, token));

        let (serving, is_serving) = watch::channel(true);
        let progress = role.has(Role::Progress).then(|| {
            Progress::build(streamer_progress::Dependencies {
                store: store.clone(),
                clock: clock.clone(),
                auth: auth.clone(),
                metrics: metrics.clone(),
                limits,
                ring: remote_peers.as_ref().map(|all| Ring {
                    own: own_address.clone(),
                    members: all.progress.clone(),
                    serving: is_serving.clone(),
                }),
                open_watches: open_watches.clone(),
                // The limit must allow a message of the maximum size.
                max_unread_bytes: size(config.limits.max_unread_watch_bytes.0)
                    .max(limits.max_message_bytes().saturating_mul(2)),
                is_shared: config.store.engine == StoreEngine::Dynamodb,
            })
        });
        let (event_log, progress_channel) = match (&progress, &remote_peers) {
            (_, Some(all)) => (
                all.progress.channel(limits.max_batch_bytes()),
                all.progress.channel(limits.max_message_bytes()),
            ),
            (Some(local_service), None) => {
                (local(local_service.internal.clone()), local(local_service.public.clone()))
            }
            (None, None) => return Err(StartError::Peers("progress")),
        };
        let handler_threads = role.has(Role::Processor).then(HandlerThreads::start);
        let handler_threads = handler_threads.transpose().map_err(StartError::Threads)?;
        let processor = handler_threads.map(|handler_threads| {
            Processor::build(streamer_processor::Dependencies {
                store: store.clone(),
                clock: clock.clone(),
                authenticator: authenticator.clone(),
                auth: auth.clone(),
                handlers,
                handler_threads,
                progress: event_log.clone(),
                metrics: metrics.clone(),
                traces: traces.clone(),
                options: processor_options(config, limits, !single_process),
            })
        });
        let processors = match (&processor, &remote_peers) {
            (_, Some(all)) => all.processor.clone(),
            (Some(local_service), None) => {
                Instances::one("processor", local(local_service.internal.clone()))
            }
            (None, None) => return Err(StartError::Peers("processor")),
        };
        let router = role.has(Role::Router).then(|| {
            Router::build(streamer_router::Dependencies {
                store: store.clone(),
                clock: clock.clone(),
                auth: auth.clone(),
                processors: processors.clone(),
                event_log,
                progress: progress_channel.clone(),
                metrics: metrics.clone(),
                limits,
                tenant_limits: tenant_limits.clone(),
                others: remote_peers.as_ref().map(|all| PeerRouters {
                    own: own_address.clone(),
                    members: all.router.clone(),
                }),
                hints: config.execution.push_notifications,
            })
        });
        let router_channel = match (&router, &remote_peers) {
            (_, Some(all)) => all.router.channel(limits.max_message_bytes()),
            (Some(local_service), None) => local(local_service.public.clone()),
            (None, None) => return Err(StartError::Peers("router")),
        };
        let gateway = role.has(Role::Gateway).then(|| {
            GatewayServer::build(streamer_gateway::Dependencies {
                store: store.clone(),
                clock: clock.clone(),
                authenticator: authenticator.clone(),
                auth: auth.clone(),
                router: router_channel.clone(),
                progress: progress_channel.clone(),
                others: remote_peers.as_ref().map(|all| PeerGateways {
                    own: own_address.clone(),
                    members: all.gateway.clone(),
                }),
                metrics: metrics.clone(),
                traces: traces.clone(),
                options: gateway_options(config, limits),
                open_watches,
            })
        });
        let proxy = (role == Role::Gateway).then(|| GrpcProxy {
            router: router_channel,
            progress: progress_channel,
            processor: processors.streaming_channel(),
            clock,
            auth: auth.clone(),
        });
        let mut readiness_checks: Vec<ReadinessCheck> = Vec::new();
        if let Some(all) = &remote_peers {
            let needed: &[&Instances] = match role {
                Role::Gateway => &[&all.router, &all.progress],
                Role::Router | Role::Processor => &[&all.progress],
                Role::Progress | Role::All => &[],
            };
            readiness_checks.extend(needed.iter().map(|members| any_healthy((*members).clone())));
        }
        if let Some(router) = &router {
            let is_ready = router.readiness();
            readiness_checks.push(Box::new(move || {
                if is_ready() { Ok(()) } else { Err("no action is registered yet".into()) }
            }));
        }
        for list in remote_peers.into_iter().flat_map(|all| all.lists) {
            tokio::spawn(list.run(shutdown.ended.clone()));
        }
        let services = Self {
            router,
            processor,
            progress,
            gateway,
            proxy,
            token,
            role,
            health: Health::new(store, role, readiness_checks, serving),
            metrics,
            traces,
            auth,
            metrics_access: MetricsAccess {
                has_separate_address: !config.server.metrics_listen.is_empty(),
                needs_operator: config.server.metrics_require_operator,
            },
            max_message_bytes: limits.max_message_bytes(),
            tenant_limits,
        };
        Ok((services, dev_key))
    }

    /// Returns the state that the connections of a listener share.
    pub(crate) fn server(&self, config: &Config) -> Server {
        let section = &config.server;
        let total = match size(section.max_connections) {
            0 => (descriptors() / 5 * 4).max(16),
            limit => limit.min(descriptors()),
        };
        let per_address = match size(section.max_connections_per_address) {
            0 => (total / 10 * 9).max(1),
            per_address => per_address,
        };
        let limits = ConnectionLimits { total, per_address };
        let connections = ConnectionLimiter::new(limits, &self.metrics);
        let undecoded = match self.role {
            // The limit must allow messages of the maximum size.
            Role::All | Role::Gateway => size(section.max_undecoded_bytes.0)
                .max(self.max_message_bytes.saturating_mul(4).saturating_add(UNDECODED_MARGIN)),
            // Only services call these roles, and services limit the bytes that they send.
            Role::Router | Role::Processor | Role::Progress => usize::MAX,
        };
        let timeout = section.body_timeout;
        Server {
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
fn descriptors() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit
        .and_then(|limit| usize::try_from(limit).ok())
        .unwrap_or(MAX_DESCRIPTORS)
        .min(MAX_DESCRIPTORS)
}

/// Opens the audit log as configured in the section `audit`.
fn audit(config: &Config, clock: &Arc<dyn Clock>, metrics: &Metrics) -> Result<Audit, StartError> {
    let dropped = metrics.counter(
        "streamer_audit_dropped",
        "Audit records dropped because the log could not be written fast enough",
    );
    let path = config.audit.file.as_path();
    let on_dropped = move || {
        dropped.inc();
    };
    let opened = Audit::open(path, clock.clone(), on_dropped);
    opened.map_err(|error| StartError::Audit(path.to_owned(), error))
}

/// Returns a check that passes if at least one instance of a service is known and healthy.
fn any_healthy(members: Instances) -> ReadinessCheck {
    Box::new(move || {
        let all = members.all();
        let service = members.service();
        if all.is_empty() {
            return Err(format!("no {service} is known"));
        }
        if all.iter().any(Instance::is_reachable) {
            return Ok(());
        }
        Err(format!("no {service} is reachable"))
    })
}

/// Opens the store. Returns the store and the maximum size of a value, if the engine limits it.
async fn open_store(
    config: &Config,
    metrics: &Metrics,
) -> Result<(Arc<dyn Store>, Option<usize>), StartError> {
    if config.store.engine == StoreEngine::Dynamodb {
        let options = dynamo_options(config);
        let store = DynamoStore::open(&options, metrics).await.map_err(StartError::Open)?;
        let largest = store.max_value_bytes();
        return Ok((Arc::new(store), largest));
    }
    let store = streamer_store_sqlite::open(&config.server.data_dir).map_err(StartError::Store)?;
    Ok((store, None))
}

fn authenticator(
    config: &Config,
    clock: Arc<dyn Clock>,
) -> Result<(Arc<Authenticator>, Option<DevKey>), StartError> {
    let auth = &config.auth;
    let leeway = auth.leeway;
    if auth.uses_dev_key() {
        let dev_key =
            DevKey::load_or_create(&config.server.data_dir).map_err(StartError::DevKey)?;
        let key = dev_key.verification_key().map_err(StartError::Key)?;
        let rules = TokenRules {
            issuers: vec![DEV_ISSUER.to_owned()],
            audiences: vec![DEV_AUDIENCE.to_owned()],
            tenants: auth.tenants.clone(),
            leeway,
            max_token_bytes: size(auth.max_token_bytes.0),
            ..TokenRules::default()
        };
        let authenticator = Authenticator::new(vec![key], None, rules, clock);
        return Ok((Arc::new(authenticator), Some(dev_key)));
    }
    let mut keys = Vec::new();
    for key in &auth.keys {
        let (algorithm, file) = key.split_once(':').unwrap_or((key, ""));
        let key = VerificationKey::from_file(algorithm, file.as_ref()).map_err(StartError::Key)?;
        keys.push(key);
    }
    let jwks = match auth.jwks_url.as_str() {
        "" => None,
        url => {
            let refresh = JwksRefresh {
                max_age: auth.jwks_max_age,
                min_interval: auth.jwks_min_refresh_interval,
                max_outage: auth.jwks_max_stale,
            };
            Some(JwksSource::new(url, refresh).map_err(StartError::Key)?)
        }
    };
    let rules = TokenRules {
        issuers: auth.issuers.clone(),
        audiences: auth.audiences.clone(),
        tenants: auth.tenants.clone(),
        tenant_claim: auth.tenant_claim.clone(),
        permissions_claim: auth.permissions_claim.clone(),
        leeway,
        max_token_bytes: size(auth.max_token_bytes.0),
    };
    Ok((Arc::new(Authenticator::new(keys, jwks, rules, clock)), None))
}
