//! Authentication of the calls to a gRPC service.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::Duration,
};

use http::{
    Extensions, HeaderMap, HeaderValue, Request, Response, Uri, header::AUTHORIZATION,
    request::Parts,
};
use parking_lot::Mutex;
use streamer_core::{ErrorCode, validate::cut};
use streamer_proto::public_methods;
use streamer_rpc::{CLIENT_ADDRESS, FORWARDED, Peer, code_name, end_response_when, error_status};
use tokio::time::sleep;
use tonic::{Code, Status, body::Body, server::NamedService};
use tower_service::Service;

use crate::{
    Audit, AuthError, Authenticator, Caller, Principal, Subject, audit::Record, permissions,
};

/// Maximum size of a method's path in the audit log, in bytes.
const MAX_PATH_BYTES: usize = 256;

/// Rules of the public methods, by path.
static METHODS: LazyLock<HashMap<String, MethodRules>> = LazyLock::new(|| {
    let methods = public_methods().into_iter();
    let rules = methods.map(|method| {
        let is_audited = !UNAUDITED.iter().any(|unaudited| method.path.ends_with(unaudited));
        let ends_at_expiry = method.server_streaming && !method.client_streaming;
        (method.path, MethodRules { ends_at_expiry, is_audited })
    });
    rules.collect()
});

/// Methods whose calls are recorded only if they are rejected: they read, or submit the caller's own work.
const UNAUDITED: [&str; 12] = [
    "RouterService/Submit",
    "RouterService/SubmitAndWatch",
    "RouterService/Get",
    "RouterService/List",
    "RouterService/ListActions",
    "ProgressService/Watch",
    "ProgressService/ListEvents",
    "ConnectionsService/List",
    "WorkerService/Work",
    "Operations/ListOperations",
    "Operations/GetOperation",
    "Operations/WaitOperation",
];

#[derive(Clone, Copy, Default)]
struct MethodRules {
    /// Whether the response ends when the token expires: true for response streams, except those of
    /// bidirectional methods, which renew the token themselves.
    ends_at_expiry: bool,
    /// Whether each call is recorded in the audit log.
    is_audited: bool,
}

/// Wraps services in [`AuthService`].
#[derive(Clone)]
pub struct AuthLayer {
    authenticator: Arc<Authenticator>,
    audit: Audit,
}

impl AuthLayer {
    /// Returns a layer with the given authenticator and audit log.
    #[must_use]
    pub fn new(authenticator: Arc<Authenticator>, audit: Audit) -> Self {
        Self { authenticator, audit }
    }

    /// Returns the audit log.
    #[must_use]
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Returns the remaining duration for which the token of `caller` is accepted.
    #[must_use]
    pub fn time_left(&self, caller: &Caller) -> Duration {
        self.authenticator.time_left(caller)
    }

    /// Checks that the caller of an HTTP request is an operator.
    ///
    /// # Errors
    /// Returns `UNAUTHENTICATED`, `PERMISSION_DENIED`, or `UNAVAILABLE` if the keys are unavailable.
    pub async fn check_operator(&self, mut request: Parts) -> Result<(), Status> {
        // The header is not trusted: no service makes such a request on behalf of a client.
        request.headers.remove(CLIENT_ADDRESS);
        let caller = self.caller_of(&request).await?;
        let outcome = caller.require(permissions::OPERATOR);
        outcome.inspect_err(|status| {
            self.record_rejection(&request, Some(caller.principal), status);
        })
    }

    /// Returns the caller of an HTTP request. Marks the connection as authenticated if the token is valid.
    ///
    /// # Errors
    /// Returns `UNAUTHENTICATED`, or `UNAVAILABLE` if the keys are unavailable.
    pub async fn caller_of(&self, request: &Parts) -> Result<Caller, Status> {
        let outcome = caller_of(&self.authenticator, &request.headers).await;
        match &outcome {
            Ok(_) => {
                if let Some(peer) = request.extensions.get::<Peer>() {
                    peer.authenticated();
                }
            }
            Err(status) if status.code() == Code::Unauthenticated => {
                self.refused(request, status);
            }
            Err(_) => {}
        }
        outcome
    }

    /// Records a rejected request.
    pub fn refused(&self, request: &Parts, status: &Status) {
        self.record_rejection(request, None, status);
    }

