//! Health checks of the server, which requires durable writes.

use std::{sync::Arc, time::Duration};

use streamer_cluster::Service;
use streamer_store::Store;
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::server::role::Role;

/// Schedule of background health checks.
const HEALTH_SCHEDULE: CheckSchedule = CheckSchedule {
    interval: Duration::from_secs(5),
    timeout: Duration::from_secs(5),
    attempts: 1,
};
/// Schedule of background health checks of a progress service. Its watches must move to a different instance
/// within 5 s of an event that it cannot read, but not because of a single slow response from the store.
const PROGRESS_HEALTH_SCHEDULE: CheckSchedule = CheckSchedule {
    interval: Duration::from_secs(1),
    timeout: Duration::from_millis(1500),
    attempts: 2,
};
/// Time for which the outcome of a health check is cached, and interval of checks while the server is not ready.
const HEALTH_CACHE: Duration = Duration::from_millis(500);

/// Checks a readiness condition in addition to the store. Returns the reason if the condition is not met.
pub(crate) type ReadinessCheck = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

struct CheckSchedule {
    interval: Duration,
    timeout: Duration,
    /// Number of consecutive failed checks that count as one failure.
    attempts: u32,
}

impl CheckSchedule {
    fn of(role: Role) -> &'static Self {
        if role == Role::Only(Service::Progress) {
            &PROGRESS_HEALTH_SCHEDULE
        } else {
            &HEALTH_SCHEDULE
        }
    }
}

/// Checks and reports the health of the server, which requires durable writes.
pub(crate) struct Health {
    store: Arc<dyn Store>,
    role: Role,
    readiness_checks: Vec<ReadinessCheck>,
    reporter: HealthReporter,
    /// Whether the latest check was successful, for services in this process.
    serving: watch::Sender<bool>,
    latest: Mutex<Option<(Instant, Result<(), String>)>>,
    stopping: CancellationToken,
}

impl Health {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        role: Role,
        readiness_checks: Vec<ReadinessCheck>,
        serving: watch::Sender<bool>,
    ) -> Self {
        Self {
            store,
            role,
            readiness_checks,
            reporter: HealthReporter::new(),
            serving,
            latest: Mutex::default(),
            stopping: CancellationToken::new(),
        }
    }

    /// Checks the health of the server, or returns the cached outcome if it is recent.
    pub(crate) async fn refresh(&self) -> Result<(), String> {
        if self.stopping.is_cancelled() {
            return Err("the server is shutting down".into());
        }
        let mut latest = self.latest.lock().await;
        if let Some((at, outcome)) = &*latest
            && at.elapsed() < HEALTH_CACHE
        {
            return outcome.clone();
        }
        let outcome = self
            .check_store()
            .await
            .and_then(|()| self.readiness_checks.iter().try_for_each(|check| check()));
        if self.stopping.is_cancelled() {
            return Err("the server is shutting down".into());
        }
        *latest = Some((Instant::now(), outcome.clone()));
        let healthy = outcome.is_ok();
        self.serving.send_if_modified(|known| std::mem::replace(known, healthy) != healthy);
        let status = if healthy { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.report(status).await;
        outcome
    }

    /// Checks the health of the server and ignores the cached outcome.
    pub(crate) async fn check_now(&self) -> Result<(), String> {
        *self.latest.lock().await = None;
        self.refresh().await
    }

    /// Checks whether the store accepts writes, which the server requires to start.
    pub(crate) async fn check_store(&self) -> Result<(), String> {
        let schedule = CheckSchedule::of(self.role);
        let mut outcome = self.check_store_once(schedule.timeout).await;
        for _ in 1..schedule.attempts {
            if outcome.is_err() {
                outcome = self.check_store_once(schedule.timeout).await;
            }
        }
        outcome
    }

    async fn check_store_once(&self, limit: Duration) -> Result<(), String> {
        match timeout(limit, self.store.check()).await {
            // Health checks are unauthenticated, so the reason is only logged.
            Ok(checked) => checked.map_err(|error| {
                tracing::debug!(%error, "failed to check the store");
                "the store does not accept writes".to_owned()
            }),
            Err(_) => Err("the store does not respond".to_owned()),
        }
    }

    /// Returns the source of the statuses that the gRPC health service reports.
    pub(crate) fn reporter(&self) -> HealthReporter {
        self.reporter.clone()
    }

    /// Returns a token that is cancelled when the server stops.
    pub(crate) fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }

    /// Reports permanently that the server does not serve.
    pub(crate) async fn set_not_serving(&self) {
        self.stopping.cancel();
        self.report(ServingStatus::NotServing).await;
    }

    async fn report(&self, status: ServingStatus) {
        let here = Service::ALL.into_iter().filter(|service| self.role.has(*service));
        // The empty name stands for the server.
        for name in here.flat_map(Service::grpc_services).copied().chain([""]) {
            self.reporter.set_service_status(name, status).await;
        }
    }

    pub(crate) async fn watch(&self, shutdown: CancellationToken) {
        let mut logged = None;
        loop {
            let outcome = self.refresh().await;
            let interval = CheckSchedule::of(self.role).interval;
            let pause = if outcome.is_ok() { interval } else { HEALTH_CACHE };
            if logged.as_ref() != Some(&outcome) && !self.stopping.is_cancelled() {
                match &outcome {
                    Ok(()) => tracing::info!("ready"),
                    Err(reason) if logged.is_none() => {
                        tracing::info!(reason, "not ready yet");
                    }
                    Err(reason) => tracing::error!(reason, "not ready"),
                }
            }
            logged = Some(outcome);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }
}
