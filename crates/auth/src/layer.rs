//! Authentication in front of a gRPC service.

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
use streamer_core::{ErrorCode, RequestError, validate::cut};
use streamer_proto::public_methods;
use streamer_rpc::{CLIENT_ADDRESS, FORWARDED, Peer, code_name, end_when};
use tokio::time::sleep;
use tonic::{Code, Status, body::Body, server::NamedService};
use tower_service::Service;

use crate::{Audit, AuthError, Authenticator, Principal, Subject, audit::Record, permissions};

/// Longest path of a method in the audit log, in bytes.
const MAX_PATH_BYTES: usize = 256;

/// What matters here of each public method, by its path.
static METHODS: LazyLock<HashMap<String, Rules>> = LazyLock::new(|| {
    let methods = public_methods().into_iter();
    let rules = methods.map(|method| {
        let is_recorded = !UNRECORDED.iter().any(|known| method.path.ends_with(known));
        let ends_with_token = method.server_streaming && !method.client_streaming;
        (method.path, Rules { ends_with_token, is_recorded })
    });
    rules.collect()
});

/// Methods of which only refusals are recorded: they read, or submit the caller's own work.
const UNRECORDED: [&str; 12] = [
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
struct Rules {
    /// Its answer ends with the caller's token: all that answer with a stream, but for those that take
    /// one as well, which renew the token themselves.
    ends_with_token: bool,
    /// Each call is recorded in the audit log.
    is_recorded: bool,
}

/// Who makes this call; in the extensions of every request that passed [`AuthService`].
#[derive(Clone)]
pub struct Caller {
    /// As the token says.
    pub principal: Arc<Principal>,
    /// The token, for the next hop.
    pub authorization: HeaderValue,
    /// What the call is about, if it is recorded.
    subject: Option<Arc<Mutex<Option<Subject>>>>,
}

impl Caller {
    /// The holder of this token.
    #[must_use]
    pub fn new(principal: Arc<Principal>, authorization: HeaderValue) -> Self {
        Self { principal, authorization, subject: None }
    }

    /// Says what the call is about, for the audit log.
    pub fn note_subject(&self, subject: impl FnOnce() -> Subject) {
        if let Some(noted) = &self.subject {
            *noted.lock() = Some(subject());
        }
    }
}

/// Wraps services in [`AuthService`].
#[derive(Clone)]
pub struct AuthLayer {
    authenticator: Arc<Authenticator>,
    audit: Audit,
}

impl AuthLayer {
    /// With this authenticator and audit log.
    #[must_use]
    pub fn new(authenticator: Arc<Authenticator>, audit: Audit) -> Self {
        Self { authenticator, audit }
    }

    /// The audit log.
    #[must_use]
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Checks that an operator makes this HTTP request.
    ///
    /// # Errors
    /// `UNAUTHENTICATED`, `PERMISSION_DENIED`, or `UNAVAILABLE` while the keys cannot be had.
    pub async fn check_operator(&self, mut request: Parts) -> Result<(), Status> {
        // No service asks for this on behalf of a client.
        request.headers.remove(CLIENT_ADDRESS);
        let caller = self.caller_of(&request).await?;
        if caller.principal.may(permissions::OPERATOR) {
            return Ok(());
        }
        let refusal = streamer_rpc::status(&RequestError::forbidden(permissions::OPERATOR));
        self.record_refusal(&request, Some(caller.principal), &refusal);
        Err(refusal)
    }

    /// Who makes this HTTP request. If its token is valid, notes that for its connection.
    ///
    /// # Errors
    /// `UNAUTHENTICATED`, or `UNAVAILABLE` while the keys cannot be had.
    pub async fn caller_of(&self, request: &Parts) -> Result<Caller, Status> {
        let outcome = caller_of(&self.authenticator, &request.headers).await;
        match &outcome {
            Ok(_) => {
                if let Some(peer) = request.extensions.get::<Peer>() {
                    peer.authenticated();
                }
            }
            Err(refusal) if refusal.code() == Code::Unauthenticated => {
                self.refused(request, refusal);
            }
            Err(_) => {}
        }
        outcome
    }

    /// Records that this request is refused.
    pub fn refused(&self, request: &Parts, refusal: &Status) {
        self.record_refusal(request, None, refusal);
    }

    fn record_refusal(&self, request: &Parts, principal: Option<Arc<Principal>>, refusal: &Status) {
        let Parts { uri, headers, extensions, .. } = request;
        let mut entry = Entry::of(uri, headers, extensions, &self.audit);
        entry.principal = principal;
        self.audit.refused(entry.record(code_name(refusal.code()), Some(refusal.message())));
    }

    /// Puts authentication in front of `service`.
    pub fn wrap<S>(&self, service: S) -> AuthService<S> {
        AuthService {
            authenticator: self.authenticator.clone(),
            audit: self.audit.clone(),
            service,
        }
    }
}

/// Lets calls with a valid token through to the service, with a [`Caller`] in their extensions.
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
        let refuse = |error: &AuthError| {
            if self.audit.is_on() {
                Entry::new(&request, &self.audit).refused(error);
            }
            AuthFuture::Refused(Some(status(error).into_http()))
        };
        let Some(authorization) = request.headers().get(AUTHORIZATION).cloned() else {
            return refuse(&AuthError::Missing);
        };
        let Some(token) = bearer(&authorization) else {
            return refuse(&AuthError::Malformed("must be `Bearer <token>`".into()));
        };
        match self.authenticator.cached(token) {
            Some(Ok(caller)) => {
                let (request, after) = prepare(request, caller, &self.authenticator, &self.audit);
                AuthFuture::Inner(self.service.call(request), after)
            }
            Some(Err(error)) => refuse(&error),
            None => {
                let (authenticator, audit) = (self.authenticator.clone(), self.audit.clone());
                let mut service = self.service.clone();
                AuthFuture::Verifying(Box::pin(async move {
                    let token = bearer(&authorization).unwrap_or_default();
                    match authenticator.authenticate(token).await {
                        Ok(caller) => {
                            let (request, mut after) =
                                prepare(request, caller, &authenticator, &audit);
                            service.call(request).await.map(|response| after.apply(response))
                        }
                        Err(error) => {
                            if audit.is_on() {
                                Entry::new(&request, &audit).refused(&error);
                            }
                            Ok(status(&error).into_http())
                        }
                    }
                }))
            }
        }
    }
}

