//! Logs on standard error.

use std::{
    env, fmt,
    io::{IsTerminal, stderr},
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

use crate::{
    error::TelemetryError,
    traces::{TRACE_TARGET, TraceContext, TraceOptions, Traces, start},
};

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Human-readable text.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Initializes logs to standard error, and spans to a collector. `filter` is a level (`info`) or
/// directives (`info,streamer_gateway=debug`) for logs. A line that belongs to a trace ends with its
/// `trace_id`, and with `span_id` if this process records a span for it.
///
/// # Errors
/// Returns an error if the filter or the endpoint is invalid, or logging is already initialized.
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
        // One filter for all layers costs less than a filter per layer.
        None => registry().with(parsed).with(stderr_layer(format)).try_init(),
        Some(tracer) => {
            let spans = OpenTelemetryLayer::new(tracer)
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false)
                .with_target(false)
                .with_filter(Targets::new().with_target(TRACE_TARGET, Level::INFO));
            registry().with(spans).with(stderr_layer(format).with_filter(parsed)).try_init()
        }
    };
    outcome.map_err(|error| TelemetryError::Twice(error.to_string()))?;
    Ok(traces)
}

/// Returns the layer that writes events to standard error.
fn stderr_layer<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = layer().with_writer(stderr).with_ansi(uses_colors());
    match format {
        LogFormat::Text => lines
            .map_event_format(|inner| {
                let inner = inner.with_ansi(uses_colors());
                AppendTraceIds { inner, format }
            })
            .boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .map_event_format(|inner| AppendTraceIds { inner, format })
            .boxed(),
    }
}

/// Returns whether log lines are colored: on a terminal, unless `NO_COLOR` is set
/// (<https://no-color.org>).
fn uses_colors() -> bool {
    stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Appends the trace ID and span ID of an event to its line.
struct AppendTraceIds<F> {
    inner: F,
    format: LogFormat,
}

impl<S, N, F> FormatEvent<S, N> for AppendTraceIds<F>
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
        writer.write_str(&append_trace_ids(&line, &trace, self.format))
    }
}

fn append_trace_ids(line: &str, trace: &TraceContext, format: LogFormat) -> String {
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
    fn lines_of_a_trace_end_with_its_id() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let trace = TraceContext::parse(parent, None).unwrap();
        let id = "0af7651916cd43dd8448eb211c80319c";
        let text = append_trace_ids(" INFO hello\n", &trace, LogFormat::Text);
        assert_eq!(text, format!(" INFO hello trace_id={id}\n"));
        let json = append_trace_ids("{\"message\":\"hello\"}\n", &trace, LogFormat::Json);
        assert_eq!(json, format!("{{\"message\":\"hello\",\"trace_id\":\"{id}\"}}\n"));
    }
}
