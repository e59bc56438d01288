//! Runs two instances of every service, each in a separate process, with one DynamoDB server.

use std::{fs, net::SocketAddr, process::Stdio, time::Duration};

use streamer_auth::{DevKey, NewToken};
use streamer_core::{Clock, SystemClock};
use tempfile::TempDir;

use crate::{
    LoopbackAddress, Process, Proxy,
    server::{dynamodb_settings, spawn_service},
};

const INSTANCES: usize = 2;

/// Service of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Stores and streams event logs.
    Progress,
    /// Runs requests.
    Processor,
    /// Admits requests.
    Router,
    /// Accepts connections from clients.
    Gateway,
}

impl Service {
    /// All services, in the order in which they are started.
    pub const ALL: [Self; 4] = [Self::Progress, Self::Processor, Self::Router, Self::Gateway];

    fn name(self) -> &'static str {
        match self {
            Self::Progress => "progress",
            Self::Processor => "processor",
            Self::Router => "router",
            Self::Gateway => "gateway",
        }
    }
}

/// A running cluster on a dedicated loopback address. Progress services are reached through proxies, which
/// can partition them.
pub struct Cluster {
    instances: Vec<Instance>,
    data: TempDir,
    proxies: Vec<Proxy>,
    _claim: LoopbackAddress,
    /// URLs of the gateways.
    pub urls: Vec<String>,
}

struct Instance {
    service: Service,
    address: SocketAddr,
    settings: Vec<String>,
    process: Process,
}

impl Cluster {
    /// Starts a cluster with the given DynamoDB endpoint and settings. `overrides` returns additional settings
    /// of a single instance, given its service and number.
    ///
    /// # Panics
    /// Panics if the cluster does not start.
    pub async fn start(
        endpoint: &str,
        settings: &[&str],
        overrides: impl Fn(Service, usize, &[Proxy]) -> Vec<String>,
    ) -> Self {
        let claim = LoopbackAddress::claim();
        let data = TempDir::with_prefix("streamer-test-").expect("a temporary folder");
        let mut common = dynamodb_settings(endpoint, data.path());
        common.extend(settings.iter().map(ToString::to_string));
        let addresses: Vec<(Service, SocketAddr)> = Service::ALL
            .into_iter()
            .flat_map(|service| [service; INSTANCES])
            .map(|service| (service, claim.next()))
            .collect();
        let addresses_of = |wanted: Service| {
            addresses.iter().filter(move |(service, _)| *service == wanted).map(|(_, at)| *at)
        };
        let mut proxies = Vec::new();
        for address in addresses_of(Service::Progress) {
            proxies.push(Proxy::start(claim.next(), address).await);
        }
        for service in Service::ALL {
            let advertised: Vec<SocketAddr> = match service {
                Service::Progress => proxies.iter().map(|proxy| proxy.address).collect(),
                _ => addresses_of(service).collect(),
            };
            common.push(peers(service.name(), &advertised));
        }
        let mut instances = Vec::new();
        for (position, (service, address)) in addresses.iter().enumerate() {
            let number = position % INSTANCES;
            let mut settings = common.clone();
            if *service == Service::Progress {
                settings.push(format!("peers.advertise_address={}", proxies[number].address));
            }
            settings.extend(overrides(*service, number, &proxies));
            let process = spawn_service(
                service.name(),
                data.path(),
                &settings,
                &[],
                *address,
                Stdio::inherit(),
            );
            instances.push(Instance { service: *service, address: *address, settings, process });
        }
        let urls =
            addresses_of(Service::Gateway).map(|address| format!("http://{address}")).collect();
        let cluster = Self { instances, data, proxies, _claim: claim, urls };
        cluster.wait_until_ready().await;
        cluster
    }

    /// Waits until every instance is ready.
    async fn wait_until_ready(&self) {
        for instance in &self.instances {
            let url = format!("http://{}", instance.address);
            wait_until_healthy(&url).await;
        }
    }

    /// Kills an instance with SIGKILL.
    ///
    /// # Panics
    /// Panics if the instance does not exist.
    pub fn kill(&mut self, service: Service, number: usize) {
        self.instance(service, number).process.kill();
    }

    /// Sends SIGTERM to an instance and waits until it exits; returns its exit code.
    ///
    /// # Panics
    /// Panics if the instance does not exist.
    pub fn stop(&mut self, service: Service, number: usize) -> Option<i32> {
        self.instance(service, number).process.stop()
    }

    /// Restarts an instance that has exited, on the same address; returns once it is ready.
    ///
    /// # Panics
    /// Panics if the instance does not start.
    pub async fn restart(&mut self, service: Service, number: usize) {
        let data = self.data.path().to_owned();
        let instance = self.instance(service, number);
        let address = instance.address;
        instance.process = spawn_service(
            service.name(),
            &data,
            &instance.settings,
            &[],
            address,
            Stdio::inherit(),
        );
        wait_until_healthy(&format!("http://{address}")).await;
    }

    /// Returns the URL of an instance.
    ///
    /// # Panics
    /// Panics if the instance does not exist.
    #[must_use]
    pub fn url(&self, service: Service, number: usize) -> String {
        let mut instances = self.instances.iter().filter(|instance| instance.service == service);
        let instance = instances.nth(number).expect("the instance exists");
        format!("http://{}", instance.address)
    }

    /// Partitions a progress service from all other services, but not from the store.
    pub fn partition(&self, number: usize) {
        self.proxies[number].pause();
    }

    /// Ends the partition of a progress service.
    pub fn heal(&self, number: usize) {
        self.proxies[number].resume();
    }

    /// Returns the token with which services authenticate to each other.
    ///
    /// # Panics
    /// Panics if the token cannot be read.
    #[must_use]
    pub fn service_token(&self) -> String {
        fs::read_to_string(self.data.path().join("service-token"))
            .expect("a service has created it")
    }

    /// Returns a token that is signed with the development key and valid for an hour.
    ///
    /// # Panics
    /// Panics if the key cannot be read.
    #[must_use]
    pub fn token(&self, tenant: &str, user: &str, permissions: &[&str]) -> String {
        let token = NewToken {
            user: user.into(),
            tenant: tenant.into(),
            permissions: permissions.iter().map(ToString::to_string).collect(),
            expires_in: Duration::from_secs(3600),
        };
        let key = DevKey::load(self.data.path()).expect("the key exists");
        key.sign(&token, SystemClock.now()).expect("the key signs")
    }

    fn instance(&mut self, service: Service, number: usize) -> &mut Instance {
        let mut instances =
            self.instances.iter_mut().filter(|instance| instance.service == service);
        instances.nth(number).expect("the instance exists")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        Process::stop_all(self.instances.iter_mut().map(|instance| &mut instance.process));
    }
}

/// Returns the setting that lists the addresses of a service.
fn peers(service: &str, addresses: &[SocketAddr]) -> String {
    let urls: Vec<_> = addresses.iter().map(|address| format!("http://{address}")).collect();
    format!("peers.{service}={}", urls.join(","))
}

/// Waits until the health check of the server returns `SERVING`.
async fn wait_until_healthy(url: &str) {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    let endpoint = tonic::transport::Endpoint::from_shared(url.to_owned()).expect("a URL");
    let mut client = HealthClient::new(endpoint.connect_lazy());
    let mut watch = loop {
        let request = HealthCheckRequest::default();
        match client.watch(request).await {
            Ok(watch) => break watch.into_inner(),
            Err(_) => tokio::task::yield_now().await,
        }
    };
    while let Some(response) = watch.message().await.expect("the watch stays open") {
        if response.status() == ServingStatus::Serving {
            return;
        }
    }
}
