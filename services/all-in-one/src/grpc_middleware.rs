//! Middleware for gRPC calls: service authentication, tracing, ending watches at shutdown, and the proxy
//! of a gateway.

use std::{collections::HashSet, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, HttpBody},
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::any,
};
use http::{HeaderValue, header};
use streamer_auth::AuthLayer;
use streamer_core::{Clock, Uid};
use streamer_proto::public_methods;
use streamer_rpc::{
    CLIENT_ADDRESS, Channel, FORWARDED, PREVIOUS_ATTEMPTS, Peer, REQUEST_UID, SERVICE_TOKEN,
    WATCH_COUNTED, end_when, enter, is_server_error, recorded,
};
use streamer_telemetry::{InScope, Traces};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::ServiceExt;

use crate::discovery::ServiceToken;

const GRPC_TIMEOUT: &str = "grpc-timeout";
/// Path prefix of worker streams, which remain open for the lifetime of a worker.
const WORKER_STREAMS: &str = "/streamer.processor.v1.";
/// Suffixes of the paths of the methods that stream while a request runs.
const WATCHES: [&str; 2] = ["/Watch", "/SubmitAndWatch"];

/// Removes the headers that only services may set from calls without the service token. If `services` is
/// `None`, no other services exist. Rejects calls with an invalid service token, which must not be treated
/// as calls from a client.
pub(crate) fn strip_untrusted_headers(
    router: Router,
    services: Option<ServiceToken>,
    auth: AuthLayer,
) -> Router {
    router.layer(middleware::from_fn_with_state((services, auth), authenticate_service))
}

async fn authenticate_service(
    State((services, auth)): State<(Option<ServiceToken>, AuthLayer)>,
    mut request: Request,
    next: Next,
) -> Response {
    let given = request.headers_mut().remove(SERVICE_TOKEN);
    match (&services, given) {
        (Some(token), Some(given)) if token.is_accepted(given.as_bytes()) => {
            request.extensions_mut().insert(FromService);
            if let Some(peer) = request.extensions().get::<Peer>() {
                peer.authenticated();
            }
        }
        (Some(_), Some(_)) => {
            let text =
                "invalid service token: it must match peers.shared_secret_file of this process";
            return reject(request, text, &auth);
        }
        (None, Some(_)) => {
            let text = "this server runs all services in one process and accepts no calls from other services";
            return reject(request, text, &auth);
        }
        (_, None) => {
            for header in [REQUEST_UID, PREVIOUS_ATTEMPTS, FORWARDED, WATCH_COUNTED, CLIENT_ADDRESS]
            {
                request.headers_mut().remove(header);
            }
        }
    }
    next.run(request).await
}

/// Rejects a call with an invalid service token.
fn reject(mut request: Request, reason: &str, auth: &AuthLayer) -> Response {
    request.headers_mut().remove(CLIENT_ADDRESS);
    let (rejection, (parts, _)) = (Status::unauthenticated(reason), request.into_parts());
    auth.refused(&parts, &rejection);
    rejection.into_http::<Body>()
}

/// Marks a call with a valid service token.
#[derive(Clone, Copy)]
struct FromService;

/// Traces gRPC calls. Runs after [`strip_untrusted_headers`], which determines whether the caller is
/// a service.
pub(crate) fn trace_calls(router: Router, traces: Traces) -> Router {
    let methods = public_methods().into_iter().map(|method| method.path);
    let tracing = Arc::new(Tracing { traces, methods: methods.collect() });
    router.layer(middleware::from_fn_with_state(tracing, trace_call))
}

/// State of [`trace_call`].
struct Tracing {
    traces: Traces,
    /// Paths of the public methods. Calls from clients to other paths are not traced, so that clients cannot create
    /// span names.
    methods: HashSet<String>,
}

async fn trace_call(State(tracing): State<Arc<Tracing>>, request: Request, next: Next) -> Response {
    let is_grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|content_type| content_type.as_bytes().starts_with(b"application/grpc"));
    let path = request.uri().path();
    let is_service = request.extensions().get::<FromService>().is_some();
    let is_known = is_service || tracing.methods.contains(path);
    if !is_grpc || !is_known || path.starts_with(WORKER_STREAMS) {
        return next.run(request).await;
    }
    let scope = enter(&tracing.traces, &request, is_service);
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

/// Admits only calls from services. Runs after [`strip_untrusted_headers`].
pub(crate) fn services_only(router: Router) -> Router {
    router.layer(middleware::from_fn(require_service))
}

