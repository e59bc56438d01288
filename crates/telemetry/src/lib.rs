//! Logs, metrics and traces: a binary initializes them once and passes the handles to the services.

mod action_labels;
mod error;
mod logs;
mod metrics;
mod text_format;
mod traces;

pub use error::TelemetryError;
pub use logs::{LogFormat, init};
pub use metrics::{ActionHistograms, ActionLabel, Metrics, latency_histogram};
pub use traces::{
    AttemptSpan, InScope, MAX_TRACE_STATE_BYTES, Scope, Scoped, TRACE_TARGET, TraceContext,
    TraceOptions, Traces, Waited, is_sampled,
};
#[doc(hidden)]
pub use tracing;
