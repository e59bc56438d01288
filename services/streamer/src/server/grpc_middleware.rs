//! Middleware for gRPC calls: metrics, traces, and ending watches at shutdown.

use std::{collections::HashSet, sync::Arc};

use axum::{
    Router,
    body::{Body, HttpBody},
    extract::{Request, State},
    middleware::{self, Next},
    response::Response,
};
use http::{HeaderValue, header};
use streamer_cluster::FromService;
use streamer_proto::{common::v1::StreamKind, is_known_method, method_policy, public_methods};
use streamer_rpc::{RpcMetrics, RpcTimer, end_when, enter, is_server_error, recorded};
use streamer_telemetry::{InScope, Traces};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Measures and traces gRPC calls. Runs after [`streamer_cluster::strip_untrusted_headers`], which determines whether the caller is
/// a service.
pub(crate) fn observe_calls(router: Router, traces: Traces, metrics: RpcMetrics) -> Router {
    let methods = public_methods().into_iter().map(|method| method.path);
    let observers = Arc::new(Observers { traces, metrics, methods: methods.collect() });
    router.layer(middleware::from_fn_with_state(observers, observe_call))
}

/// State of [`observe_call`].
struct Observers {
    traces: Traces,
    metrics: RpcMetrics,
    /// Paths of the public methods. Calls from clients to other paths are not traced, so that clients cannot create
    /// span names.
    methods: HashSet<String>,
}

async fn observe_call(
    State(observers): State<Arc<Observers>>,
    request: Request,
    next: Next,
) -> Response {
    if !request.headers().get(header::CONTENT_TYPE).is_some_and(is_grpc) {
        return next.run(request).await;
    }
    let mut timer = observers.metrics.start(request.uri().path());
    let response = trace_call(&observers, &mut timer, request, next).await;
    timer.record(response.headers());
    response
}

async fn trace_call(
    observers: &Observers,
    timer: &mut RpcTimer,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    let is_service = request.extensions().get::<FromService>().is_some();
    let is_known = is_service && is_known_method(path) || observers.methods.contains(path);
    // The span of a session would end only when its caller stops.
    let is_session = method_policy(path).stream_kind == StreamKind::Session;
    if !is_known || is_session {
        return next.run(request).await;
    }
    let scope = enter(&observers.traces, &request, is_service);
    timer.set_trace(scope.trace_context());
    let span = scope.span();
    if span.is_disabled() {
        return next.run(request).in_scope(scope).await;
    }
    let response = async move { Ok::<_, std::convert::Infallible>(next.run(request).await) };
    match recorded(response, span, is_server_error).in_scope(scope).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// Ends watches when this process stops, with a status after which clients resume immediately at a
/// different instance. Other calls are not interrupted.
pub(crate) async fn end_watches(
    State(stopping): State<CancellationToken>,
    request: Request,
    next: Next,
) -> Response {
    let is_watch = method_policy(request.uri().path()).stream_kind == StreamKind::Watch;
    let response = next.run(request).await;
    // A rejected call has no body.
    if !is_watch || response.body().is_end_stream() {
        return response;
    }
    response.map(|body| {
        let stopped = async move {
            stopping.cancelled().await;
            Status::unavailable("the server is shutting down")
        };
        Body::new(end_when(body, stopped))
    })
}

/// Returns whether the given content type is a gRPC content type.
pub(crate) fn is_grpc(content_type: &HeaderValue) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let start = content_type.as_bytes().get(..GRPC.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(GRPC))
}
