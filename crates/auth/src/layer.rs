//! Authentication in front of a gRPC service.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION};
use streamer_core::{ErrorCode, RequestError};
use tonic::{Status, body::Body, server::NamedService};
use tower_service::Service;

use crate::{AuthError, Authenticator, Principal};

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
        match self.authenticator.cached(token) {
            Some(Ok(caller)) => {
                request.extensions_mut().insert(caller);
                AuthFuture::Inner(self.service.call(request))
            }
            Some(Err(error)) => refuse(&error),
            None => {
                let authenticator = self.authenticator.clone();
                let mut service = self.service.clone();
                AuthFuture::Verifying(Box::pin(async move {
                    let token = bearer(&authorization).unwrap_or_default();
                    match authenticator.authenticate(token).await {
                        Ok(caller) => {
                            request.extensions_mut().insert(caller);
                            service.call(request).await
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
    /// The token was known: straight on to the service.
    Inner(F),
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
            Self::Inner(future) => Pin::new(future).poll(context),
            Self::Verifying(future) => future.as_mut().poll(context),
            Self::Refused(response) => {
                Poll::Ready(Ok(response.take().expect("a future is not polled after its end")))
            }
        }
    }
}
