//! Every service in one process, on one port: wiring only.
//!
//! The services are built by the same constructors that separate processes use and meet as
//! generated clients over in-process channels; nothing here knows how any of them works.

mod http;
mod serve;
mod wiring;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use streamer_auth::{DevKey, DevKeyError, KeyError, NewToken};
use streamer_config::Config;
use streamer_core::{Clock, SystemClock};
use streamer_handler::Handlers;
use streamer_store::StoreError;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::wiring::Services;

/// Why the server does not start.
#[derive(Debug)]
pub enum StartError {
    /// The store cannot be opened.
    Store(StoreError),
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
    pub async fn start(config: &Config, handlers: Handlers) -> Result<Self, StartError> {
        // The port first: the commonest obstacle, and nothing is touched when it is taken.
        let listener = TcpListener::bind(config.server.listen)
            .await
            .map_err(|error| StartError::Listen(config.server.listen, error))?;
        let address = listener
            .local_addr()
            .map_err(|error| StartError::Listen(config.server.listen, error))?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let (services, dev_key) = Services::build(config, handlers, clock.clone())?;
        let services = Arc::new(services);
        let shutdown = Shutdown::default();
        let mut tasks = services.clone().spawn(&shutdown);
        services.router.ready().await;
        services.health.refresh().await.map_err(StartError::Unhealthy)?;
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
        self.services.gateway.drain(self.drain_timeout).await;
        self.shutdown.serving.cancel();
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a part of the server failed while stopping");
            }
        }
    }
}
