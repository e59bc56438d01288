//! Assembles all services in one process, or runs a single service.
//!
//! Both modes use the same constructors of the services. In one process, the services call each other
//! through generated clients over in-process channels.

mod assembly;
mod connection_limiter;
mod discovery;
mod grpc_middleware;
mod incoming_body;
mod listener;
mod routes;
mod service_options;
mod tenant_limits;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use streamer_auth::{DevKey, DevKeyError, KeyError, NewToken};
use streamer_config::{Config, StoreEngine};
use streamer_core::{Clock, SystemClock};
use streamer_handler::Handlers;
use streamer_store::StoreError;
use streamer_store_dynamodb::OpenError;
use streamer_telemetry::{Metrics, Traces};
use tokio::{
    net::{TcpListener, UdpSocket},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    assembly::{Plan, Services},
    connection_limiter::{ConnectionLimiter, ConnectionLimits},
    listener::Server,
};

pub use service_options::dynamo_options;

/// Connection limits of the metrics address.
const METRICS_CONNECTIONS: ConnectionLimits = ConnectionLimits { total: 128, per_address: 64 };
/// Timeout for writing the last audit records.
const AUDIT_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Selects the services that a process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// All services.
    All,
    /// The gateway, which serves clients.
    Gateway,
    /// The router, which admits requests.
    Router,
    /// The processor, which runs requests.
    Processor,
    /// The progress service, which serves the event log.
    Progress,
}

impl Role {
    /// Returns whether the process runs the given service.
    fn has(self, service: Self) -> bool {
        self == Self::All || self == service
    }
}

/// Reason why the server cannot start.
#[derive(Debug)]
pub enum StartError {
    /// The store cannot be opened.
    Store(StoreError),
    /// The DynamoDB store cannot be opened.
    Open(OpenError),
    /// The service token cannot be loaded.
    Secret(String),
    /// The configured store engine cannot be shared by separate processes.
    Engine,
    /// No peer is configured for a required service, which does not run in this process.
    Peers(&'static str),
    /// A key cannot be used.
    Key(KeyError),
    /// The development key cannot be used.
    DevKey(DevKeyError),
    /// `server.metrics_listen` is not a valid address.
    MetricsAddress(String),
    /// The threads for handlers cannot be started.
    Threads(io::Error),
    /// The server cannot listen on the address.
    Listen(SocketAddr, io::Error),
    /// The audit log cannot be opened.
    Audit(PathBuf, io::Error),
    /// The server is not ready after all resources were opened.
    Unhealthy(String),
    /// The schema for reflection cannot be read. The tests ensure that this error does not occur.
    Reflection(String),
}

impl std::fmt::Display for StartError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Store(error) => write!(formatter, "cannot open the store: {error}"),
            Self::Open(error) => write!(formatter, "cannot open the store: {error}"),
            Self::Secret(error) => write!(formatter, "peers.shared_secret_file: {error}"),
            Self::Engine => formatter
                .write_str("store.engine: must be dynamodb for services in separate processes"),
            Self::Peers(service) => write!(formatter, "peers.{service}: is required"),
            Self::Key(error) => write!(formatter, "auth.keys, auth.jwks_url: {error}"),
            Self::DevKey(error) => write!(formatter, "{error}"),
            Self::MetricsAddress(text) => {
                write!(formatter, "server.metrics_listen: must be ADDRESS:PORT, is {text:?}")
            }
            Self::Threads(error) => write!(formatter, "cannot start threads for handlers: {error}"),
            Self::Listen(address, error) => {
                write!(formatter, "cannot listen on {address}: {error}")
            }
            Self::Audit(path, error) => {
                write!(formatter, "audit.file: cannot open {}: {error}", path.display())
            }
            Self::Unhealthy(error) => write!(formatter, "{error}"),
            Self::Reflection(error) => write!(formatter, "cannot serve reflection: {error}"),
        }
    }
}

impl StartError {
    /// Returns whether the error is caused by the configuration.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Open(error) => error.is_usage(),
            Self::Secret(_)
            | Self::Engine
            | Self::Peers(_)
            | Self::Key(_)
            | Self::Audit(..)
            | Self::MetricsAddress(_) => true,
            Self::Store(_)
            | Self::DevKey(_)
            | Self::Threads(_)
            | Self::Listen(..)
            | Self::Unhealthy(_)
            | Self::Reflection(_) => false,
        }
    }
}

impl std::error::Error for StartError {}

/// A running server.
pub struct AllInOne {
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    dev_key: Option<DevKey>,
    clock: Arc<dyn Clock>,
    services: Arc<Services>,
    drain_timeout: Duration,
    shutdown: Shutdown,
    /// Task that serves connections. It ends with the last connection.
    serving: JoinHandle<()>,
    tasks: Vec<JoinHandle<()>>,
}

/// Steps of the shutdown, in order.
#[derive(Clone, Default)]
pub(crate) struct Shutdown {
    /// Cancelled to stop accepting connections; pending calls may complete.
    pub(crate) accepting: CancellationToken,
    /// Cancelled to stop accepting work; running attempts may complete.
    pub(crate) working: CancellationToken,
    /// Cancelled to end all remaining calls and tasks.
    pub(crate) serving: CancellationToken,
    /// Cancelled after the last task that calls other services has ended.
    pub(crate) ended: CancellationToken,
}