/// Lets a caller in, and says what is to be done once there is an answer.
fn prepare<B>(
    mut request: Request<B>,
    mut caller: Caller,
    authenticator: &Authenticator,
    audit: &Audit,
) -> (Request<B>, After) {
    let rules = METHODS.get(request.uri().path()).copied().unwrap_or_default();
    let left = rules.ends_with_token.then(|| authenticator.time_left(&caller));
    let entry = audit.is_on().then(|| {
        let mut entry = Entry::new(&request, audit);
        let is_operator = caller.principal.may(permissions::OPERATOR);
        // Where an instance of the same service passes it on, it was recorded.
        let is_first = !request.headers().contains_key(FORWARDED);
        if is_first && (rules.is_recorded || is_operator) {
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
    (request, After { left, entry })
}

/// Who sends these headers, without a record in the audit log: for calls of other services.
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

/// A call, for the audit log.
struct Entry {
    audit: Audit,
    call: String,
    from: Option<IpAddr>,
    principal: Option<Arc<Principal>>,
    /// Where what it is about is noted, if it is recorded also when it is let through.
    subject: Option<Arc<Mutex<Option<Subject>>>>,
    is_recorded: bool,
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Its caller has left: what it asked for may be done all the same.
        if !self.is_recorded && self.subject.is_some() {
            self.audit
                .record(self.record("CANCELLED", Some("the caller did not await the answer")));
        }
    }
}

impl Entry {
    fn new<B>(request: &Request<B>, audit: &Audit) -> Self {
        Self::of(request.uri(), request.headers(), request.extensions(), audit)
    }

    fn of(uri: &Uri, headers: &HeaderMap, extensions: &Extensions, audit: &Audit) -> Self {
        // Only services are believed what they say of others.
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

    /// The token is not accepted.
    fn refused(&self, error: &AuthError) {
        // What cannot be found out is not refused for good.
        if error.code() == ErrorCode::Unauthorized {
            self.audit.refused(self.record("UNAUTHENTICATED", Some(&error.to_string())));
        }
    }

    fn answered(&mut self, response: &Response<Body>) {
        // A unary call that fails is answered with headers alone.
        let status = Status::from_header_map(response.headers());
        let code = status.as_ref().map_or(Code::Ok, Status::code);
        let outcome = code_name(code);
        let reason = status.as_ref().filter(|_| code != Code::Ok).map(Status::message);
        self.is_recorded = true;
        if code == Code::PermissionDenied {
            self.audit.refused(self.record(outcome, reason));
        } else if self.subject.is_some() {
            self.audit.record(self.record(outcome, reason));
        }
    }
}

/// What is to be done once a call is answered.
pub struct After {
    /// A stream ends after this time.
    left: Option<Duration>,
    entry: Option<Box<Entry>>,
}

impl After {
    fn apply(&mut self, response: Response<Body>) -> Response<Body> {
        if let Some(mut entry) = self.entry.take() {
            entry.answered(&response);
        }
        limited(response, self.left)
    }
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
    Inner(F, After),
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
            Self::Inner(future, after) => {
                Pin::new(future).poll(context).map_ok(|response| after.apply(response))
            }
            Self::Verifying(future) => future.as_mut().poll(context),
            Self::Refused(response) => {
                Poll::Ready(Ok(response.take().expect("a future is not polled after its end")))
            }
        }
    }
}

#[cfg(test)]
mod tests;
