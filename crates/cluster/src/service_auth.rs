//! Middleware that authenticates calls from services by the service token.

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    middleware::{self, Next},
    response::Response,
};
use streamer_auth::AuthLayer;
use streamer_rpc::{
    AFTER_UID, CLIENT_ADDRESS, FORWARDED, PREVIOUS_ATTEMPTS, Peer, REQUEST_UID, SERVICE_TOKEN,
    WATCH_COUNTED,
};
use tonic::Status;

use crate::ServiceToken;

/// Removes the headers that only services may set from calls without the service token. If `services` is
/// `None`, no other services exist. Rejects calls with an invalid service token, which must not be treated
/// as calls from a client.
pub fn strip_untrusted_headers(
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
            for header in [
                REQUEST_UID,
                AFTER_UID,
                PREVIOUS_ATTEMPTS,
                FORWARDED,
                WATCH_COUNTED,
                CLIENT_ADDRESS,
            ] {
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

/// Extension of a call with a valid service token.
#[derive(Clone, Copy, Debug)]
pub struct FromService;

/// Admits only calls from services. Runs after [`strip_untrusted_headers`].
pub fn services_only(router: Router) -> Router {
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
