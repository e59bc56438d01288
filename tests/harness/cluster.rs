//! Every service twice, each in a process of its own, over one DynamoDB.

use std::{fs, net::SocketAddr, process::Stdio, time::Duration};

use streamer_auth::{DevKey, NewToken};
use streamer_core::{Clock, SystemClock};
use tempfile::TempDir;

use crate::{
    LoopbackAddress, Process, Proxy,
    server::{dynamodb_settings, spawn_service},
};

const COPIES: usize = 2;

/// One of the services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// The event log.
    Progress,
    /// Execution.
    Processor,
    /// Admission.
    Router,
    /// The edge.
    Gateway,
}

impl Service {
    /// All of them, in the order in which they are started.
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

/// A running cluster on a loopback address of its own. Progress services stand behind proxies, which
/// can cut them off.
pub struct Cluster {
    members: Vec<Running>,
    data: TempDir,
    proxies: Vec<Proxy>,
    _claim: LoopbackAddress,
    /// URLs of the gateways.
    pub urls: Vec<String>,
}

struct Running {
    service: Service,
    address: SocketAddr,
    settings: Vec<String>,
    process: Process,
}

impl Cluster {
    /// Starts one over the DynamoDB at this endpoint, with these settings. `views` are settings for
    /// single processes, by service and number.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start(
        endpoint: &str,
        settings: &[&str],
        views: impl Fn(Service, usize, &[Proxy]) -> Vec<String>,
    ) -> Self {
        let claim = LoopbackAddress::claim();
        let data = TempDir::with_prefix("streamer-test-").expect("a temporary folder");
        let mut common = dynamodb_settings(endpoint, data.path());
        common.extend(settings.iter().map(ToString::to_string));
        let addresses: Vec<(Service, SocketAddr)> = Service::ALL
            .into_iter()
            .flat_map(|service| [service; COPIES])
            .map(|service| (service, claim.next()))
            .collect();
        let of = |wanted: Service| {
            addresses.iter().filter(move |(service, _)| *service == wanted).map(|(_, at)| *at)
        };
        let mut proxies = Vec::new();
        for address in of(Service::Progress) {
            proxies.push(Proxy::start(claim.next(), address).await);
        }
        for service in Service::ALL {
            let reached: Vec<SocketAddr> = match service {
                Service::Progress => proxies.iter().map(|proxy| proxy.address).collect(),
                _ => of(service).collect(),
            };
            common.push(peers(service.name(), &reached));
        }
        let mut members = Vec::new();
        for (position, (service, address)) in addresses.iter().enumerate() {
            let number = position % COPIES;
            let mut settings = common.clone();
            if *service == Service::Progress {
                settings.push(format!("peers.advertise={}", proxies[number].address));
            }
            settings.extend(views(*service, number, &proxies));
            let process = spawn_service(
                service.name(),
                data.path(),
                &settings,
                &[],
                *address,
                Stdio::inherit(),
            );
            members.push(Running { service: *service, address: *address, settings, process });
        }
        let urls = of(Service::Gateway).map(|address| format!("http://{address}")).collect();
        let cluster = Self { members, data, proxies, _claim: claim, urls };
        cluster.until_ready().await;
        cluster
    }

    /// Returns once every process can do its job.
    async fn until_ready(&self) {
        for member in &self.members {
            let url = format!("http://{}", member.address);
            until_healthy(&url).await;
        }
    }

    /// Kills a process with SIGKILL.
    ///
    /// # Panics
    /// When there is no such process.
    pub fn kill(&mut self, service: Service, number: usize) {
        self.member(service, number).process.kill();
    }

    /// Sends SIGTERM to a process and waits for it to end; returns its exit code.
    ///
    /// # Panics
    /// When there is no such process.
    pub fn stop(&mut self, service: Service, number: usize) -> Option<i32> {
        self.member(service, number).process.stop()
    }

    /// Starts a process that has ended again, where it was; returns once it can do its job.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn restart(&mut self, service: Service, number: usize) {
        let data = self.data.path().to_owned();
        let member = self.member(service, number);
        let address = member.address;
        member.process =
            spawn_service(service.name(), &data, &member.settings, &[], address, Stdio::inherit());
        until_healthy(&format!("http://{address}")).await;
    }

    /// The URL of a process.
    ///
    /// # Panics
    /// When there is no such process.
    #[must_use]
    pub fn url(&self, service: Service, number: usize) -> String {
        let mut members = self.members.iter().filter(|member| member.service == service);
        let member = members.nth(number).expect("there is such a process");
        format!("http://{}", member.address)
    }

    /// Lets nobody reach a progress service any more; it still reaches the store.
    pub fn cut_off(&self, number: usize) {
        self.proxies[number].cut();
    }

    /// Joins it again.
    pub fn join(&self, number: usize) {
        self.proxies[number].mend();
    }

    /// What services show each other.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn service_token(&self) -> String {
        fs::read_to_string(self.data.path().join("service-token")).expect("a service has made it")
    }

    /// A token of the development key, valid for an hour.
    ///
    /// # Panics
    /// When the key cannot be read.
    #[must_use]
    pub fn token(&self, tenant: &str, user: &str, permissions: &[&str]) -> String {
        let token = NewToken {
            user: user.into(),
            tenant: tenant.into(),
            permissions: permissions.iter().map(ToString::to_string).collect(),
            expires_in: Duration::from_secs(3600),
        };
        let key = DevKey::load(self.data.path()).expect("the key is there");
        key.sign(&token, SystemClock.now()).expect("the key signs")
    }

    fn member(&mut self, service: Service, number: usize) -> &mut Running {
        let mut members = self.members.iter_mut().filter(|member| member.service == service);
        members.nth(number).expect("there is such a process")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        Process::end_all(self.members.iter_mut().map(|member| &mut member.process));
    }
}

/// The setting that says where a service is.
fn peers(service: &str, addresses: &[SocketAddr]) -> String {
    let urls: Vec<_> = addresses.iter().map(|address| format!("http://{address}")).collect();
    format!("peers.{service}={}", urls.join(","))
}

/// Asks until the answer is that it can do its job.
async fn until_healthy(url: &str) {
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
    while let Some(answer) = watch.message().await.expect("it goes on answering") {
        if answer.status() == ServingStatus::Serving {
            return;
        }
    }
}
