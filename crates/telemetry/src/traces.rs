//! Traces: the trace context of a request, and the execution of work within that context.
//!
//! A request whose trace is sampled has spans; every other request has only a context, whose trace ID is in
//! its log lines. Services open spans with [`trace_span!`](crate::trace_span), which does nothing if the
//! current context is not sampled. [`InScope::in_scope`] attaches a context to a future; between processes
//! it is propagated as W3C `traceparent` and `tracestate` (<https://www.w3.org/TR/trace-context/>).

mod context;
mod options;
mod pipeline;

use std::{
    pin::Pin,
    task::{Poll, ready},
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context, KeyValue,
    trace::{Link, SpanContext, SpanKind, Status, TraceContextExt, TraceFlags, TraceState, Tracer},
};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SdkTracer};
use pin_project_lite::pin_project;
use streamer_core::{AttemptNumber, Uid};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::{Metrics, TelemetryError};
use context::flags;
pub use context::{MAX_TRACE_STATE_BYTES, TraceContext, is_sampled};
pub use options::TraceOptions;
use pipeline::Pipeline;

/// Target of all exported spans; logs exclude it.
pub const TRACE_TARGET: &str = "streamer::trace";

/// Opens a child of the current span, with a name and fields as in `tracing::info_span!`. Outside a
/// sampled trace it returns `Span::none()` without evaluating the fields.
#[macro_export]
macro_rules! trace_span {
    ($name:literal $($fields:tt)*) => {
        if $crate::is_sampled() {
            $crate::tracing::info_span!(target: $crate::TRACE_TARGET, $name $($fields)*)
        } else {
            $crate::tracing::Span::none()
        }
    };
}

/// Scope of a future: a span, a context without a span, or neither.
#[derive(Clone, Debug, Default)]
pub struct Scope(Inner);

#[derive(Clone, Debug, Default)]
enum Inner {
    #[default]
    None,
    Context(Context),
    Span(Span),
}

impl Scope {
    /// Returns the current context, for work that continues in a separate task.
    #[must_use]
    pub fn current() -> Self {
        if Context::map_current(Context::has_active_span) {
            Self(Inner::Context(Context::current()))
        } else {
            Self::default()
        }
    }

    /// Returns the scope of a span for work in the same task, or an empty scope if the span is disabled.
    #[must_use]
    pub fn inline(span: Span) -> Self {
        if span.is_disabled() { Self::default() } else { Self(Inner::Span(span)) }
    }

    /// Returns the scope of a span, or the current context if the span is disabled.
    #[must_use]
    pub fn of(span: Span) -> Self {
        if span.is_disabled() { Self::current() } else { Self(Inner::Span(span)) }
    }

    /// Returns a scope outside any trace, regardless of the current context.
    #[must_use]
    pub fn outside() -> Self {
        Self(Inner::Context(Context::new()))
    }

    /// Returns a scope in the trace of a different process, without a span in this process.
    #[must_use]
    pub fn within(context: &TraceContext) -> Self {
        Self(Inner::Context(context.context()))
    }

    /// Returns the scope of work that a different process requests, with a span if the trace is sampled.
    #[must_use]
    pub fn follow(caller: &TraceContext, span: impl FnOnce() -> Span) -> Self {
        if caller.is_sampled()
            && let Some(scope) = Self::child_of(caller.context(), span)
        {
            return scope;
        }
        Self::within(caller)
    }

    fn child_of(parent: Context, span: impl FnOnce() -> Span) -> Option<Self> {
        // The parent is attached while the span is opened: the macro checks whether the current context is sampled.
        let guard = parent.attach();
        let span = span();
        drop(guard);
        (!span.is_disabled()).then_some(Self(Inner::Span(span)))
    }

    /// Returns the trace context of the scope.
    #[must_use]
    pub fn trace_context(&self) -> Option<TraceContext> {
        match &self.0 {
            Inner::None => None,
            Inner::Context(context) => TraceContext::of(context),
            Inner::Span(span) => TraceContext::of(&span.context()),
        }
    }

    /// Returns the span of the scope, which is disabled if the scope has none.
    #[must_use]
    pub fn span(&self) -> Span {
        match &self.0 {
            Inner::Span(span) => span.clone(),
            Inner::None | Inner::Context(_) => Span::none(),
        }
    }

    /// Runs synchronous work in the scope.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        match &self.0 {
            Inner::None => work(),
            Inner::Context(context) => {
                let _guard = context.clone().attach();
                work()
            }
            Inner::Span(span) => span.in_scope(work),
        }
    }
}

