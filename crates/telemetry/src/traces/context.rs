//! Position of an operation in a trace, in the format of W3C Trace Context.

use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator},
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use streamer_core::TraceParent;

/// Maximum size of a `tracestate`, in bytes; a larger one is ignored. W3C requires that at least 512 characters
/// are propagated.
pub const MAX_TRACE_STATE_BYTES: usize = 512;
/// Length of a `traceparent` of version 00.
const TRACE_PARENT_BYTES: usize = 55;
/// Maximum length of a `traceparent`; later versions may be longer than version 00.
pub(super) const MAX_TRACE_PARENT_BYTES: usize = 256;

/// Position of an operation in a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceContext(pub(super) SpanContext);

struct Headers<'a>(&'a str, Option<&'a str>);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => Some(self.0),
            "tracestate" => self.1,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// Returns whether the current trace is sampled.
#[must_use]
pub fn is_sampled() -> bool {
    Context::map_current(|context| {
        context.has_active_span() && context.span().span_context().is_sampled()
    })
}

impl TraceContext {
    /// Parses the W3C headers. Returns `None` if `traceparent` is invalid. A `tracestate` that is invalid or too
    /// long is ignored, as W3C requires.
    #[must_use]
    pub fn parse(trace_parent: &str, trace_state: Option<&str>) -> Option<Self> {
        if let (Some(parent), None) = (TraceParent::parse(trace_parent), trace_state) {
            return Some(Self::from_header(parent, TraceState::NONE));
        }
        // The length is checked because the propagator accepts shorter fields.
        let is_of_version_00 = trace_parent.starts_with("00-");
        if trace_parent.len() > MAX_TRACE_PARENT_BYTES
            || (is_of_version_00 && trace_parent.len() != TRACE_PARENT_BYTES)
        {
            return None;
        }
        let trace_state = trace_state.filter(|state| state.len() <= MAX_TRACE_STATE_BYTES);
        let headers = Headers(trace_parent, trace_state);
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
        Self::of(&context)
    }

    /// Returns the current context.
    #[must_use]
    pub fn current() -> Option<Self> {
        Context::map_current(Self::of)
    }

    pub(super) fn of(context: &Context) -> Option<Self> {
        if !context.has_active_span() {
            return None;
        }
        let span = context.span().span_context().clone();
        span.is_valid().then_some(Self(span))
    }

    /// Returns the W3C `traceparent`, which has 55 characters.
    #[must_use]
    pub fn trace_parent(&self) -> String {
        self.header().to_text()
    }

    /// Returns the content of `traceparent`.
    #[must_use]
    pub fn header(&self) -> TraceParent {
        TraceParent {
            trace_id: self.0.trace_id().to_bytes(),
            span_id: self.0.span_id().to_bytes(),
            is_sampled: self.is_sampled(),
        }
    }

    fn from_header(parent: TraceParent, state: TraceState) -> Self {
        let flags = flags(parent.is_sampled);
        let (trace, span) =
            (TraceId::from_bytes(parent.trace_id), SpanId::from_bytes(parent.span_id));
        Self(SpanContext::new(trace, span, flags, true, state))
    }

    /// Returns the W3C `tracestate`, which has at most [`MAX_TRACE_STATE_BYTES`] bytes.
    #[must_use]
    pub fn trace_state(&self) -> Option<String> {
        let state = self.0.trace_state().header();
        (!state.is_empty()).then_some(state)
    }

    /// Returns the trace ID: 32 hexadecimal digits.
    #[must_use]
    pub fn trace_id(&self) -> String {
        self.header().trace_id_text()
    }

    /// Returns the span ID, which has 16 hexadecimal digits, if this process records the span.
    pub(crate) fn local_span_id(&self) -> Option<String> {
        let is_local = self.0.is_sampled() && !self.0.is_remote();
        is_local.then(|| self.0.span_id().to_string())
    }

    /// Returns whether the trace is sampled.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.0.is_sampled()
    }

    /// Returns the same position with the given sampling decision.
    pub(super) fn with_sampled(&self, sampled: bool) -> Self {
        let state = self.0.trace_state().clone();
        Self(SpanContext::new(self.0.trace_id(), self.0.span_id(), flags(sampled), true, state))
    }

    pub(super) fn with_state(&self, state: &TraceState) -> Self {
        let (trace, span) = (self.0.trace_id(), self.0.span_id());
        Self(SpanContext::new(trace, span, self.0.trace_flags(), true, state.clone()))
    }

    pub(super) fn context(&self) -> Context {
        self.clone().into_context()
    }

    pub(super) fn into_context(self) -> Context {
        Context::new().with_remote_span_context(self.0)
    }
}

pub(super) fn flags(is_sampled: bool) -> TraceFlags {
    if is_sampled { TraceFlags::SAMPLED } else { TraceFlags::default() }
}
