//! Every service in one process, or one of them: wiring only.
//!
//! The services are built by the same constructors that separate processes use and meet as
//! generated clients over in-process channels; nothing here knows how any of them works.

mod connections;
mod edge;
mod http;
mod incoming_body;
mod peers;
mod sections;
mod serve;
mod tenant_limits;
mod wiring;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use streamer_auth::{DevKey, DevKeyError, KeyError, NewToken};
use streamer_config::Config;
use streamer_core::{Clock, SystemClock};
use streamer_dynamodb::OpenError;
use streamer_handler::Handlers;
use streamer_store::StoreError;
use streamer_telemetry::{Metrics, Traces};
use tokio::{
    net::{TcpListener, UdpSocket},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    connections::{ConnectionLimits, Connections},
    serve::Server,
    wiring::{Plan, Services},
};

pub use sections::dynamo_options;

/// Connections to the address of the metrics.
const METRICS_CONNECTIONS: ConnectionLimits = ConnectionLimits { all: 128, from_one_address: 64 };
/// Longest wait for the last audit records to be written.
const AUDIT_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Which services a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// All of them.
    All,
    /// The edge.
    Gateway,
    /// Admission.
    Router,
    /// Execution.
    Processor,
    /// The event log.
    Progress,
}

impl Role {
    /// Whether this service is among them.
    fn has(self, service: Self) -> bool {
        self == Self::All || self == service
    }
}

/// Why the server does not start.
#[derive(Debug)]
pub enum StartError {
    /// The store cannot be opened.
    Store(StoreError),
    /// The store over DynamoDB cannot be opened.
    Open(OpenError),
    /// The secret of the services cannot be used.
    Secret(String),
    /// Processes cannot share the embedded engine.
    Engine,
    /// A service is neither here nor elsewhere.
    Peers(&'static str),
    /// A key cannot be used.
    Key(KeyError),
    /// The development key cannot be used.
    DevKey(DevKeyError),
    /// `server.metrics_listen` is no address.
    MetricsAddress(String),
    /// The threads for handlers cannot be started.
    Threads(io::Error),
    /// The address cannot be listened on.
    Listen(SocketAddr, io::Error),
    /// The audit log cannot be opened.
    Audit(PathBuf, io::Error),
    /// It cannot do its job, though everything could be opened.
    Unhealthy(String),
    /// The schema for reflection cannot be read, which a build that passed its tests rules out.
    Reflection(String),
}

impl std::fmt::Display for StartError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Store(error) => write!(formatter, "cannot open the store: {error}"),
            Self::Open(error) => write!(formatter, "cannot open the store: {error}"),
            Self::Secret(error) => write!(formatter, "peers.secret_file: {error}"),
            Self::Engine => formatter
                .write_str("store.engine: must be dynamodb for services in processes of their own"),
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
    /// Whether it is the configuration that is wrong.
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
    /// Ends when the last connection has.
    serving: JoinHandle<()>,
    tasks: Vec<JoinHandle<()>>,
}

/// The steps of stopping, in their order.
#[derive(Clone, Default)]
pub(crate) struct Shutdown {
    /// Take no more connections; let open calls end.
    pub(crate) accepting: CancellationToken,
    /// Take no more work; let what runs end.
    pub(crate) working: CancellationToken,
    /// End everything that is left.
    pub(crate) serving: CancellationToken,
    /// Nothing is left that calls others.
    pub(crate) ended: CancellationToken,
}

impl AllInOne {
    /// Opens the store, builds the services and serves them; returns once they can do their job.
    ///
    /// # Errors
    /// When something it needs cannot be had.
    pub async fn start(
        config: &Config,
        handlers: Handlers,
        role: Role,
        traces: Traces,
    ) -> Result<Self, StartError> {
        check_role(config, role)?;
        // The port first: the commonest obstacle, and nothing is touched when it is taken.
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
        let own_address = match config.peers.advertise.as_str() {
            "" => reached_at(address, config).await.to_string(),
            // As the addresses of peers are written.
            advertised => match advertised.parse::<SocketAddr>() {
                Ok(advertised) => advertised.to_string(),
                Err(_) => advertised.to_owned(),
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
            Role::All => services.health.look().await,
            // The others need not be there yet.
            _ => services.health.check_store().await,
        };
        healthy.map_err(StartError::Unhealthy)?;
        let router = services.http()?;
        let server = services.server(config);
        let serving =
            tokio::spawn(serve::serve(listener, router, server.clone(), shutdown.clone()));
        let metrics_address = metrics_listener.as_ref().map(|(_, address)| *address);
        if let Some((listener, _)) = metrics_listener {
            let router = services.metrics();
            // Those to the public address take no places of these.
            let connections = Connections::new(METRICS_CONNECTIONS, &Metrics::new());
            let server = Server { connections, ..server };
            tasks.push(tokio::spawn(serve::serve(listener, router, server, shutdown.clone())));
        }
        let drain_timeout = Duration::from_millis(config.server.drain_timeout_ms);
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

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where metrics are served, if not there.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// A token signed with the development key; `None` when other keys are in use.
    #[must_use]
    pub fn dev_token(&self, token: &NewToken) -> Option<String> {
        let dev_key = self.dev_key.as_ref()?;
        dev_key.sign(token, self.clock.now()).ok()
    }

    /// Sets the limits of tenants as this configuration does; its other options change nothing.
    pub fn replace_limits(&self, config: &Config) {
        tenant_limits::replace(&self.services.tenant_limits, config);
    }

    /// Sends clients away, lets running work end within the drain timeout, and closes the store.
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
        // Calls that are under way end by themselves, or are cut off in the end.
        let cut_off = timeout(self.drain_timeout, &mut self.serving).await.is_err();
        self.shutdown.serving.cancel();
        if cut_off {
            tracing::warn!("some calls did not end in time");
            self.tasks.push(self.serving);
        }
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a part of the server failed while stopping");
            }
        }
        self.shutdown.ended.cancel();
        let audit = self.services.auth.audit().clone();
        // It only waits for the thread that writes.
        drop(tokio::task::spawn_blocking(move || audit.flush(AUDIT_FLUSH_TIMEOUT)).await);
    }
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |error| StartError::Listen(address, error);
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Where others reach what listens on `address`. When that is every address, it is the one from
/// which this host reaches the outside; a datagram socket knows without sending anything.
async fn reached_at(address: SocketAddr, config: &Config) -> SocketAddr {
    if !address.ip().is_unspecified() {
        return address;
    }
    // Peers first: it is them who come here. The last one is an address of no machine, for the default
    // route.
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

/// What a service that is a process of its own needs.
fn check_role(config: &Config, role: Role) -> Result<(), StartError> {
    if role == Role::All {
        return Ok(());
    }
    if config.store.engine != "dynamodb" {
        return Err(StartError::Engine);
    }
    if config.peers.secret_file.is_empty() && !config.server.listen.ip().is_loopback() {
        let reason = "is required where others can reach this process".to_owned();
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
