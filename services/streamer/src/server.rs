//! A server: all services in one process, or a single service.
//!
//! Both modes use the same constructors of the services. In one process, the services call each other
//! through generated clients over in-process channels.

mod access_log;
mod addresses;
mod assembly;
mod authentication;
mod cloudwatch;
mod connection_limiter;
mod error;
mod grpc_middleware;
mod health;
mod incoming_body;
mod listener;
mod measured_store;
mod process_metrics;
mod role;
mod routes;
mod service_options;
mod shutdown;
mod store_engine;
mod tenant_limits;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use streamer_auth::{DevKey, NewToken};
use streamer_config::Config;
use streamer_core::{Clock, SystemClock};
use streamer_handler::Handlers;
use streamer_telemetry::{Metrics, Telemetry};
use tokio::{
    net::TcpListener,
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use assembly::{Plan, Services};
use cloudwatch::CloudWatch;
use connection_limiter::{ConnectionLimiter, ConnectionLimits};
use error::StartError;
use listener::ListenerState;
use shutdown::Shutdown;

pub(crate) use cloudwatch::alarms as service_alarms;
pub(crate) use role::Role;
pub(crate) use service_options::dynamo_options;
pub(crate) use streamer_gateway::ACCESS_LOG;

/// Connection limits of the metrics address.
const METRICS_CONNECTIONS: ConnectionLimits = ConnectionLimits { total: 128, per_address: 64 };
/// Time after the drain timeout within which attempts are released and all tasks end.
const TASKS_TIMEOUT: Duration = Duration::from_secs(4);
/// Timeout for writing the last audit records.
const AUDIT_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// A running server.
pub(crate) struct Server {
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

impl Server {
    /// Opens the store, builds the services and serves them. Returns when the server is listening; with all services in
    /// one process, when it is ready.
    ///
    /// # Errors
    /// Returns an error if the configuration is invalid or a required resource is unavailable.
    pub(crate) async fn start(
        config: &Config,
        handlers: Handlers,
        role: Role,
        telemetry: Telemetry,
    ) -> Result<Self, StartError> {
        addresses::check(config, role)?;
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
        let own_address = addresses::own(address, config).await;
        let plan = Plan { config, role, handlers, clock: clock.clone(), own_address, telemetry };
        let (services, dev_key) = Services::build(plan, &shutdown).await?;
        let services = Arc::new(services);
        let mut tasks = services.clone().spawn(&shutdown);
        if !config.cloudwatch.interval.is_zero() {
            let cloudwatch = CloudWatch {
                metrics: services.metrics.clone(),
                clock: clock.clone(),
                namespace: config.cloudwatch.namespace.clone(),
                service: role.trace_name(),
            };
            let stop = shutdown.serving.clone();
            let running = cloudwatch.run(config.cloudwatch.interval, std::io::stdout(), stop);
            tasks.push(tokio::spawn(running));
        }
        if let (Role::All, Some(router)) = (role, &services.router) {
            router.ready().await;
        }
        let ready = match role {
            Role::All => services.health.check_now().await,
            // The other services may not be running yet.
            Role::Only(_) => services.health.check_store().await,
        };
        ready.map_err(StartError::NotReady)?;
        let router = services.routes()?;
        let state = services.listener_state(config);
        let serving =
            tokio::spawn(listener::serve(listener, router, state.clone(), shutdown.clone()));
        let metrics_address = metrics_listener.as_ref().map(|(_, address)| *address);
        if let Some((listener, _)) = metrics_listener {
            let router = services.metrics_routes();
            // Connections to the metrics address have a separate limit.
            let connections = ConnectionLimiter::new(METRICS_CONNECTIONS, &Metrics::new());
            let state = ListenerState { connections, ..state };
            tasks.push(tokio::spawn(listener::serve(listener, router, state, shutdown.clone())));
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
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the address of the metrics; `None` if they have no separate address.
    pub(crate) fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Returns a token signed with the development key; `None` if the server uses other keys.
    pub(crate) fn dev_token(&self, token: &NewToken) -> Option<String> {
        let dev_key = self.dev_key.as_ref()?;
        dev_key.sign(token, self.clock.now()).ok()
    }

    /// Replaces the tenant limits with those of `config`. The other options of `config` have no effect.
    pub(crate) fn replace_limits(&self, config: &Config) {
        tenant_limits::replace(&self.services.tenant_limits, config);
    }

    /// Disconnects clients, lets running work complete within the drain timeout, and closes the store.
    pub(crate) async fn stop(mut self) {
        let deadline = Instant::now() + self.drain_timeout;
        self.shutdown.accepting.cancel();
        self.services.health.set_not_serving().await;
        self.shutdown.working.cancel();
        if let Some(gateway) = &self.services.gateway {
            // The rest of the time is for watches, which end after the clients of the gateway.
            gateway.drain(self.drain_timeout / 2).await;
        }
        if let Some(progress) = &self.services.progress {
            progress.drain();
        }
        // Pending calls complete, or are cancelled at the deadline.
        let timed_out = timeout_at(deadline, &mut self.serving).await.is_err();
        self.shutdown.serving.cancel();
        if timed_out {
            tracing::warn!("calls still pending after the drain timeout are cancelled");
            self.tasks.push(self.serving);
        }
        let tasks_deadline = deadline + TASKS_TIMEOUT;
        for mut task in self.tasks {
            match timeout_at(tasks_deadline, &mut task).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "a task failed during shutdown"),
                Err(_) => {
                    tracing::warn!("a task did not end in time; it is aborted");
                    task.abort();
                }
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
