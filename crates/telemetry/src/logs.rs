//! Logs on standard error.

use std::{
    env,
    io::{IsTerminal, stderr},
    str::FromStr,
};

use tracing_subscriber::{EnvFilter, fmt};

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// As it is written in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("must be text or json".into()),
        }
    }
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter cannot be read.
    #[error("log filter {filter:?} is malformed: {reason}")]
    Filter {
        /// As configured.
        filter: String,
        /// What is wrong.
        reason: String,
    },
    /// Logging was set up before.
    #[error("logging is set up already: {0}")]
    Twice(String),
}

/// Sends logs to standard error. `filter` is a level (`info`) or directives
/// (`info,streamer_gateway=debug`).
///
/// # Errors
/// When the filter cannot be read, or logging was set up before.
pub fn init_logs(filter: &str, format: LogFormat) -> Result<(), TelemetryError> {
    let parsed = EnvFilter::try_new(filter).map_err(|error| TelemetryError::Filter {
        filter: filter.to_owned(),
        reason: error.to_string(),
    })?;
    let builder = fmt().with_env_filter(parsed).with_writer(stderr).with_ansi(uses_colors());
    let outcome = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    outcome.map_err(|error| TelemetryError::Twice(error.to_string()))
}

/// Returns whether log lines are colored: on a terminal, unless `NO_COLOR` is set
/// (<https://no-color.org>).
fn uses_colors() -> bool {
    stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
