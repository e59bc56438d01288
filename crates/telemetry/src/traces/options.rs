//! Options of tracing.

/// Options of tracing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TraceOptions {
    /// `http://` URL of an OTLP/gRPC collector; `None` disables spans.
    pub endpoint: Option<String>,
    /// Ratio of requests that are traced, 0 to 1, unless the caller's decision is trusted.
    pub sample_ratio: f64,
    /// Whether callers decide which of their requests are traced.
    pub trust_callers: bool,
    /// Value of `service.name`, unless `OTEL_SERVICE_NAME` is set.
    pub service: &'static str,
    /// Value of `service.version`.
    pub version: &'static str,
}