impl AllInOne {
    /// Opens the store, builds the services and serves them. Returns when the server is ready.
    ///
    /// # Errors
    /// Returns an error if the configuration is invalid or a required resource is unavailable.
    pub async fn start(
        config: &Config,
        handlers: Handlers,
        role: Role,
        traces: Traces,
    ) -> Result<Self, StartError> {
        check_role(config, role)?;
        // The port is opened first: this step fails most often, and nothing has been changed yet.
        let (listener, address) = listen(config.server.listen).await?;
        let metrics_listener = match config.server.metrics_listen.as_str() {
            "" => None,
            text => {
                let address = text.parse().map_err(|_| StartError::MetricsAddress(text.into()))?;
                Some(listen(address).await?)
            }
        };
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let shutdown = Shutdown::default();
        let own_address = match config.peers.advertise_address.as_str() {
            "" => advertised_address(address, config).await.to_string(),
            // Formats the address in the same way as the addresses of peers.
            text => match text.parse::<SocketAddr>() {
                Ok(advertised) => advertised.to_string(),
                Err(_) => text.to_owned(),
            },
        };
        let plan = Plan { config, role, handlers, clock: clock.clone(), own_address, traces };
        let (services, dev_key) = Services::build(plan, &shutdown).await?;
        let services = Arc::new(services);
        let mut tasks = services.clone().spawn(&shutdown);
        if let (Role::All, Some(router)) = (role, &services.router) {
            router.ready().await;
        }
        let healthy = match role {
            Role::All => services.health.check_now().await,
            // The other services may not be running yet.
            _ => services.health.check_store().await,
        };
        healthy.map_err(StartError::Unhealthy)?;
        let router = services.routes()?;
        let server = services.server(config);
        let serving =
            tokio::spawn(listener::serve(listener, router, server.clone(), shutdown.clone()));
        let metrics_address = metrics_listener.as_ref().map(|(_, address)| *address);
        if let Some((listener, _)) = metrics_listener {
            let router = services.metrics_routes();
            // Connections to the metrics address have a separate limit.
            let connections = ConnectionLimiter::new(METRICS_CONNECTIONS, &Metrics::new());
            let server = Server { connections, ..server };
            tasks.push(tokio::spawn(listener::serve(listener, router, server, shutdown.clone())));
        }
        let drain_timeout = config.server.drain_timeout;
        Ok(Self {
            address,
            metrics_address,
            dev_key,
            clock,
            services,
            drain_timeout,
            shutdown,
            serving,
            tasks,
        })
    }

    /// Returns the address on which the server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the address of the metrics; `None` if they have no separate address.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Returns a token signed with the development key; `None` if the server uses other keys.
    #[must_use]
    pub fn dev_token(&self, token: &NewToken) -> Option<String> {
        let dev_key = self.dev_key.as_ref()?;
        dev_key.sign(token, self.clock.now()).ok()
    }

    /// Replaces the tenant limits with those of `config`. The other options of `config` have no effect.
    pub fn replace_limits(&self, config: &Config) {
        tenant_limits::replace(&self.services.tenant_limits, config);
    }

    /// Disconnects clients, lets running work complete within the drain timeout, and closes the store.
    pub async fn stop(mut self) {
        self.shutdown.accepting.cancel();
        self.services.health.not_serving().await;
        self.shutdown.working.cancel();
        if let Some(gateway) = &self.services.gateway {
            gateway.drain(self.drain_timeout).await;
        }
        if let Some(progress) = &self.services.progress {
            progress.drain();
        }
        // Pending calls complete, or are cancelled after the timeout.
        let timed_out = timeout(self.drain_timeout, &mut self.serving).await.is_err();
        self.shutdown.serving.cancel();
        if timed_out {
            tracing::warn!("some calls did not complete in time");
            self.tasks.push(self.serving);
        }
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task failed during shutdown");
            }
        }
        self.shutdown.ended.cancel();
        let audit = self.services.auth.audit().clone();
        // `flush` only waits for the writer thread.
        drop(tokio::task::spawn_blocking(move || audit.flush(AUDIT_FLUSH_TIMEOUT)).await);
    }
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |error| StartError::Listen(address, error);
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Returns the address at which other processes reach a listener on `address`. If `address` is
/// unspecified, returns the source address of the route to those processes, which a datagram socket
/// provides without sending a packet.
async fn advertised_address(address: SocketAddr, config: &Config) -> SocketAddr {
    if !address.ip().is_unspecified() {
        return address;
    }
    // The peers come first, because they connect to this process. The last address belongs to no machine
    // and selects the default route.
    let endpoint = config.dynamodb.endpoint.trim_start_matches("http://");
    let peers = config.peers.progress.iter().map(|peer| peer.trim_start_matches("http://"));
    for other in peers.chain([endpoint, "192.0.2.1:9"]) {
        let Ok(socket) = UdpSocket::bind((address.ip(), 0)).await else { continue };
        if socket.connect(other).await.is_ok()
            && let Ok(local) = socket.local_addr()
            && !local.ip().is_loopback()
        {
            return SocketAddr::new(local.ip(), address.port());
        }
    }
    address
}

/// Checks the options that a service in a separate process requires.
fn check_role(config: &Config, role: Role) -> Result<(), StartError> {
    if role == Role::All {
        return Ok(());
    }
    if config.store.engine != StoreEngine::Dynamodb {
        return Err(StartError::Engine);
    }
    if config.peers.shared_secret_file.is_empty() && !config.server.listen.ip().is_loopback() {
        let reason = "is required unless server.listen is a loopback address".to_owned();
        return Err(StartError::Secret(reason));
    }
    let peers = &config.peers;
    let needed: &[(&'static str, &[String])] = match role {
        Role::Gateway => &[("router", &peers.router), ("progress", &peers.progress)],
        Role::Router => &[("processor", &peers.processor), ("progress", &peers.progress)],
        Role::Processor | Role::Progress => &[("progress", &peers.progress)],
        Role::All => &[],
    };
    match needed.iter().find(|(_, entries)| entries.is_empty()) {
        Some((service, _)) => Err(StartError::Peers(service)),
        None => Ok(()),
    }
}
