//! Discovers services in other processes, which are resolved by name and called over HTTP/2.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use http::{HeaderName, Request};
use streamer_rpc::{Channel, SERVICE_TOKEN, remote};
use tokio::{
    net::lookup_host,
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Code, Status, body::Body, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::{Service as _, ServiceExt};

use crate::{Instance, Instances, Service, ServiceToken};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time after which a silent instance is pinged. The connection is closed if the instance does not respond within
/// [`KEEP_ALIVE_TIMEOUT`].
const KEEP_ALIVE: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(6);
/// Interval between health probes of an instance.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);
/// Number of consecutive failed probes after which watches at an instance end. With the interval and timeout of probes,
/// watches end in less than 5 s.
const MAX_FAILED_PROBES: u32 = 2;
/// Window of a stream, in bytes. The connection has the maximum window, so that a stream that is not
/// read does not block the others.
const HTTP2_WINDOW: u32 = 512 * 1024;
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum window size that RFC 9113 allows, in bytes.
pub const MAX_HTTP2_WINDOW: u32 = (1 << 31) - 1;

/// Discovers the instances of a service.
pub(crate) struct Discovery {
    service: Service,
    /// Configured entries, in the form HOST:PORT.
    entries: Vec<String>,
    token: ServiceToken,
    resolve_interval: Duration,
    list: watch::Sender<Arc<[Instance]>>,
}

impl Discovery {
    pub(crate) fn new(
        service: Service,
        entries: &[String],
        token: ServiceToken,
        resolve_interval: Duration,
    ) -> Self {
        let entries = entries.iter().map(|entry| entry.trim_start_matches("http://").to_owned());
        let list = watch::Sender::new(Arc::from([]));
        Self { service, entries: entries.collect(), token, resolve_interval, list }
    }

    pub(crate) fn instances(&self) -> Instances {
        Instances::of(self.service, self.list.subscribe())
    }

    /// Resolves the names at an interval and probes the instances until `shutdown` is cancelled.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let probing = AbortOnDropHandle::new(tokio::spawn(probe_all(self.list.subscribe())));
        self.resolve_all(shutdown).await;
        drop(probing);
    }

    async fn resolve_all(self, shutdown: CancellationToken) {
        let mut known: HashMap<String, Vec<SocketAddr>> = HashMap::new();
        let mut ticks = interval(self.resolve_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            for entry in &self.entries {
                match resolve(entry).await {
                    Ok(addresses) => {
                        known.insert(entry.clone(), addresses);
                    }
                    // The known addresses are kept: the name may resolve later, and probes detect failed instances.
                    Err(error) => {
                        let service = self.service;
                        tracing::warn!(%error, %service, entry, "failed to resolve a configured address");
                    }
                }
            }
            self.publish(known.values().flatten().copied());
        }
    }

    /// Publishes the instances. Unchanged instances keep their channels.
    fn publish(&self, addresses: impl Iterator<Item = SocketAddr>) {
        let before = self.list.borrow().clone();
        let names: BTreeMap<String, SocketAddr> =
            addresses.map(|address| (address.to_string(), address)).collect();
        let unchanged = before.len() == names.len()
            && before.iter().all(|instance| names.contains_key(&*instance.name));
        if unchanged {
            return;
        }
        let mut instances = Vec::with_capacity(names.len());
        for (name, address) in names {
            match before.iter().find(|instance| *instance.name == *name) {
                Some(instance) => instances.push(instance.clone()),
                None => match connect(address, self.token.clone()) {
                    Ok(channel) => instances.push(Instance::new(&name, channel)),
                    Err(error) => tracing::error!(%error, name, "invalid address of an instance"),
                },
            }
        }
        let service = self.service;
        let names: Vec<_> = instances.iter().map(|instance| &*instance.name).collect();
        tracing::info!(%service, ?names, "instances changed");
        self.list.send_replace(instances.into());
    }
}

async fn resolve(entry: &str) -> io::Result<Vec<SocketAddr>> {
    match timeout(RESOLVE_TIMEOUT, lookup_host(entry)).await {
        Ok(found) => Ok(found?.collect()),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Probes every instance until the future is dropped, so that an unresponsive instance is detected before calls to it
/// fail, and is called again once it responds.
async fn probe_all(list: watch::Receiver<Arc<[Instance]>>) {
    let mut ticks = interval(PROBE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failures: HashMap<Arc<str>, u32> = HashMap::new();
    loop {
        ticks.tick().await;
        let instances = list.borrow().clone();
        let probes = join_all(instances.iter().map(probe)).await;
        failures.retain(|name, _| instances.iter().any(|instance| instance.name == *name));
        let any_healthy = probes.contains(&Probe::Serving);
        for (instance, probe) in instances.iter().zip(probes) {
            instance.record_reachable(probe == Probe::Serving);
            let failed = failures.entry(instance.name.clone()).or_default();
            *failed = match probe {
                Probe::Serving => 0,
                Probe::NotServing => MAX_FAILED_PROBES,
                Probe::Failed => *failed + 1,
            };
            // If all probes fail, possibly because of this process, watches cannot move to a healthy instance.
            instance.set_healthy(*failed < MAX_FAILED_PROBES || !any_healthy);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Probe {
    Serving,
    NotServing,
    Failed,
}

async fn probe(instance: &Instance) -> Probe {
    let mut client = HealthClient::new(instance.channel.clone());
    let response = timeout(PROBE_TIMEOUT, client.check(HealthCheckRequest::default())).await;
    match response {
        Ok(Ok(response)) if response.get_ref().status() == ServingStatus::Serving => Probe::Serving,
        Ok(Ok(_)) => Probe::NotServing,
        Ok(Err(status)) => {
            if status.code() == Code::Unauthenticated && instance.is_reachable() {
                let name = &*instance.name;
                tracing::error!(%status, name, "an instance has a different secret (peers.shared_secret_file)");
            }
            Probe::Failed
        }
        Err(_) => Probe::Failed,
    }
}

/// Returns a channel that connects on first use and reconnects as needed.
fn connect(address: SocketAddr, token: ServiceToken) -> Result<Channel, tonic::transport::Error> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(HTTP2_WINDOW)
        .initial_connection_window_size(MAX_HTTP2_WINDOW)
        .connect_lazy();
    let name = HeaderName::from_static(SERVICE_TOKEN);
    let service = tower::service_fn(move |mut request: Request<Body>| {
        request.headers_mut().insert(name.clone(), token.own());
        let mut channel = channel.clone();
        async move {
            let channel = channel.ready().await.map_err(unavailable)?;
            channel.call(request).await.map_err(unavailable)
        }
    });
    Ok(remote(service))
}

/// Returns a status that hides the address of the service from callers; logs show the source.
fn unavailable(error: tonic::transport::Error) -> Status {
    let mut status = Status::unavailable("a service is unreachable; try again");
    status.set_source(Arc::new(error));
    status
}