/// Runs futures in a [`Scope`].
pub trait InScope: Future + Sized {
    /// Returns a future that runs this future in `scope`.
    fn in_scope(self, scope: Scope) -> Scoped<Self> {
        Scoped { future: self, scope }
    }
}

impl<F: Future> InScope for F {}

pin_project! {
    /// Future that runs in a scope.
    #[must_use = "futures do nothing unless polled"]
    pub struct Scoped<F> {
        #[pin]
        future: F,
        scope: Scope,
    }
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, task: &mut std::task::Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let output = ready!(this.scope.run(|| this.future.poll(task)));
        // The span ends when the future completes, not when it is dropped.
        *this.scope = Scope::default();
        Poll::Ready(output)
    }
}

/// Decides which requests are traced, and exports their spans. Cheap to clone; the default is
/// disabled.
#[derive(Clone, Default)]
pub struct Traces {
    pipeline: Option<Pipeline>,
    sample_ratio: f64,
    trust_callers: bool,
}

/// Description of an attempt of a request, for [`Traces::attempt`].
#[derive(Clone, Copy, Debug)]
pub struct AttemptSpan<'a> {
    /// `uid` of the request.
    pub uid: Uid,
    /// Number of the attempt, from 1.
    pub attempt: AttemptNumber,
    /// Trace context of the submission.
    pub submission: &'a TraceContext,
    /// Time in the queue; `None` if a different process started the attempt.
    pub waited: Option<Waited>,
    /// Action of the request.
    pub action: &'a str,
    /// Tenant of the request.
    pub tenant: &'a str,
    /// ID that the client assigned to the request.
    pub request_id: &'a str,
}

/// Time that an attempt waited in the queue, and the duration of its claim.
#[derive(Clone, Copy, Debug)]
pub struct Waited {
    /// Time when the attempt was due.
    pub since: SystemTime,
    /// Time when the claim of the attempt began.
    pub until: SystemTime,
    /// Duration of the claim.
    pub claim: Duration,
}

/// Starts the exporter, if an endpoint is configured.
pub(crate) fn start(options: &TraceOptions) -> Result<(Traces, Option<SdkTracer>), TelemetryError> {
    let pipeline = match &options.endpoint {
        Some(endpoint) => Some(Pipeline::start(endpoint, options)?),
        None => None,
    };
    let tracer = pipeline.as_ref().map(|pipeline| pipeline.tracer().clone());
    let TraceOptions { sample_ratio, trust_callers, .. } = *options;
    Ok((Traces { pipeline, sample_ratio, trust_callers }, tracer))
}

impl Traces {
    /// Registers the counters of the exporter.
    pub fn register(&self, metrics: &Metrics) {
        if let Some(pipeline) = &self.pipeline {
            pipeline.register(metrics);
        }
    }

    /// Admits a request to the system: decides, once for all its hops and attempts, whether it is traced.
    /// `caller` is the trace context that the caller sent, if any. If `is_service` is true, the caller is a
    /// service, which has already decided.
    #[must_use]
    pub fn admit(
        &self,
        caller: Option<TraceContext>,
        is_service: bool,
        span: impl FnOnce() -> Span,
    ) -> Scope {
        if self.pipeline.is_none() {
            // Later hops, in this and other processes, must not trust the decision of an untrusted caller.
            let is_trusted = is_service || self.trust_callers;
            let caller =
                caller.map(|caller| caller.with_sampled(is_trusted && caller.is_sampled()));
            return caller.as_ref().map(Scope::within).unwrap_or_default();
        }
        let ids = RandomIdGenerator::default();
        let sampled = match &caller {
            Some(caller) if is_service || self.trust_callers => caller.is_sampled(),
            _ => is_within(self.sample_ratio, u64::from_be_bytes(ids.new_span_id().to_bytes())),
        };
        // No span has this ID: the context only passes the decision to the macro.
        let root = || {
            let (trace, span) = (ids.new_trace_id(), ids.new_span_id());
            TraceContext(SpanContext::new(trace, span, flags(sampled), true, TraceState::NONE))
        };
        match caller {
            Some(caller) => Scope::follow(&caller.with_sampled(sampled), span),
            None if sampled => {
                let scope = Scope::child_of(root().into_context(), || {
                    let span = span();
                    // This fails only if the span is disabled.
                    drop(span.set_parent(Context::new()));
                    span
                });
                scope.unwrap_or_default()
            }
            None => Scope(Inner::Context(root().into_context())),
        }
    }

