//! The one HTTP surface: gRPC, WebSocket, health and metrics.

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
use streamer_rpc::name_message_limit;
use streamer_store::Store;
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::util::MapResponseLayer;

use crate::{Role, StartError, edge, wiring::Services};

/// How often health is checked without a request for it, and within which time the store must answer.
const HEALTH_PACE: Pace =
    Pace { interval: Duration::from_secs(5), timeout: Duration::from_secs(5), tries: 1 };
/// The same for a progress service: its watches must move to a different instance within 5 s of an event
/// that it cannot read. One slow answer of the store is not a reason to move them.
const PROGRESS_HEALTH_PACE: Pace =
    Pace { interval: Duration::from_secs(1), timeout: Duration::from_millis(1500), tries: 2 };
/// An answer younger than this is given again; while it is a bad one, health is checked this often.
const HEALTH_CACHE: Duration = Duration::from_millis(500);
/// Largest message to services that anyone may call (health, reflection), in bytes.
const MAX_PUBLIC_MESSAGE: usize = 16 * 1024;
/// Longest part of a path in an answer.
const MAX_SHOWN_CHARS: usize = 128;
/// Prometheus' content type of OpenMetrics text.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The services whose health is told where they are; the empty name stands for the server.
const SERVICES: [(&str, Option<Role>); 6] = [
    ("", None),
    ("streamer.router.v1.RouterService", Some(Role::Router)),
    ("streamer.progress.v1.ProgressService", Some(Role::Progress)),
    ("streamer.processor.v1.WorkerService", Some(Role::Processor)),
    ("streamer.connections.v1.ConnectionsService", Some(Role::Gateway)),
    ("google.longrunning.Operations", Some(Role::Router)),
];

/// Who gets the metrics, and where.
#[derive(Clone, Copy)]
pub(crate) struct MetricsAccess {
    /// They have an address of their own (`server.metrics_listen`).
    pub(crate) has_own_address: bool,
    /// Only with a token of an operator (`server.metrics_need_operator`).
    pub(crate) needs_operator: bool,
}

/// Something beside the store without which the job cannot be done, and why it is not there.
pub(crate) type Need = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

struct Pace {
    interval: Duration,
    timeout: Duration,
    /// Failed checks in a row that count as one.
    tries: u32,
}

impl Pace {
    fn of(role: Role) -> &'static Self {
        match role {
            Role::Progress => &PROGRESS_HEALTH_PACE,
            Role::All | Role::Gateway | Role::Router | Role::Processor => &HEALTH_PACE,
        }
    }
}

/// Whether the server can do its job: durable writing is what everything stands on.
pub(crate) struct Health {
    store: Arc<dyn Store>,
    role: Role,
    needs: Vec<Need>,
    reporter: HealthReporter,
    /// The latest outcome, for services in this process.
    serving: watch::Sender<bool>,
    latest: Mutex<Option<(Instant, Result<(), String>)>>,
    stopping: CancellationToken,
}

impl Health {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        role: Role,
        needs: Vec<Need>,
        serving: watch::Sender<bool>,
    ) -> Self {
        Self {
            store,
            role,
            needs,
            reporter: HealthReporter::new(),
            serving,
            latest: Mutex::default(),
            stopping: CancellationToken::new(),
        }
    }

    /// Looks, unless that was done just now.
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
        let outcome =
            self.check_store().await.and_then(|()| self.needs.iter().try_for_each(|need| need()));
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

    /// Looks, whatever was seen just now.
    pub(crate) async fn look(&self) -> Result<(), String> {
        *self.latest.lock().await = None;
        self.refresh().await
    }

    /// Whether the store can be written; without it there is no point in starting.
    pub(crate) async fn check_store(&self) -> Result<(), String> {
        let pace = Pace::of(self.role);
        let mut outcome = self.check_store_once(pace.timeout).await;
        for _ in 1..pace.tries {
            if outcome.is_err() {
                outcome = self.check_store_once(pace.timeout).await;
            }
        }
        outcome
    }

    async fn check_store_once(&self, limit: Duration) -> Result<(), String> {
        match timeout(limit, self.store.check()).await {
            // Anybody may ask, so that the reason is for the log alone.
            Ok(checked) => checked.map_err(|error| {
                tracing::debug!(%error, "the store could not be written");
                "the store cannot be written".to_owned()
            }),
            Err(_) => Err("the store does not answer".to_owned()),
        }
    }

    /// From now on, nobody should come here.
    pub(crate) async fn not_serving(&self) {
        self.stopping.cancel();
        self.report(ServingStatus::NotServing).await;
    }

    async fn report(&self, status: ServingStatus) {
        let here = |of: &Option<Role>| of.is_none_or(|of| self.role.has(of));
        for (service, _) in SERVICES.iter().filter(|(_, of)| here(of)) {
            self.reporter.set_service_status(service, status).await;
        }
    }

    pub(crate) async fn watch(&self, shutdown: CancellationToken) {
        let mut told = None;
        loop {
            let outcome = self.refresh().await;
            let interval = Pace::of(self.role).interval;
            let pause = if outcome.is_ok() { interval } else { HEALTH_CACHE };
            if told.as_ref() != Some(&outcome) && !self.stopping.is_cancelled() {
                match &outcome {
                    Ok(()) => tracing::info!("the server can do its job"),
                    Err(reason) if told.is_none() => {
                        tracing::info!(reason, "the server cannot do its job yet");
                    }
                    Err(reason) => tracing::error!(reason, "the server cannot do its job"),
                }
            }
            told = Some(outcome);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }
}

