//! HTTP routes of the server: gRPC, WebSocket, health and metrics.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use streamer_cluster::{Service, services_only, strip_untrusted_headers};
use streamer_proto::PUBLIC_DESCRIPTOR_SET;
use streamer_rpc::map_message_too_large;
use tonic::{Code, Status, service::Routes};
use tower::util::MapResponseLayer;

use crate::server::{
    access_log::{log_access, truncated_path},
    assembly::Services,
    error::StartError,
    grpc_middleware,
    role::Role,
};

/// Maximum size of a message to unauthenticated services (health, reflection), in bytes.
const MAX_UNAUTHENTICATED_MESSAGE: usize = 16 * 1024;
/// Content type of the OpenMetrics text format.
const OPEN_METRICS_TYPE: &str = "application/openmetrics-text";
/// Content type of the text format of Prometheus.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Complete content type of the OpenMetrics text format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

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
            tonic_health::server::HealthService::from_health_reporter(self.health.reporter()),
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
            public = public.add_service(router.admin.clone());
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
        if let Some(gateway) = &self.gateway {
            grpc = grpc.merge(gateway.forwarded.clone());
        }
        if self.role != Role::All {
            // `grpc` has the same fallback.
            let internal = internal.into_axum_router().reset_fallback();
            grpc = grpc.merge(services_only(internal));
        }
        let grpc = grpc.layer(MapResponseLayer::new(move |response: Response| {
            map_message_too_large(response, limit)
        }));
        let open = open.into_axum_router().reset_fallback();
        let mut grpc = grpc.merge(open).layer(middleware::from_fn(grpc_only));
        if let Some(gateway) = &self.gateway {
            grpc = grpc.merge(gateway.http.clone());
        }
        let metrics = self.rpc_metrics.clone();
        let grpc = grpc_middleware::observe_calls(grpc, self.traces.clone(), metrics);
        let grpc = strip_untrusted_headers(grpc, self.service_token.clone(), self.auth.clone());
        // If all services run in one process, they end their watches themselves.
        let grpc = match self.role {
            Role::All | Role::Only(Service::Processor) => grpc,
            Role::Only(Service::Gateway | Service::Router | Service::Progress) => {
                let stopping = self.health.stopping();
                grpc.layer(middleware::from_fn_with_state(stopping, grpc_middleware::end_watches))
            }
        };
        let plain = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .with_state(self.clone());
        let all = grpc.merge(plain).reset_fallback().fallback(unknown_path);
        let all = if self.metrics_access.has_separate_address {
            all
        } else {
            all.merge(self.metrics_routes())
        };
        let logs_access =
            self.gateway.as_ref().is_some_and(streamer_gateway::GatewayServer::logs_access);
        Ok(if logs_access { all.layer(middleware::from_fn(log_access)) } else { all })
    }

    /// Returns the route `/metrics`.
    pub(crate) fn metrics_routes(self: &Arc<Self>) -> Router {
        Router::new().route("/metrics", get(metrics)).with_state(self.clone())
    }
}

fn has_grpc_content_type(request: &Request) -> bool {
    request.headers().get(header::CONTENT_TYPE).is_some_and(grpc_middleware::is_grpc)
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
        let path = truncated_path(request.uri());
        return Status::unimplemented(format!("unknown method {path}")).into_http();
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
    let accepted = request.headers().get(header::ACCEPT);
    let is_open_metrics = accepted
        .is_some_and(|accepted| accepted.to_str().is_ok_and(|a| a.contains(OPEN_METRICS_TYPE)));
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
    if is_open_metrics {
        return ([(header::CONTENT_TYPE, OPEN_METRICS)], services.metrics.encode()).into_response();
    }
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], services.metrics.encode_text()).into_response()
}