    /// Opens the trace of an attempt, if the submission is sampled. The IDs of the trace are derived from the
    /// request and the number of the attempt, so that later attempts and gateways can refer to the trace.
    #[must_use]
    pub fn attempt(&self, attempt: &AttemptSpan<'_>) -> Scope {
        let Some(pipeline) = self.pipeline.as_ref().filter(|_| attempt.submission.is_sampled())
        else {
            return Scope::within(attempt.submission);
        };
        let (number, uid) = (attempt.attempt, attempt.uid.to_bytes());
        let mut links = vec![Link::with_context(attempt.submission.0.clone())];
        if number > AttemptNumber::FIRST {
            links.push(Link::with_context(attempt_context(uid, number.previous()).0));
        }
        let state = attempt.submission.0.trace_state();
        let root = attempt_context(uid, number).with_state(state);
        let mut builder = pipeline
            .tracer()
            .span_builder("attempt")
            .with_kind(SpanKind::Consumer)
            .with_attributes([
                KeyValue::new("streamer.action", attempt.action.to_owned()),
                KeyValue::new("streamer.attempt", i64::from(number.as_u32())),
                KeyValue::new("streamer.request_id", attempt.request_id.to_owned()),
                KeyValue::new("streamer.tenant", attempt.tenant.to_owned()),
                KeyValue::new("streamer.uid", attempt.uid.to_string()),
            ]);
        let context = match attempt.waited {
            Some(Waited { since, until, claim }) => {
                let since = since.min(until);
                builder = builder.with_links(links).with_start_time(since);
                let span = pipeline.build_with_ids(&root.0, builder);
                let context = Context::new().with_span(span);
                self.record("queue.wait", &context, (since, until));
                self.record("store.claim", &context, (until, until + claim));
                context
            }
            None => {
                links.push(Link::with_context(root.0.clone()));
                builder = builder.with_links(links);
                let span = pipeline.tracer().build_with_context(builder, &root.context());
                Context::new().with_span(span)
            }
        };
        Scope(Inner::Context(context))
    }

    /// Records the completed span of the delivery of an event to a client, if the request is sampled. The span
    /// begins when the event was stored, and its parent is the attempt that the event belongs to.
    pub fn delivery(
        &self,
        uid: Uid,
        attempt: AttemptNumber,
        submission: &TraceContext,
        time: (SystemTime, SystemTime),
    ) {
        if !submission.is_sampled() {
            return;
        }
        let parent = match attempt {
            AttemptNumber::NONE => submission.clone(),
            attempt => attempt_context(uid.to_bytes(), attempt),
        };
        self.record("delivery", &parent.context(), time);
    }

    fn record(&self, name: &'static str, parent: &Context, (start, end): (SystemTime, SystemTime)) {
        use opentelemetry::trace::Span as _;
        let Some(pipeline) = &self.pipeline else { return };
        let builder = pipeline.tracer().span_builder(name).with_start_time(start);
        let mut span = pipeline.tracer().build_with_context(builder, parent);
        span.end_with_timestamp(end.max(start));
    }

    /// Exports all pending spans, or returns when the timeout expires.
    pub async fn flush(&self, timeout: Duration) {
        if let Some(pipeline) = &self.pipeline {
            pipeline.flush(timeout).await;
        }
    }
}

impl Scope {
    /// Ends the span of an attempt, with the error if it failed.
    pub fn end_attempt(&self, outcome: &'static str, error: Option<&'static str>) {
        let Inner::Context(context) = &self.0 else { return };
        let span = context.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new("streamer.outcome", outcome));
            if let Some(error) = error {
                span.set_attribute(KeyValue::new("error.type", error));
                span.set_status(Status::error(""));
            }
            span.end();
        }
    }
}

/// Returns the context of the root span of an attempt's trace.
fn attempt_context(uid: [u8; 16], attempt: AttemptNumber) -> TraceContext {
    let (trace, span) = pipeline::attempt_ids(uid, attempt);
    TraceContext(SpanContext::new(trace, span, TraceFlags::SAMPLED, true, TraceState::NONE))
}

/// Returns whether a random number is within the given ratio of all numbers.
fn is_within(ratio: f64, random: u64) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "the low bits do not matter")]
    let fraction = random as f64 / u64::MAX as f64;
    fraction < ratio || ratio >= 1.0
}

#[cfg(test)]
mod tests;