    fn record_rejection(
        &self,
        request: &Parts,
        principal: Option<Arc<Principal>>,
        status: &Status,
    ) {
        let Parts { uri, headers, extensions, .. } = request;
        let mut entry = AuditEntry::of(uri, headers, extensions, &self.audit);
        entry.principal = principal;
        let record = entry.record(code_name(status.code()), Some(status.message()));
        self.audit.record_rejection(record);
    }

    /// Returns `service` with authentication.
    pub fn wrap<S>(&self, service: S) -> AuthService<S> {
        AuthService {
            authenticator: self.authenticator.clone(),
            audit: self.audit.clone(),
            service,
        }
    }
}

/// Service that accepts calls with a valid token, and adds a [`Caller`] to their extensions.
#[derive(Clone)]
pub struct AuthService<S> {
    authenticator: Arc<Authenticator>,
    audit: Audit,
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

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let reject = |error: &AuthError| {
            if self.audit.is_enabled() {
                AuditEntry::new(&request, &self.audit).record_invalid_token(error);
            }
            AuthFuture::Rejected(Some(status(error).into_http()))
        };
        let Some(authorization) = request.headers().get(AUTHORIZATION).cloned() else {
            return reject(&AuthError::Missing);
        };
        let Some(token) = bearer(&authorization) else {
            return reject(&AuthError::Malformed("must be `Bearer <token>`".into()));
        };
        match self.authenticator.cached(token) {
            Some(Ok(caller)) => {
                let (request, on_response) =
                    accept(request, caller, &self.authenticator, &self.audit);
                AuthFuture::Inner(self.service.call(request), on_response)
            }
            Some(Err(error)) => reject(&error),
            None => {
                let (authenticator, audit) = (self.authenticator.clone(), self.audit.clone());
                let mut service = self.service.clone();
                AuthFuture::Verifying(Box::pin(async move {
                    let token = bearer(&authorization).unwrap_or_default();
                    match authenticator.authenticate(token).await {
                        Ok(caller) => {
                            let (request, mut on_response) =
                                accept(request, caller, &authenticator, &audit);
                            service.call(request).await.map(|response| on_response.apply(response))
                        }
                        Err(error) => {
                            if audit.is_enabled() {
                                AuditEntry::new(&request, &audit).record_invalid_token(&error);
                            }
                            Ok(status(&error).into_http())
                        }
                    }
                }))
            }
        }
    }
}

/// Adds the caller to the request, and returns the actions for the response.
fn accept<B>(
    mut request: Request<B>,
    mut caller: Caller,
    authenticator: &Authenticator,
    audit: &Audit,
) -> (Request<B>, OnResponse) {
    let rules = METHODS.get(request.uri().path()).copied().unwrap_or_default();
    let time_left = rules.ends_at_expiry.then(|| authenticator.time_left(&caller));
    let entry = audit.is_enabled().then(|| {
        let mut entry = AuditEntry::new(&request, audit);
        let is_operator = caller.principal.has_permission(permissions::OPERATOR);
        // A forwarded call was recorded by the instance of the same service that forwarded it.
        let is_first_hop = !request.headers().contains_key(FORWARDED);
        if is_first_hop && (rules.is_audited || is_operator) {
            entry.subject = Some(Arc::default());
            caller.subject.clone_from(&entry.subject);
        }
        entry.principal = Some(caller.principal.clone());
        Box::new(entry)
    });
    if let Some(peer) = request.extensions().get::<Peer>() {
        peer.authenticated();
    }
    request.extensions_mut().insert(caller);
    (request, OnResponse { time_left, entry })
}

/// Returns the caller with the given headers, without a record in the audit log. Used for calls between
/// services.
///
/// # Errors
/// Returns `UNAUTHENTICATED`, or `UNAVAILABLE` if the keys are unavailable.
pub async fn caller_of(
    authenticator: &Authenticator,
    headers: &HeaderMap,
) -> Result<Caller, Status> {
    let authorization = headers.get(AUTHORIZATION).ok_or_else(|| status(&AuthError::Missing))?;
    let token = bearer(authorization)
        .ok_or_else(|| status(&AuthError::Malformed("must be `Bearer <token>`".into())))?;
    authenticator.authenticate(token).await.map_err(|error| status(&error))
}

