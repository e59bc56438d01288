//! Forwards public gRPC calls to the services in other processes.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::any,
};
use http::HeaderValue;
use streamer_auth::AuthLayer;
use streamer_cluster::Service;
use streamer_core::{Clock, Uid};
use streamer_rpc::{AFTER_UID, CLIENT_ADDRESS, Channel, Peer, REQUEST_UID};
use tokio::time::timeout;
use tonic::Status;
use tower::ServiceExt;

const GRPC_TIMEOUT: &str = "grpc-timeout";

/// State of a forwarded call.
struct GrpcProxy {
    clock: Arc<dyn Clock>,
    auth: AuthLayer,
}

/// Returns routes that forward all calls of the public gRPC services of each given service to its channel.
pub(crate) fn routes<const N: usize>(
    services: [(Service, Channel); N],
    clock: Arc<dyn Clock>,
    auth: AuthLayer,
) -> Router {
    let proxy = Arc::new(GrpcProxy { clock, auth });
    let mut routes = Router::new();
    for (service, channel) in services {
        for name in service.grpc_services() {
            let route = any(forward).with_state((channel.clone(), proxy.clone()));
            routes = routes.route(&format!("/{name}/{{*method}}"), route);
        }
    }
    routes
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
    request.headers_mut().remove(AFTER_UID);
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
