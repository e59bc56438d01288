//! What comes in from other services, and what a gateway passes on to them.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::any,
};
use streamer_auth::{Authenticator, caller_of};
use streamer_core::{Clock, Uid};
use streamer_rpc::{Channel, FORWARDED, REPEATED, REQUEST_UID, SERVICE_TOKEN};
use tonic::Status;
use tower::{ServiceExt, util::MapRequestLayer};

use crate::peers::ServiceToken;

/// Whose word counts as a service's.
#[derive(Clone)]
pub(crate) enum Trusted {
    /// Nobody's: there are no other services.
    Nobody,
    /// That of whoever has the token; everybody's when there is none.
    Services(Option<ServiceToken>),
}

/// Takes out of a call what only other services may say, unless one of them says it.
pub(crate) fn trust_only(router: Router, trusted: Trusted) -> Router {
    router.layer(MapRequestLayer::new(move |request| strip(&trusted, request)))
}

fn strip(trusted: &Trusted, mut request: Request) -> Request {
    let is_trusted = match trusted {
        Trusted::Nobody => false,
        Trusted::Services(token) => is_service(token.as_ref(), &request),
    };
    if is_trusted {
        request.extensions_mut().insert(FromService);
    } else {
        for header in [REQUEST_UID, REPEATED, FORWARDED] {
            request.headers_mut().remove(header);
        }
    }
    request.headers_mut().remove(SERVICE_TOKEN);
    request
}

/// The call has been found to come from a service.
#[derive(Clone, Copy)]
struct FromService;

/// Lets only other services in, as [`trust_only`] in front of it finds out.
pub(crate) fn services_only(router: Router) -> Router {
    router.layer(middleware::from_fn(guard))
}

async fn guard(request: Request, next: Next) -> Response {
    if request.extensions().get::<FromService>().is_some() {
        return next.run(request).await;
    }
    let status = Status::unauthenticated("only services may call this: peers.secret_file");
    status.into_http::<Body>()
}

/// Without a secret every caller is trusted: the configuration allows that on loopback only.
fn is_service(token: Option<&ServiceToken>, request: &Request) -> bool {
    let given = request.headers().get(SERVICE_TOKEN);
    match token {
        Some(token) => given.is_some_and(|given| token.is(given.as_bytes())),
        None => true,
    }
}

/// The public services of others, for those who know only this process.
#[derive(Clone)]
pub(crate) struct PassOn {
    pub(crate) router: Channel,
    pub(crate) progress: Channel,
    /// Workers speak in streams.
    pub(crate) processor: Channel,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) authenticator: Arc<Authenticator>,
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

async fn pass_on(
    State((channel, all)): State<(Channel, Arc<PassOn>)>,
    mut request: Request,
) -> Response {
    let refused =
        |status: Status| status.into_http::<tonic::body::Body>().map(Body::new).into_response();
    // Nothing is taken in from who may not call.
    if let Err(status) = caller_of(&all.authenticator, request.headers()).await {
        return refused(status);
    }
    // A submission that is repeated on the way is then the same request.
    if let Ok(uid) = Uid::new(all.clock.now()).to_string().parse() {
        request.headers_mut().insert(REQUEST_UID, uid);
    }
    match channel.oneshot(request.map(tonic::body::Body::new)).await {
        Ok(response) => response.map(Body::new),
        Err(status) => refused(status),
    }
}