async fn require_service(request: Request, next: Next) -> Response {
    if request.extensions().get::<FromService>().is_some() {
        return next.run(request).await;
    }
    let status = Status::unauthenticated(
        "only services may call this method: a service token (peers.shared_secret_file) is required",
    );
    status.into_http::<Body>()
}

/// Forwards calls to the public services of other processes.
#[derive(Clone)]
pub(crate) struct GrpcProxy {
    pub(crate) router: Channel,
    pub(crate) progress: Channel,
    /// Channel for worker streams.
    pub(crate) processor: Channel,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) auth: AuthLayer,
}

impl GrpcProxy {
    pub(crate) fn routes(self) -> Router {
        let services = [
            ("streamer.router.v1.RouterService", self.router.clone()),
            ("google.longrunning.Operations", self.router.clone()),
            ("streamer.progress.v1.ProgressService", self.progress.clone()),
            ("streamer.processor.v1.WorkerService", self.processor.clone()),
        ];
        let proxy = Arc::new(self);
        services.into_iter().fold(Router::new(), |routes, (service, channel)| {
            let state = (channel, proxy.clone());
            let route = any(forward).with_state(state);
            routes.route(&format!("/{service}/{{*method}}"), route)
        })
    }
}

/// Ends watches when this process stops, with a status after which clients resume immediately at a
/// different instance. Other calls are not interrupted.
pub(crate) async fn end_watches(
    State(stopping): State<CancellationToken>,
    request: Request,
    next: Next,
) -> Response {
    let is_watch = WATCHES.iter().any(|method| request.uri().path().ends_with(method));
    let response = next.run(request).await;
    // A rejected call has no body.
    if !is_watch || response.body().is_end_stream() {
        return response;
    }
    response.map(|body| {
        let stopped = async move {
            stopping.cancelled().await;
            Status::unavailable("the server is stopping")
        };
        Body::new(end_when(body, stopped))
    })
}

async fn forward(
    State((channel, proxy)): State<(Channel, Arc<GrpcProxy>)>,
    request: Request,
) -> Response {
    let reject =
        |status: Status| status.into_http::<tonic::body::Body>().map(Body::new).into_response();
    // An unauthenticated call is rejected before its body is read.
    let (parts, body) = request.into_parts();
    if let Err(status) = proxy.auth.caller_of(&parts).await {
        return reject(status);
    }
    let mut request = Request::from_parts(parts, body);
    // The `uid` identifies the request if the channel retries a submission.
    if let Ok(uid) = Uid::new(proxy.clock.now()).to_string().parse() {
        request.headers_mut().insert(REQUEST_UID, uid);
    }
    if let Some(peer) = request.extensions().get::<Peer>()
        && let Ok(address) = HeaderValue::try_from(peer.address().ip().to_string())
    {
        request.headers_mut().insert(CLIENT_ADDRESS, address);
    }
    // The proxy enforces the deadline, so that its expiry does not mark the called instance as unhealthy.
    let limit = request.headers_mut().remove(GRPC_TIMEOUT);
    let limit = limit.as_ref().and_then(grpc_timeout);
    let call = channel.oneshot(request.map(tonic::body::Body::new));
    let response = match limit {
        Some(limit) => timeout(limit, call).await.unwrap_or_else(|_| {
            Err(Status::deadline_exceeded("the deadline of the call has expired"))
        }),
        None => call.await,
    };
    match response {
        Ok(response) => response.map(Body::new),
        Err(status) => reject(status),
    }
}

/// Parses the header `grpc-timeout`: up to eight digits and a unit, as specified by gRPC over HTTP/2.
fn grpc_timeout(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let count: u32 = digits.parse().ok()?;
    let unit = match unit {
        "H" => Duration::from_secs(3600),
        "M" => Duration::from_secs(60),
        "S" => Duration::from_secs(1),
        "m" => Duration::from_millis(1),
        "u" => Duration::from_micros(1),
        "n" => Duration::from_nanos(1),
        _ => return None,
    };
    Some(unit * count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_parsed() {
        let parse = |text: &'static str| grpc_timeout(&HeaderValue::from_static(text));
        assert_eq!(parse("5S"), Some(Duration::from_secs(5)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse("10m"), Some(Duration::from_millis(10)));
        for invalid in ["", "S", "5", "5x", "-5S", "123456789S"] {
            assert_eq!(parse(invalid), None, "{invalid}");
        }
    }
}
