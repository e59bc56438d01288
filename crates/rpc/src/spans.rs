//! Spans of calls, and propagation of the trace context: one layer for clients, one for servers.
//!
//! A call outside a sampled trace has no span, but its context is propagated. A call that is marked
//! [`Untraced`], such as a call made for each event, has no span, and its context is not propagated.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::future::Either;
use http::{HeaderMap, HeaderValue, Request, Response};
use streamer_telemetry::{InScope, Scope, TraceContext, Traces, is_sampled, trace_span};
use tonic::{Code, Status};
use tower::Service;
use tracing::Span;

/// Headers of W3C Trace Context.
const TRACE_PARENT: &str = "traceparent";
const TRACE_STATE: &str = "tracestate";

/// Extension of a request that has no span and does not propagate the context.
#[derive(Clone, Copy, Debug)]
pub struct Untraced;

/// Opens the span of a call.
macro_rules! rpc_span {
    ($name:literal, $kind:literal, $method:expr) => {
        trace_span!(
            $name,
            otel.name = $method,
            otel.kind = $kind,
            otel.status_code = tracing::field::Empty,
            rpc.system.name = "grpc",
            rpc.method = $method,
            rpc.response.status_code = tracing::field::Empty,
            error.type = tracing::field::Empty,
        )
    };
}

/// Returns the trace context in the headers of a call, if it is valid.
#[must_use]
pub fn trace_context(headers: &HeaderMap) -> Option<TraceContext> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    TraceContext::parse(text(TRACE_PARENT)?, text(TRACE_STATE))
}

/// Opens spans on the client side of a channel to a different process.
#[derive(Clone)]
pub(crate) struct ClientSpans<S>(pub(crate) S);

/// Opens spans on the server side of a channel within a process, where the context follows the future: a
/// client span would be redundant. Calls from outside the process use [`enter`].
#[derive(Clone)]
pub(crate) struct ServerSpans<S>(pub(crate) S);

/// Future of an untraced or a traced call.
type Traced<F, T, E> = Either<F, Pin<Box<dyn Future<Output = Result<T, E>> + Send>>>;

impl<S, B, C, E> Service<Request<B>> for ClientSpans<S>
where
    S: Service<Request<B>, Response = Response<C>, Error = E>,
    S::Future: Send + 'static,
    C: 'static,
    E: 'static,
{
    type Response = Response<C>;
    type Error = E;
    type Future = Traced<S::Future, Response<C>, E>;

    fn poll_ready(&mut self, task: &mut Context<'_>) -> Poll<Result<(), E>> {
        self.0.poll_ready(task)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let Some(context) = TraceContext::current() else {
            return Either::Left(self.0.call(request));
        };
        if is_untraced(&request) {
            return Either::Left(self.0.call(request));
        }
        let method = method(&request);
        let scope = Scope::inline(rpc_span!("rpc.client", "client", method));
        inject(&scope.trace_context().unwrap_or(context), request.headers_mut());
        let span = scope.span();
        if span.is_disabled() {
            return Either::Left(self.0.call(request));
        }
        let call = span.in_scope(|| self.0.call(request));
        Either::Right(Box::pin(recorded(call, span, |code| code != Code::Ok).in_scope(scope)))
    }
}

impl<S, B, C, E> Service<Request<B>> for ServerSpans<S>
where
    S: Service<Request<B>, Response = Response<C>, Error = E>,
    S::Future: Send + 'static,
    C: 'static,
    E: 'static,
{
    type Response = Response<C>;
    type Error = E;
    type Future = Traced<S::Future, Response<C>, E>;

    fn poll_ready(&mut self, task: &mut Context<'_>) -> Poll<Result<(), E>> {
        self.0.poll_ready(task)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if !is_sampled() {
            return Either::Left(self.0.call(request));
        }
        if is_untraced(&request) {
            let scope = Scope::outside();
            let call = scope.run(|| self.0.call(request));
            return Either::Right(Box::pin(call.in_scope(scope)));
        }
        let scope = Scope::of(server_span(method(&request)));
        let span = scope.span();
        let call = span.in_scope(|| self.0.call(request));
        Either::Right(Box::pin(recorded(call, span, is_server_error).in_scope(scope)))
    }
}

/// Returns the scope of a call from outside the process. If the caller is a service, it has already decided
/// whether the call is traced; otherwise this function decides.
#[must_use]
pub fn enter<B>(traces: &Traces, request: &Request<B>, is_service: bool) -> Scope {
    let caller = trace_context(request.headers());
    if caller.is_none() && is_service {
        return Scope::default();
    }
    traces.admit(caller, is_service, || server_span(method(request)))
}

/// Waits for the response and records its status in the span. `is_error` returns whether a code marks the
/// span as failed.
pub async fn recorded<F, C, E>(
    call: F,
    span: Span,
    is_error: impl Fn(Code) -> bool,
) -> Result<Response<C>, E>
where
    F: Future<Output = Result<Response<C>, E>>,
{
    let result = call.await;
    let code = match &result {
        Ok(response) => match Status::from_header_map(response.headers()) {
            Some(status) => status.code(),
            None if response.status().is_success() => Code::Ok,
            None => Code::Unknown,
        },
        Err(_) => Code::Unavailable,
    };
    let name = code_name(code);
    span.record("rpc.response.status_code", name);
    if code != Code::Ok {
        span.record("error.type", name);
    }
    if is_error(code) {
        span.record("otel.status_code", "ERROR");
    }
    result
}

/// Returns whether a code is a server error, by the OpenTelemetry conventions for gRPC.
#[must_use]
pub fn is_server_error(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

fn server_span(method: &str) -> Span {
    rpc_span!("rpc.server", "server", method)
}

fn is_untraced<B>(request: &Request<B>) -> bool {
    request.extensions().get::<Untraced>().is_some()
}

fn method<B>(request: &Request<B>) -> &str {
    request.uri().path().trim_start_matches('/')
}

fn inject(context: &TraceContext, headers: &mut HeaderMap) {
    if let Ok(value) = HeaderValue::try_from(context.trace_parent()) {
        headers.insert(TRACE_PARENT, value);
    }
    match context.trace_state().map(HeaderValue::try_from) {
        Some(Ok(value)) => drop(headers.insert(TRACE_STATE, value)),
        Some(Err(_)) | None => drop(headers.remove(TRACE_STATE)),
    }
}

/// Returns the name of a code as in the gRPC documentation.
#[must_use]
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
