//! Metrics of the calls that a process serves, from other processes and from its own services.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    thread,
};

use http::{HeaderMap, HeaderName, Request, Response};
use pin_project_lite::pin_project;
use prometheus_client::{encoding::EncodeLabelSet, metrics::counter::Counter};
use streamer_proto::declared_methods;
use streamer_telemetry::{IndexedFamily, LatencyHistogram, Metrics, TraceContext, is_sampled};
use tokio::time::Instant;
use tonic::Code;
use tower::Service;

use crate::spans::code_name;

/// Header with the status of a call that failed before its response began.
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// Label value of methods that no service declares, so that clients cannot create label values.
const OTHER: &str = "_other";
/// Number of gRPC status codes.
const CODES: usize = 17;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct MethodLabel {
    method: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CallLabels {
    method: &'static str,
    code: &'static str,
}

/// Counts and measures served calls by method.
#[derive(Clone)]
pub struct RpcMetrics(Arc<Methods>);

struct Methods {
    /// Declared methods by path. The hash need not resist collisions: clients cannot add paths.
    by_path: HashMap<&'static str, Method, foldhash::fast::FixedState>,
    other: Method,
    calls: IndexedFamily<CallLabels, Counter>,
    durations: IndexedFamily<MethodLabel, LatencyHistogram>,
}

/// Method, as in the labels.
#[derive(Clone, Copy)]
struct Method {
    name: &'static str,
    index: usize,
}

impl RpcMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn new(metrics: &Metrics) -> Self {
        // Names are without the leading slash, like the attribute `rpc.method` of spans.
        let declared = declared_methods()
            .enumerate()
            .map(|(index, path)| (path, Method { name: path.trim_start_matches('/'), index }));
        let by_path: HashMap<_, _, _> = declared.collect();
        let count = by_path.len() + 1;
        let calls = IndexedFamily::register(
            metrics,
            "streamer_rpc_calls",
            "Calls served, from clients and from services, by method and gRPC status code. The code of a call with \
             a response stream is OK once the stream has begun",
            count * CODES,
        );
        let durations = IndexedFamily::register(
            metrics,
            "streamer_rpc_duration_seconds",
            "Time from the arrival of a call to its response, or to the beginning of its response stream, by method",
            count,
        );
        let other = Method { name: OTHER, index: by_path.len() };
        Self(Arc::new(Methods { by_path, other, calls, durations }))
    }

    /// Returns a measurement of a call of the method with the given path, which starts now, in the current trace.
    #[must_use]
    pub fn start(&self, path: &str) -> RpcTimer {
        let method = self.0.by_path.get(path).copied().unwrap_or(self.0.other);
        let trace = if is_sampled() { TraceContext::current() } else { None };
        RpcTimer { metrics: self.clone(), method, start: Instant::now(), trace, is_recorded: false }
    }

    fn record(&self, timer: &RpcTimer, code: Code) {
        let Method { name, index } = timer.method;
        let label = || MethodLabel { method: name };
        self.0.durations.with(index, label, |latency| {
            latency.observe_in(timer.start.elapsed(), timer.trace.as_ref());
        });
        let labels = || CallLabels { method: name, code: code_name(code) };
        self.0.calls.with(index * CODES + code as usize, labels, |counter| {
            counter.inc();
        });
    }
}

/// Measurement of a call in progress. A call whose caller does not wait for the response is recorded as CANCELLED, and a
/// call that panics as INTERNAL.
pub struct RpcTimer {
    metrics: RpcMetrics,
    method: Method,
    start: Instant,
    trace: Option<TraceContext>,
    is_recorded: bool,
}

impl RpcTimer {
    /// Sets the trace of the call.
    pub fn set_trace(&mut self, trace: Option<TraceContext>) {
        self.trace = trace;
    }

    /// Records the response of the call, from its headers.
    pub fn record(&mut self, headers: &HeaderMap) {
        self.is_recorded = true;
        self.metrics.record(self, response_code(headers));
    }
}

/// Returns the code of a gRPC response from its headers: OK if the response has begun.
#[must_use]
pub fn response_code(headers: &HeaderMap) -> Code {
    let status = headers.get(&GRPC_STATUS);
    status.map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()))
}

impl Drop for RpcTimer {
    fn drop(&mut self) {
        if !self.is_recorded {
            let code = if thread::panicking() { Code::Internal } else { Code::Cancelled };
            self.metrics.record(self, code);
        }
    }
}

/// Measures the calls of a service in this process.
#[derive(Clone)]
pub(crate) struct Measured<S> {
    pub(crate) service: S,
    pub(crate) metrics: RpcMetrics,
}

impl<S, B, C> Service<Request<B>> for Measured<S>
where
    S: Service<Request<B>, Response = Response<C>>,
{
    type Response = Response<C>;
    type Error = S::Error;
    type Future = MeasuredFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let timer = self.metrics.start(request.uri().path());
        MeasuredFuture { timer, call: self.service.call(request) }
    }
}

pin_project! {
    /// Response future of [`Measured`].
    pub(crate) struct MeasuredFuture<F> {
        timer: RpcTimer,
        #[pin]
        call: F,
    }
}

impl<F, C, E> Future for MeasuredFuture<F>
where
    F: Future<Output = Result<Response<C>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Poll::Ready(result) = this.call.poll(context) else { return Poll::Pending };
        if let Ok(response) = &result {
            this.timer.record(response.headers());
        }
        Poll::Ready(result)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    #[test]
    fn calls_are_counted_by_method_and_code() {
        let metrics = Metrics::new();
        let rpc = RpcMetrics::new(&metrics);
        let get = "/streamer.router.v1.RouterService/Get";
        rpc.start(get).record(&HeaderMap::new());
        let missing = Status::not_found("no such request").into_http::<()>();
        rpc.start(get).record(missing.headers());
        for path in ["/a.B/C", "/d.E/F", ""] {
            rpc.start(path).record(&HeaderMap::new());
        }
        drop(rpc.start(get));
        let text = metrics.encode();
        for line in [
            "streamer_rpc_calls_total{method=\"streamer.router.v1.RouterService/Get\",code=\"OK\"} 1",
            "streamer_rpc_calls_total{method=\"streamer.router.v1.RouterService/Get\",code=\"NOT_FOUND\"} 1",
            "streamer_rpc_calls_total{method=\"_other\",code=\"OK\"} 3",
            "streamer_rpc_calls_total{method=\"streamer.router.v1.RouterService/Get\",code=\"CANCELLED\"} 1",
            "streamer_rpc_duration_seconds_count{method=\"streamer.router.v1.RouterService/Get\"} 3",
        ] {
            assert!(text.contains(line), "{line} is missing in {text}");
        }
        assert!(!text.contains("a.B"), "{text}");
    }

    #[test]
    fn a_call_that_panics_is_an_internal_error() {
        let metrics = Metrics::new();
        let timer = RpcMetrics::new(&metrics).start("/streamer.router.v1.RouterService/Get");
        let panicked = thread::spawn(move || {
            let _timer = timer;
            panic!("a defect");
        });
        panicked.join().unwrap_err();
        let text = metrics.encode();
        let line = "streamer_rpc_calls_total{method=\"streamer.router.v1.RouterService/Get\",code=\"INTERNAL\"} 1";
        assert!(text.contains(line), "{text}");
        assert!(!text.contains("CANCELLED"), "{text}");
    }
}
