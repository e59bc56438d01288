//! Logs and metrics: set up once by a binary, handed to the services.

mod logs;
mod metrics;

pub use logs::{LogFormat, TelemetryError, init_logs};
pub use metrics::Metrics;
