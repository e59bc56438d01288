//! Services in other processes, as one process sees them.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::{Instance, Instances, Need, Service, ServiceToken, discovery::Discovery};

/// Known instances of all services in other processes.
pub struct Peers {
    caller: Service,
    /// In the order of [`Service::ALL`].
    discoveries: [Discovery; Service::ALL.len()],
}

impl Peers {
    /// Returns the peers of a process that runs `caller`. `entries` returns the configured addresses of a service,
    /// in the form HOST:PORT. Services that `caller` does not call are not resolved.
    pub fn new<'a>(
        caller: Service,
        entries: impl Fn(Service) -> &'a [String],
        token: &ServiceToken,
        resolve_interval: Duration,
    ) -> Self {
        let is_called = |service| caller.calls().iter().any(|call| call.callee == service);
        let discovery = |service| {
            let entries = if is_called(service) { entries(service) } else { &[] };
            Discovery::new(service, entries, token.clone(), resolve_interval)
        };
        Self { caller, discoveries: Service::ALL.map(discovery) }
    }

    /// Returns the instances of a service.
    #[must_use]
    pub fn instances(&self, service: Service) -> Instances {
        self.discoveries[service as usize].instances()
    }

    /// Returns a check that fails, with the reason, while no instance of a service is reachable without which
    /// the caller is not ready.
    pub fn readiness(&self) -> impl Fn() -> Result<(), String> + Send + Sync + use<> {
        let calls = self.caller.calls().iter().filter(|call| call.need == Need::Reachable);
        let needed: Vec<_> = calls.map(|call| self.instances(call.callee)).collect();
        move || needed.iter().try_for_each(any_reachable)
    }

    /// Resolves names and probes instances in the background until `shutdown` is cancelled.
    pub fn spawn(self, shutdown: &CancellationToken) {
        for discovery in self.discoveries {
            tokio::spawn(discovery.run(shutdown.clone()));
        }
    }
}

fn any_reachable(instances: &Instances) -> Result<(), String> {
    let all = instances.all();
    let service = instances.service();
    if all.is_empty() {
        return Err(format!("no instance of {service} is known"));
    }
    if all.iter().any(Instance::is_reachable) {
        return Ok(());
    }
    Err(format!("no instance of {service} is reachable"))
}
