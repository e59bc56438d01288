//! Logs on standard error.

use std::{
    env, fmt,
    io::{IsTerminal, stderr},
    time::Instant,
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
    Metrics,
    error::TelemetryError,
    log_limiter::{Admission, Logs},
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

/// Logs and traces of a process.
#[derive(Clone, Default)]
pub struct Telemetry {
    /// Traces that the process exports.
    pub traces: Traces,
    /// Lines that the process logs.
    pub logs: Logs,
}

impl Telemetry {
    /// Registers the metrics of traces and logs.
    pub fn register(&self, metrics: &Metrics) {
        self.traces.register(metrics);
        self.logs.register(metrics);
    }
}

/// Initializes logs to standard error, and spans to a collector. `filter` is a level (`info`) or
/// directives (`info,streamer_gateway=debug`) for logs. A line that belongs to a trace ends with its
/// `trace_id`, and with `span_id` if this process records a span for it. A statement that logs warnings or errors
/// writes at most 10 lines within 10 s; its next line has the number of `suppressed` lines.
///
/// # Errors
/// Returns an error if the filter or the endpoint is invalid, or logging is already initialized.
pub fn init(
    filter: &str,
    format: LogFormat,
    traces: &TraceOptions,
) -> Result<Telemetry, TelemetryError> {
    let malformed = |error: ParseError| TelemetryError::Filter {
        filter: filter.to_owned(),
        reason: error.to_string(),
    };
    let no_spans = format!("{TRACE_TARGET}=off").parse().map_err(malformed)?;
    let parsed = EnvFilter::try_new(filter).map_err(malformed)?.add_directive(no_spans);
    let (traces, tracer) = start(traces)?;
    let logs = Logs::default();
    let outcome = match tracer {
        // One filter for all layers costs less than a filter per layer.
        None => registry().with(parsed).with(stderr_layer(format, logs.clone())).try_init(),
        Some(tracer) => {
            let spans = OpenTelemetryLayer::new(tracer)
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false)
                .with_target(false)
                .with_filter(Targets::new().with_target(TRACE_TARGET, Level::INFO));
            registry()
                .with(spans)
                .with(stderr_layer(format, logs.clone()).with_filter(parsed))
                .try_init()
        }
    };
    outcome.map_err(|error| TelemetryError::Twice(error.to_string()))?;
    Ok(Telemetry { traces, logs })
}

/// Returns the layer that writes events to standard error.
fn stderr_layer<S>(format: LogFormat, logs: Logs) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = layer().with_writer(stderr).with_ansi(uses_colors());
    match format {
        LogFormat::Text => lines
            .map_event_format(|inner| {
                let inner = inner.with_ansi(uses_colors());
                LineFormat { inner, format, logs }
            })
            .boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .map_event_format(|inner| LineFormat { inner, format, logs })
            .boxed(),
    }
}

/// Returns whether log lines are colored: on a terminal, unless `NO_COLOR` is set
/// (<https://no-color.org>).
fn uses_colors() -> bool {
    stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Format of a line: limits repeated warnings, and appends the trace ID and span ID of the event.
struct LineFormat<F> {
    inner: F,
    format: LogFormat,
    logs: Logs,
}

impl<S, N, F> FormatEvent<S, N> for LineFormat<F>
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
        let suppressed = match self.logs.admit(event.metadata(), Instant::now()) {
            Admission::Write { suppressed } => suppressed,
            // An empty line is not written.
            Admission::Suppress => return Ok(()),
        };
        let trace = TraceContext::current();
        if trace.is_none() && suppressed == 0 {
            return self.inner.format_event(context, writer, event);
        }
        let mut line = String::new();
        self.inner.format_event(context, Writer::new(&mut line), event)?;
        writer.write_str(&append_fields(&line, suppressed, trace.as_ref(), self.format))
    }
}

/// Appends the number of suppressed lines, if it is not 0, and the IDs of the trace to a line.
fn append_fields(
    line: &str,
    suppressed: u64,
    trace: Option<&TraceContext>,
    format: LogFormat,
) -> String {
    let suppressed = (suppressed > 0).then(|| ("suppressed", suppressed.to_string()));
    let trace_id = trace.map(|trace| ("trace_id", trace.trace_id()));
    let span_id = trace.and_then(TraceContext::local_span_id).map(|id| ("span_id", id.to_string()));
    let fields = [suppressed, trace_id, span_id].into_iter().flatten();
    let line = line.trim_end();
    match format {
        LogFormat::Text => {
            let fields = fields.map(|(name, value)| format!(" {name}={value}"));
            format!("{line}{}\n", fields.collect::<String>())
        }
        LogFormat::Json => {
            let object = line.strip_suffix('}').unwrap_or(line);
            let fields = fields.map(|(name, value)| match name {
                "suppressed" => format!(",\"{name}\":{value}"),
                _ => format!(",\"{name}\":\"{value}\""),
            });
            format!("{object}{}}}\n", fields.collect::<String>())
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
        let text = append_fields(" INFO hello\n", 0, Some(&trace), LogFormat::Text);
        assert_eq!(text, format!(" INFO hello trace_id={id}\n"));
        let json = append_fields("{\"message\":\"hello\"}\n", 0, Some(&trace), LogFormat::Json);
        assert_eq!(json, format!("{{\"message\":\"hello\",\"trace_id\":\"{id}\"}}\n"));
    }

    #[test]
    fn a_line_has_the_number_of_suppressed_lines() {
        let text = append_fields(" WARN hello\n", 7, None, LogFormat::Text);
        assert_eq!(text, " WARN hello suppressed=7\n");
        let json = append_fields("{\"message\":\"hello\"}\n", 7, None, LogFormat::Json);
        assert_eq!(json, "{\"message\":\"hello\",\"suppressed\":7}\n");
    }
}