impl Services {
    /// Everything that is served on the port.
    pub(crate) fn http(self: &Arc<Self>) -> Result<Router, StartError> {
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
        .max_decoding_message_size(MAX_PUBLIC_MESSAGE);
        // Without a token, and so with a limit of their own.
        let open = Routes::new(health)
            .add_service(
                builder()
                    .build_v1()
                    .map_err(reflection)?
                    .max_decoding_message_size(MAX_PUBLIC_MESSAGE),
            )
            .add_service(
                builder()
                    .build_v1alpha()
                    .map_err(reflection)?
                    .max_decoding_message_size(MAX_PUBLIC_MESSAGE),
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
        if let Some(pass_on) = &self.pass_on {
            grpc = grpc.merge(pass_on.clone().routes());
        }
        if self.role != Role::All {
            // Its fallback is the same as that of `grpc`.
            let internal = internal.into_axum_router().reset_fallback();
            grpc = grpc.merge(edge::services_only(internal));
        }
        let grpc = grpc.layer(MapResponseLayer::new(move |response: Response| {
            name_message_limit(response, limit)
        }));
        let open = open.into_axum_router().reset_fallback();
        let mut grpc = grpc.merge(open).layer(middleware::from_fn(grpc_only));
        if let Some(gateway) = &self.gateway {
            grpc = grpc.merge(gateway.http.clone());
        }
        let grpc = edge::trace_calls(grpc, self.traces.clone());
        let grpc = edge::trust_only(grpc, self.token.clone(), self.auth.clone());
        // In one process those who answer know when to end.
        let grpc = match self.role {
            Role::All | Role::Processor => grpc,
            Role::Gateway | Role::Router | Role::Progress => {
                let stopping = self.health.stopping.clone();
                grpc.layer(middleware::from_fn_with_state(stopping, edge::end_watches))
            }
        };
        let plain = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .with_state(self.clone());
        let all = grpc.merge(plain).reset_fallback().fallback(unknown_path);
        Ok(if self.metrics_access.has_own_address { all } else { all.merge(self.metrics()) })
    }

    /// `/metrics`.
    pub(crate) fn metrics(self: &Arc<Self>) -> Router {
        Router::new().route("/metrics", get(metrics)).with_state(self.clone())
    }
}

/// Whether this content type is gRPC's.
pub(crate) fn is_grpc(content_type: &HeaderValue) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let start = content_type.as_bytes().get(..GRPC.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(GRPC))
}

fn speaks_grpc(request: &Request) -> bool {
    request.headers().get(header::CONTENT_TYPE).is_some_and(is_grpc)
}

/// Answers 404 to requests for gRPC methods that are not gRPC.
async fn grpc_only(request: Request, next: Next) -> Response {
    if speaks_grpc(&request) { next.run(request).await } else { unknown_path(request).await }
}

/// gRPC has an answer of its own for methods that do not exist.
async fn unknown_path(request: Request) -> Response {
    if speaks_grpc(&request) {
        let path = request.uri().path();
        let shown: String = path.chars().take(MAX_SHOWN_CHARS).collect();
        return Status::unimplemented(format!("{shown} does not exist here")).into_http();
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
        && let Err(refusal) = services.auth.check_operator(request.into_parts().0).await
    {
        let status = match refusal.code() {
            Code::Unauthenticated => StatusCode::UNAUTHORIZED,
            Code::PermissionDenied => StatusCode::FORBIDDEN,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
        return (status, challenge, format!("{}\n", refusal.message())).into_response();
    }
    ([(header::CONTENT_TYPE, OPEN_METRICS)], services.metrics.encode()).into_response()
}
