//! Authentication in front of a gRPC service.

use std::{
    collections::HashSet,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION};
use streamer_core::{ErrorCode, RequestError};
use streamer_proto::public_methods;
use streamer_rpc::end_when;
use tokio::time::sleep;
use tonic::{Status, body::Body, server::NamedService};
use tower_service::Service;

use crate::{AuthError, Authenticator, Principal};

/// Paths of the methods whose answers end with the caller's token: all that answer with a stream, but
/// for those that take one as well, which renew the token themselves.
static STREAMING: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let methods = public_methods().into_iter();
    let streaming = methods.filter(|method| method.server_streaming && !method.client_streaming);
    streaming.map(|method| method.path).collect()
});

/// Who makes this call; in the extensions of every request that passed [`AuthService`].
#[derive(Clone)]
pub struct Caller {
    /// As the token says.
    pub principal: Arc<Principal>,
    /// The token, for the next hop.
    pub authorization: HeaderValue,
}

/// Wraps services in [`AuthService`].
#[derive(Clone)]
pub struct AuthLayer {
    authenticator: Arc<Authenticator>,
}

impl AuthLayer {
    /// With this authenticator.
    #[must_use]
    pub fn new(authenticator: Arc<Authenticator>) -> Self {
        Self { authenticator }
    }

    /// Puts authentication in front of `service`.
    pub fn wrap<S>(&self, service: S) -> AuthService<S> {
        AuthService { authenticator: self.authenticator.clone(), service }
    }
}

/// Lets calls with a valid token through to the service, with a [`Caller`] in their extensions.
#[derive(Clone)]
pub struct AuthService<S> {
    authenticator: Arc<Authenticator>,
    service: S,
}

impl<S: NamedService> NamedService for AuthService<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<Request<B>> for AuthService<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + Unpin + 'static,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = AuthFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let Some(authorization) = request.headers().get(AUTHORIZATION).cloned() else {
            return refuse(&AuthError::Missing);
        };
        let Some(token) = bearer(&authorization) else {
            return refuse(&AuthError::Malformed("must be `Bearer <token>`".into()));
        };
        let is_stream = STREAMING.contains(request.uri().path());
        match self.authenticator.cached(token) {
            Some(Ok(caller)) => {
                let left = is_stream.then(|| self.authenticator.time_left(&caller));
                request.extensions_mut().insert(caller);
                AuthFuture::Inner(self.service.call(request), left)
            }
            Some(Err(error)) => refuse(&error),
            None => {
                let authenticator = self.authenticator.clone();
                let mut service = self.service.clone();
                AuthFuture::Verifying(Box::pin(async move {
                    let token = bearer(&authorization).unwrap_or_default();
                    match authenticator.authenticate(token).await {
                        Ok(caller) => {
                            let left = is_stream.then(|| authenticator.time_left(&caller));
                            request.extensions_mut().insert(caller);
                            service.call(request).await.map(|response| limited(response, left))
                        }
                        Err(error) => Ok(status(&error).into_http()),
                    }
                }))
            }
        }
    }
}

/// Who sends these headers: for services only some of whose calls come from users.
///
/// # Errors
/// `UNAUTHENTICATED`, or `UNAVAILABLE` while the keys cannot be had.
pub async fn caller_of(
    authenticator: &Authenticator,
    headers: &HeaderMap,
) -> Result<Caller, Status> {
    let authorization = headers.get(AUTHORIZATION).ok_or_else(|| status(&AuthError::Missing))?;
    let token = bearer(authorization)
        .ok_or_else(|| status(&AuthError::Malformed("must be `Bearer <token>`".into())))?;
    authenticator.authenticate(token).await.map_err(|error| status(&error))
}

/// The token of an `authorization` header.
fn bearer(authorization: &HeaderValue) -> Option<&str> {
    let (scheme, token) = authorization.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Ends a stream with `UNAUTHENTICATED` after this time.
fn limited(response: Response<Body>, left: Option<Duration>) -> Response<Body> {
    let Some(left) = left else { return response };
    let expired = async move {
        sleep(left).await;
        let error = RequestError::new(ErrorCode::Unauthorized, "the token has expired");
        streamer_rpc::status(&error)
    };
    response.map(|body| end_when(body, expired))
}

fn refuse<F>(error: &AuthError) -> AuthFuture<F> {
    AuthFuture::Refused(Some(status(error).into_http()))
}

fn status(error: &AuthError) -> Status {
    streamer_rpc::status(&RequestError::new(error.code(), error.to_string()))
}

impl AuthError {
    /// In the words of the protocols.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::KeysUnavailable(_) => ErrorCode::Unavailable,
            Self::Missing
            | Self::Malformed(_)
            | Self::Algorithm
            | Self::Signature
            | Self::Expired(_)
            | Self::NotYetValid(_)
            | Self::Claim { .. } => ErrorCode::Unauthorized,
        }
    }
}

/// The answer of [`AuthService`].
pub enum AuthFuture<F> {
    /// The token was known: straight on to the service. A stream ends after this time.
    Inner(F, Option<Duration>),
    /// The token has to be verified first.
    Verifying(Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>),
    /// Not let in.
    Refused(Option<Response<Body>>),
}

impl<F> Future for AuthFuture<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>> + Unpin,
{
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Inner(future, left) => {
                let left = *left;
                Pin::new(future).poll(context).map_ok(|response| limited(response, left))
            }
            Self::Verifying(future) => future.as_mut().poll(context),
            Self::Refused(response) => {
                Poll::Ready(Ok(response.take().expect("a future is not polled after its end")))
            }
        }
    }
}
