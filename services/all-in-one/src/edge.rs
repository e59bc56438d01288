//! What comes in from other services, and what a gateway passes on to them.

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
    CLIENT_ADDRESS, Channel, FORWARDED, Peer, REPEATED, REQUEST_UID, SERVICE_TOKEN, WATCH_COUNTED,
    end_when, enter, is_server_error, recorded,
};
use streamer_telemetry::{InScope, Traces};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::ServiceExt;

use crate::peers::ServiceToken;

const GRPC_TIMEOUT: &str = "grpc-timeout";
/// Calls that last as long as a worker.
const WORKER_STREAMS: &str = "/streamer.processor.v1.";
/// Methods that answer for as long as a request runs.
const WATCHES: [&str; 2] = ["/Watch", "/SubmitAndWatch"];

/// Removes what only other services may state from calls that do not have the service token; there
/// are no other services without one. A call with a wrong service token is refused: taken for a
/// call of a client, it would be misunderstood.
pub(crate) fn trust_only(
    router: Router,
    services: Option<ServiceToken>,
    auth: AuthLayer,
) -> Router {
    router.layer(middleware::from_fn_with_state((services, auth), admit))
}

async fn admit(
    State((services, auth)): State<(Option<ServiceToken>, AuthLayer)>,
    mut request: Request,
    next: Next,
) -> Response {
    let given = request.headers_mut().remove(SERVICE_TOKEN);
    match (&services, given) {
        (Some(token), Some(given)) if token.is(given.as_bytes()) => {
            request.extensions_mut().insert(FromService);
            if let Some(peer) = request.extensions().get::<Peer>() {
                peer.authenticated();
            }
        }
        (Some(_), Some(_)) => {
            let text =
                "the service token does not match the one of this process (peers.secret_file)";
            return refused(request, text, &auth);
        }
        (None, Some(_)) => {
            let text = "this server runs all services in one process and accepts no calls from other services";
            return refused(request, text, &auth);
        }
        (_, None) => {
            for header in [REQUEST_UID, REPEATED, FORWARDED, WATCH_COUNTED, CLIENT_ADDRESS] {
                request.headers_mut().remove(header);
            }
        }
    }
    next.run(request).await
}

/// Refuses a call with a wrong service token.
fn refused(mut request: Request, reason: &str, auth: &AuthLayer) -> Response {
    request.headers_mut().remove(CLIENT_ADDRESS);
    let (refusal, (parts, _)) = (Status::unauthenticated(reason), request.into_parts());
    auth.refused(&parts, &refusal);
    refusal.into_http::<Body>()
}

/// The call has been found to come from a service.
#[derive(Clone, Copy)]
struct FromService;

/// Opens the traces of gRPC calls that come in, as [`trust_only`] in front of it finds out whose they
/// are.
pub(crate) fn trace_calls(router: Router, traces: Traces) -> Router {
    let methods = public_methods().into_iter().map(|method| method.path);
    let tracing = Arc::new(Tracing { traces, methods: methods.collect() });
    router.layer(middleware::from_fn_with_state(tracing, trace_call))
}

/// Which calls are traced, and where to.
struct Tracing {
    traces: Traces,
    /// Paths of the public methods: no caller can make up names of spans.
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
    let answer = async move { Ok::<_, std::convert::Infallible>(next.run(request).await) };
    match recorded(answer, span, is_server_error).in_scope(scope).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// Lets only other services in, as [`trust_only`] in front of it finds out.
pub(crate) fn services_only(router: Router) -> Router {
    router.layer(middleware::from_fn(guard))
}

async fn guard(request: Request, next: Next) -> Response {
    if request.extensions().get::<FromService>().is_some() {
        return next.run(request).await;
    }
    let status = Status::unauthenticated(
        "only services may call this, which have the secret of peers.secret_file",
    );
    status.into_http::<Body>()
}

/// The public services of others, for those who know only this process.
#[derive(Clone)]
pub(crate) struct PassOn {
    pub(crate) router: Channel,
    pub(crate) progress: Channel,
    /// Workers speak in streams.
    pub(crate) processor: Channel,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) auth: AuthLayer,
}

impl PassOn {
    pub(crate) fn routes(self) -> Router {
        let passed_on = [
            ("streamer.router.v1.RouterService", self.router.clone()),
            ("google.longrunning.Operations", self.router.clone()),
            ("streamer.progress.v1.ProgressService", self.progress.clone()),
            ("streamer.processor.v1.WorkerService", self.processor.clone()),
        ];
        let all = Arc::new(self);
        passed_on.into_iter().fold(Router::new(), |routes, (service, channel)| {
            let state = (channel, all.clone());
            let route = any(pass_on).with_state(state);
            routes.route(&format!("/{service}/{{*method}}"), route)
        })
    }
}

/// Ends watches once this process stops: whoever watches goes on elsewhere, at once and knowing why.
/// Other calls end by themselves.
pub(crate) async fn end_watches(
    State(stopping): State<CancellationToken>,
    request: Request,
    next: Next,
) -> Response {
    let is_watch = WATCHES.iter().any(|method| request.uri().path().ends_with(method));
    let response = next.run(request).await;
    // What was refused has no body.
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

async fn pass_on(
    State((channel, all)): State<(Channel, Arc<PassOn>)>,
    request: Request,
) -> Response {
    let refused =
        |status: Status| status.into_http::<tonic::body::Body>().map(Body::new).into_response();
    // Nothing is taken in from who may not call.
    let (parts, body) = request.into_parts();
    if let Err(status) = all.auth.caller_of(&parts).await {
        return refused(status);
    }
    let mut request = Request::from_parts(parts, body);
    // A submission that is repeated on the way is then the same request.
    if let Ok(uid) = Uid::new(all.clock.now()).to_string().parse() {
        request.headers_mut().insert(REQUEST_UID, uid);
    }
    if let Some(peer) = request.extensions().get::<Peer>()
        && let Ok(address) = HeaderValue::try_from(peer.address().ip().to_string())
    {
        request.headers_mut().insert(CLIENT_ADDRESS, address);
    }
    // Kept here, since what is waited for elsewhere is not at fault when a caller's time is up.
    let patience = request.headers_mut().remove(GRPC_TIMEOUT);
    let patience = patience.as_ref().and_then(grpc_timeout);
    let call = channel.oneshot(request.map(tonic::body::Body::new));
    let answer = match patience {
        Some(patience) => timeout(patience, call)
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("the call's time is up"))),
        None => call.await,
    };
    match answer {
        Ok(response) => response.map(Body::new),
        Err(status) => refused(status),
    }
}

/// What the header says: up to eight digits and a unit, by gRPC's protocol over HTTP/2.
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
    fn timeouts_are_read() {
        let read = |text: &'static str| grpc_timeout(&HeaderValue::from_static(text));
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(read("10m"), Some(Duration::from_millis(10)));
        for wrong in ["", "S", "5", "5x", "-5S", "123456789S"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
