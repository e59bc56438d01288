//! Logs on standard error.

use std::{
    env, fmt,
    io::{IsTerminal, stderr},
    str::FromStr,
};

use tracing::{Event, Level, Subscriber};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{ParseError, Targets},
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer, layer},
    layer::SubscriberExt,
    registry,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use crate::traces::{TRACE_TARGET, TraceContext, TraceOptions, Traces, start};

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

/// Why logs or traces could not be set up.
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
    /// Traces cannot be sent to this endpoint.
    #[error("cannot send traces to {endpoint:?}: {reason}")]
    Traces {
        /// As configured.
        endpoint: String,
        /// What is wrong.
        reason: String,
    },
    /// Logging was set up before.
    #[error("logging is set up already: {0}")]
    Twice(String),
}

/// Sends logs to standard error, and spans to a collector. `filter` is a level (`info`) or directives
/// (`info,streamer_gateway=debug`) for logs. A line that belongs to a trace ends with its `trace_id`,
/// and with `span_id` if this process records a span for it.
///
/// # Errors
/// When the filter or the endpoint cannot be used, or logging was set up before.
pub fn init(
    filter: &str,
    format: LogFormat,
    traces: &TraceOptions,
) -> Result<Traces, TelemetryError> {
    let malformed = |error: ParseError| TelemetryError::Filter {
        filter: filter.to_owned(),
        reason: error.to_string(),
    };
    let no_spans = format!("{TRACE_TARGET}=off").parse().map_err(malformed)?;
    let parsed = EnvFilter::try_new(filter).map_err(malformed)?.add_directive(no_spans);
    let (traces, tracer) = start(traces)?;
    let outcome = match tracer {
        // A filter for all layers costs less than one for each.
        None => registry().with(parsed).with(log_lines(format)).try_init(),
        Some(tracer) => {
            let spans = OpenTelemetryLayer::new(tracer)
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false)
                .with_target(false)
                .with_filter(Targets::new().with_target(TRACE_TARGET, Level::INFO));
            registry().with(spans).with(log_lines(format).with_filter(parsed)).try_init()
        }
    };
    outcome.map_err(|error| TelemetryError::Twice(error.to_string()))?;
    Ok(traces)
}

/// Writes events to standard error.
fn log_lines<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = layer().with_writer(stderr).with_ansi(uses_colors());
    match format {
        LogFormat::Text => lines
            .map_event_format(|inner| {
                let inner = inner.with_ansi(uses_colors());
                WithTrace { inner, format }
            })
            .boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .map_event_format(|inner| WithTrace { inner, format })
            .boxed(),
    }
}

/// Returns whether log lines are colored: on a terminal, unless `NO_COLOR` is set
/// (<https://no-color.org>).
fn uses_colors() -> bool {
    stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Adds where an event belongs to in a trace.
struct WithTrace<F> {
    inner: F,
    format: LogFormat,
}

impl<S, N, F> FormatEvent<S, N> for WithTrace<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let Some(trace) = TraceContext::current() else {
            return self.inner.format_event(context, writer, event);
        };
        let mut line = String::new();
        self.inner.format_event(context, Writer::new(&mut line), event)?;
        writer.write_str(&with_trace(&line, &trace, self.format))
    }
}

fn with_trace(line: &str, trace: &TraceContext, format: LogFormat) -> String {
    let (id, line) = (trace.trace_id(), line.trim_end());
    match (format, trace.local_span_id()) {
        (LogFormat::Text, None) => format!("{line} trace_id={id}\n"),
        (LogFormat::Text, Some(span)) => format!("{line} trace_id={id} span_id={span}\n"),
        (LogFormat::Json, span) => {
            let object = line.strip_suffix('}').unwrap_or(line);
            let span = span.map(|span| format!(",\"span_id\":\"{span}\"")).unwrap_or_default();
            format!("{object},\"trace_id\":\"{id}\"{span}}}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_ends_with_its_place_in_the_trace() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let trace = TraceContext::parse(parent, None).unwrap();
        let id = "0af7651916cd43dd8448eb211c80319c";
        let text = with_trace(" INFO hello\n", &trace, LogFormat::Text);
        assert_eq!(text, format!(" INFO hello trace_id={id}\n"));
        let json = with_trace("{\"message\":\"hello\"}\n", &trace, LogFormat::Json);
        assert_eq!(json, format!("{{\"message\":\"hello\",\"trace_id\":\"{id}\"}}\n"));
    }
}
