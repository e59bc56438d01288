//! Logs, metrics and traces: a binary initializes them once and passes the handles to the services.

mod action_labels;
mod error;
mod indexed_family;
mod latency;
mod log_limiter;
mod logs;
mod metrics;
mod text_format;
mod traces;

pub use action_labels::{ActionLabel, ActionLabelOptions, ActionScope, IndexedActionLabel};
pub use error::TelemetryError;
pub use indexed_family::IndexedFamily;
pub use latency::{LatencyFamily, LatencyHistogram};
pub use log_limiter::Logs;
pub use logs::{LogFormat, Telemetry, init};
pub use metrics::Metrics;
pub use traces::{
    AttemptSpan, InScope, MAX_TRACE_STATE_BYTES, Scope, Scoped, TRACE_TARGET, TraceContext,
    TraceOptions, Traces, Waited, is_sampled,
};
#[doc(hidden)]
pub use tracing;
