//! HTTP routes of the server (gRPC, WebSocket, health and metrics) and its health checks.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use streamer_proto::PUBLIC_DESCRIPTOR_SET;
use streamer_rpc::map_message_too_large;
use streamer_store::Store;
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::util::MapResponseLayer;

use crate::{Role, StartError, assembly::Services, grpc_middleware};

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
/// Maximum size of a message to unauthenticated services (health, reflection), in bytes.
const MAX_UNAUTHENTICATED_MESSAGE: usize = 16 * 1024;
/// Maximum length of a path in a response, in characters.
const MAX_PATH_CHARS: usize = 128;
/// Content type of the OpenMetrics text format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Services with a health status and the roles that run them. The empty name stands for the server.
const SERVICES: [(&str, Option<Role>); 6] = [
    ("", None),
    ("streamer.router.v1.RouterService", Some(Role::Router)),
    ("streamer.progress.v1.ProgressService", Some(Role::Progress)),
    ("streamer.processor.v1.WorkerService", Some(Role::Processor)),
    ("streamer.connections.v1.ConnectionsService", Some(Role::Gateway)),
    ("google.longrunning.Operations", Some(Role::Router)),
];

/// Access to the metrics.
#[derive(Clone, Copy)]
pub(crate) struct MetricsAccess {
    /// Whether the metrics have a separate address (`server.metrics_listen`).
    pub(crate) has_separate_address: bool,
    /// Whether the metrics require the token of an operator (`server.metrics_require_operator`).
    pub(crate) needs_operator: bool,
}

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
        match role {
            Role::Progress => &PROGRESS_HEALTH_SCHEDULE,
            Role::All | Role::Gateway | Role::Router | Role::Processor => &HEALTH_SCHEDULE,
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
            return Err("the server is stopping".into());
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
            return Err("the server is stopping".into());
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

    /// Reports permanently that the server does not serve.
    pub(crate) async fn not_serving(&self) {
        self.stopping.cancel();
        self.report(ServingStatus::NotServing).await;
    }

    async fn report(&self, status: ServingStatus) {
        let runs_here = |of: &Option<Role>| of.is_none_or(|of| self.role.has(of));
        for (service, _) in SERVICES.iter().filter(|(_, of)| runs_here(of)) {
            self.reporter.set_service_status(service, status).await;
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

impl Services {
    /// Returns the routes of the public port.
    pub(crate) fn routes(self: &Arc<Self>) -> Result<Router, StartError> {
        let limit = self.max_message_bytes;
        let reflection =
            |error: tonic_reflection::server::Error| StartError::Reflection(error.to_string());
        let builder = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(PUBLIC_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let health = tonic_health::pb::health_server::HealthServer::new(
            tonic_health::server::HealthService::from_health_reporter(self.health.reporter.clone()),
        )
        .max_decoding_message_size(MAX_UNAUTHENTICATED_MESSAGE);
        // These services are unauthenticated and therefore have a separate message limit.
        let open = Routes::new(health)
            .add_service(
                builder()
                    .build_v1()
                    .map_err(reflection)?
                    .max_decoding_message_size(MAX_UNAUTHENTICATED_MESSAGE),
            )
            .add_service(
                builder()
                    .build_v1alpha()
                    .map_err(reflection)?
                    .max_decoding_message_size(MAX_UNAUTHENTICATED_MESSAGE),
            );
        let mut public = Routes::default();
        let mut internal = Routes::default();
        if let Some(router) = &self.router {
            public = public.add_service(router.public.clone());
            public = public.add_service(router.operations.clone());
            internal = internal.add_service(router.internal.clone());
        }
        if let Some(progress) = &self.progress {
            public = public.add_service(progress.public.clone());
            internal = internal.add_service(progress.internal.clone());
        }
        if let Some(processor) = &self.processor {
            public = public.add_service(processor.workers.clone());
            internal = internal.add_service(processor.internal.clone());
        }
        if let Some(gateway) = &self.gateway {
            public = public.add_service(gateway.connections.clone());
        }
        let mut grpc = public.into_axum_router();
        if let Some(proxy) = &self.proxy {
            grpc = grpc.merge(proxy.clone().routes());
        }
        if self.role != Role::All {
            // `grpc` has the same fallback.
            let internal = internal.into_axum_router().reset_fallback();
            grpc = grpc.merge(grpc_middleware::services_only(internal));
        }
        let grpc = grpc.layer(MapResponseLayer::new(move |response: Response| {
            map_message_too_large(response, limit)
        }));
        let open = open.into_axum_router().reset_fallback();
        let mut grpc = grpc.merge(open).layer(middleware::from_fn(grpc_only));
        if let Some(gateway) = &self.gateway {
            grpc = grpc.merge(gateway.http.clone());
        }
        let grpc = grpc_middleware::trace_calls(grpc, self.traces.clone());
        let grpc =
            grpc_middleware::strip_untrusted_headers(grpc, self.token.clone(), self.auth.clone());
        // If all services run in one process, they end their watches themselves.
        let grpc = match self.role {
            Role::All | Role::Processor => grpc,
            Role::Gateway | Role::Router | Role::Progress => {
                let stopping = self.health.stopping.clone();
                grpc.layer(middleware::from_fn_with_state(stopping, grpc_middleware::end_watches))
            }
        };
        let plain = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .with_state(self.clone());
        let all = grpc.merge(plain).reset_fallback().fallback(unknown_path);
        Ok(if self.metrics_access.has_separate_address {
            all
        } else {
            all.merge(self.metrics_routes())
        })
    }

    /// Returns the route `/metrics`.
    pub(crate) fn metrics_routes(self: &Arc<Self>) -> Router {
        Router::new().route("/metrics", get(metrics)).with_state(self.clone())
    }
}

/// Returns whether the given content type is a gRPC content type.
pub(crate) fn is_grpc(content_type: &HeaderValue) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let start = content_type.as_bytes().get(..GRPC.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(GRPC))
}

fn has_grpc_content_type(request: &Request) -> bool {
    request.headers().get(header::CONTENT_TYPE).is_some_and(is_grpc)
}

/// Responds with 404 to requests for gRPC methods without a gRPC content type.
async fn grpc_only(request: Request, next: Next) -> Response {
    if has_grpc_content_type(&request) {
        next.run(request).await
    } else {
        unknown_path(request).await
    }
}

/// Responds to a request for an unknown path, with UNIMPLEMENTED to gRPC calls and with 404 to other requests.
async fn unknown_path(request: Request) -> Response {
    if has_grpc_content_type(&request) {
        let path = request.uri().path();
        let truncated: String = path.chars().take(MAX_PATH_CHARS).collect();
        return Status::unimplemented(format!("unknown method {truncated}")).into_http();
    }
    (StatusCode::NOT_FOUND, "no such path\n").into_response()
}

async fn ready(State(services): State<Arc<Services>>) -> (StatusCode, String) {
    match services.health.refresh().await {
        Ok(()) => (StatusCode::OK, "ready\n".into()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn metrics(State(services): State<Arc<Services>>, request: Request) -> Response {
    if services.metrics_access.needs_operator
        && let Err(rejection) = services.auth.check_operator(request.into_parts().0).await
    {
        let status = match rejection.code() {
            Code::Unauthenticated => StatusCode::UNAUTHORIZED,
            Code::PermissionDenied => StatusCode::FORBIDDEN,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
        return (status, challenge, format!("{}\n", rejection.message())).into_response();
    }
    ([(header::CONTENT_TYPE, OPEN_METRICS)], services.metrics.encode()).into_response()
}
