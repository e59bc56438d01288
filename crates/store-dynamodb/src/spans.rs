//! Spans for SDK calls, which record the number of retries and whether the call was throttled.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use aws_sdk_dynamodb::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_runtime_api::{
    box_error::BoxError,
    client::{
        interceptors::context::{
            BeforeSerializationInterceptorContextRef, FinalizerInterceptorContextRef,
        },
        orchestrator::Metadata,
    },
};
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use streamer_telemetry::trace_span;
use tracing::{Span, field::Empty};

/// Substrings of the names of DynamoDB's throttling errors.
const THROTTLING_ERRORS: [&[u8]; 3] =
    [b"Throttling", b"ProvisionedThroughputExceeded", b"RequestLimitExceeded"];

/// Opens a span for each call in a sampled trace.
#[derive(Debug)]
pub(crate) struct CallSpans;

/// Span of a call in progress.
#[derive(Clone, Debug)]
struct CallSpan(Arc<Call>);

#[derive(Debug)]
struct Call {
    span: Span,
    attempts: AtomicU32,
    has_response: AtomicBool,
}

impl Drop for Call {
    /// Records an error for a call that was dropped before its response, because of a timeout or a cancellation.
    fn drop(&mut self) {
        if !*self.has_response.get_mut() {
            self.span.record("otel.status_code", "ERROR");
        }
    }
}

impl Storable for CallSpan {
    type Storer = StoreReplace<Self>;
}

impl Intercept for CallSpans {
    fn name(&self) -> &'static str {
        "CallSpans"
    }

    fn read_before_execution(
        &self,
        _: &BeforeSerializationInterceptorContextRef<'_>,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let span = trace_span!(
            "dynamodb",
            otel.name = Empty,
            otel.kind = "client",
            otel.status_code = Empty,
            db.system.name = "aws.dynamodb",
            db.operation.name = Empty,
            http.request.resend_count = Empty,
            streamer.throttled = Empty,
        );
        if span.is_disabled() {
            return Ok(());
        }
        let has_response = AtomicBool::new(false);
        let call = Call { span, attempts: AtomicU32::new(0), has_response };
        config.interceptor_state().store_put(CallSpan(Arc::new(call)));
        Ok(())
    }

    fn read_before_serialization(
        &self,
        _: &BeforeSerializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Some(CallSpan(call)) = config.load::<CallSpan>() else { return Ok(()) };
        let operation = config.load::<Metadata>().map_or("", Metadata::name);
        call.span.record("otel.name", format!("DynamoDB.{operation}"));
        call.span.record("db.operation.name", operation);
        Ok(())
    }

    fn read_after_attempt(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Some(CallSpan(call)) = config.load::<CallSpan>() else { return Ok(()) };
        call.attempts.fetch_add(1, Ordering::Relaxed);
        let error_response =
            context.response().filter(|response| response.status().as_u16() >= 400);
        let is_throttled =
            error_response.and_then(|response| response.body().bytes()).is_some_and(|body| {
                THROTTLING_ERRORS
                    .iter()
                    .any(|name| body.windows(name.len()).any(|part| part == *name))
            });
        if is_throttled {
            call.span.record("streamer.throttled", true);
        }
        Ok(())
    }

    fn read_after_execution(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Some(CallSpan(call)) = config.load::<CallSpan>() else { return Ok(()) };
        let retries = call.attempts.load(Ordering::Relaxed).saturating_sub(1);
        if retries > 0 {
            call.span.record("http.request.resend_count", retries);
        }
        // A failed condition is a valid response.
        let is_valid = context.response().is_some_and(|response| {
            response.status().is_success()
                || response.body().bytes().is_some_and(|body| {
                    let name = b"ConditionalCheckFailed";
                    body.windows(name.len()).any(|part| part == name)
                })
        });
        call.has_response.store(is_valid, Ordering::Relaxed);
        Ok(())
    }
}
