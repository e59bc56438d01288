//! Every service in one process, on one port: wiring only.
//!
//! The services are built by the same constructors that separate processes use and meet as
//! generated clients over in-process channels; nothing here knows how any of them works.

mod edge;
mod http;
mod peers;
mod serve;
mod wiring;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use streamer_auth::{DevKey, DevKeyError, KeyError, NewToken};
use streamer_config::Config;
use streamer_core::{Clock, SystemClock};
use streamer_dynamodb::OpenError;
use streamer_handler::Handlers;
use streamer_store::StoreError;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::wiring::{Plan, Services};

pub use wiring::dynamo_options;

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
    /// The address cannot be listened on.
    Listen(SocketAddr, io::Error),
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
            Self::Key(error) => write!(formatter, "{error}"),
            Self::DevKey(error) => write!(formatter, "{error}"),
            Self::Listen(address, error) => {
                write!(formatter, "cannot listen on {address}: {error}")
            }
            Self::Unhealthy(error) => write!(formatter, "{error}"),
            Self::Reflection(error) => write!(formatter, "cannot serve reflection: {error}"),
        }
    }
}

impl std::error::Error for StartError {}

/// A running server.
pub struct AllInOne {
    address: SocketAddr,
    dev_key: Option<DevKey>,
    clock: Arc<dyn Clock>,
    services: Arc<Services>,
    drain_timeout: Duration,
    shutdown: Shutdown,
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
    ) -> Result<Self, StartError> {
        check_role(config, role)?;
        // The port first: the commonest obstacle, and nothing is touched when it is taken.
        let listener = TcpListener::bind(config.server.listen)
            .await
            .map_err(|error| StartError::Listen(config.server.listen, error))?;
        let address = listener
            .local_addr()
            .map_err(|error| StartError::Listen(config.server.listen, error))?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let shutdown = Shutdown::default();
        let own_address = match config.peers.advertise.as_str() {
            "" => address.to_string(),
            advertised => advertised.to_owned(),
        };
        let plan = Plan { config, role, handlers, clock: clock.clone(), own_address };
        let (services, dev_key) = Services::build(plan, &shutdown).await?;
        let services = Arc::new(services);
        let mut tasks = services.clone().spawn(&shutdown);
        if let (Role::All, Some(router)) = (role, &services.router) {
            router.ready().await;
        }
        // The others need not be there yet.
        services.health.check_store().await.map_err(StartError::Unhealthy)?;
        let router = services.http()?;
        tasks.push(tokio::spawn(serve::serve(
            listener,
            router,
            serve::Options::from(config),
            shutdown.clone(),
        )));
        let drain_timeout = Duration::from_millis(config.server.drain_timeout_ms);
        Ok(Self { address, dev_key, clock, services, drain_timeout, shutdown, tasks })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A token signed with the development key; `None` when other keys are in use.
    #[must_use]
    pub fn dev_token(&self, token: &NewToken) -> Option<String> {
        let dev_key = self.dev_key.as_ref()?;
        dev_key.sign(token, self.clock.now()).ok()
    }

    /// Sends clients away, lets running work end within the drain timeout, and closes the store.
    pub async fn stop(self) {
        self.shutdown.accepting.cancel();
        self.services.health.not_serving().await;
        self.shutdown.working.cancel();
        if let Some(gateway) = &self.services.gateway {
            gateway.drain(self.drain_timeout).await;
        }
        self.shutdown.serving.cancel();
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a part of the server failed while stopping");
            }
        }
    }
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