/// Returns the token of an `authorization` header.
fn bearer(authorization: &HeaderValue) -> Option<&str> {
    let (scheme, token) = authorization.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Entry of the audit log for a call.
struct AuditEntry {
    audit: Audit,
    call: String,
    from: Option<IpAddr>,
    principal: Option<Arc<Principal>>,
    /// Object of the call, if the call is recorded even if it is accepted.
    subject: Option<Arc<Mutex<Option<Subject>>>>,
    is_recorded: bool,
}

impl Drop for AuditEntry {
    fn drop(&mut self) {
        // The caller disconnected; the call may still take effect.
        if !self.is_recorded && self.subject.is_some() {
            self.audit
                .record(self.record("CANCELLED", Some("the caller did not wait for the response")));
        }
    }
}

impl AuditEntry {
    fn new<B>(request: &Request<B>, audit: &Audit) -> Self {
        Self::of(request.uri(), request.headers(), request.extensions(), audit)
    }

    fn of(uri: &Uri, headers: &HeaderMap, extensions: &Extensions, audit: &Audit) -> Self {
        // The header is trusted: it is removed from requests that do not come from a service.
        let forwarded = headers.get(CLIENT_ADDRESS);
        let forwarded = forwarded.and_then(|address| address.to_str().ok()?.parse().ok());
        let peer = || extensions.get::<Peer>().map(|peer| peer.address().ip());
        Self {
            audit: audit.clone(),
            call: cut(uri.path().to_owned(), MAX_PATH_BYTES),
            from: forwarded.or_else(peer),
            principal: None,
            subject: None,
            is_recorded: false,
        }
    }

    fn record<'a>(&'a self, outcome: &'a str, reason: Option<&'a str>) -> Record<'a> {
        let principal = self.principal.as_ref();
        Record {
            call: &self.call,
            outcome,
            reason,
            tenant: principal.map(|principal| &*principal.tenant),
            user: principal.map(|principal| &*principal.user),
            subject: self.subject.as_ref().and_then(|subject| subject.lock().take()),
            from: self.from,
        }
    }

    /// Records a call whose token is invalid.
    fn record_invalid_token(&self, error: &AuthError) {
        // UNAVAILABLE is not a rejection: the token could not be verified.
        if error.code() == ErrorCode::Unauthorized {
            self.audit.record_rejection(self.record("UNAUTHENTICATED", Some(&error.to_string())));
        }
    }

    fn record_response(&mut self, response: &Response<Body>) {
        // The response to a failed unary call is Trailers-Only: its status is in the headers.
        let status = Status::from_header_map(response.headers());
        let code = status.as_ref().map_or(Code::Ok, Status::code);
        let outcome = code_name(code);
        let reason = status.as_ref().filter(|_| code != Code::Ok).map(Status::message);
        self.is_recorded = true;
        if code == Code::PermissionDenied {
            self.audit.record_rejection(self.record(outcome, reason));
        } else if self.subject.is_some() {
            self.audit.record(self.record(outcome, reason));
        }
    }
}

/// Actions for the response of a call.
pub struct OnResponse {
    /// Time after which a response stream ends.
    time_left: Option<Duration>,
    entry: Option<Box<AuditEntry>>,
}

impl OnResponse {
    fn apply(&mut self, response: Response<Body>) -> Response<Body> {
        if let Some(mut entry) = self.entry.take() {
            entry.record_response(&response);
        }
        end_at_expiry(response, self.time_left)
    }
}

/// Ends a response stream with `UNAUTHENTICATED` after `time_left`.
fn end_at_expiry(response: Response<Body>, time_left: Option<Duration>) -> Response<Body> {
    let Some(time_left) = time_left else { return response };
    let expired = async move {
        sleep(time_left).await;
        error_status(ErrorCode::Unauthorized, "the token has expired")
    };
    end_response_when(response, expired)
}

fn status(error: &AuthError) -> Status {
    error_status(error.code(), error.to_string())
}

/// Response future of [`AuthService`].
pub enum AuthFuture<F> {
    /// The token is cached: the call goes to the service directly.
    Inner(F, OnResponse),
    /// The token must be verified first.
    Verifying(Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>),
    /// The token is invalid.
    Rejected(Option<Response<Body>>),
}

impl<F> Future for AuthFuture<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>> + Unpin,
{
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Inner(future, on_response) => {
                Pin::new(future).poll(context).map_ok(|response| on_response.apply(response))
            }
            Self::Verifying(future) => future.as_mut().poll(context),
            Self::Rejected(response) => {
                Poll::Ready(Ok(response.take().expect("a future is not polled after completion")))
            }
        }
    }
}

#[cfg(test)]
mod tests;
