//! Limits repeated warnings: a fault that affects every request must not write a line for each of them.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use tracing::{Level, Metadata, callsite::Identifier};

use crate::Metrics;

/// Maximum number of lines that one statement writes per [`INTERVAL`].
const MAX_LINES: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(10);

/// Warnings and errors that the process has logged.
#[derive(Clone, Debug, Default)]
pub struct Logs(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// By statement of the source code, which bounds the size.
    statements: Mutex<HashMap<Identifier, Statement>>,
    written: Family<LevelLabel, Counter>,
    suppressed: Family<LevelLabel, Counter>,
}

#[derive(Debug)]
struct Statement {
    interval_start: Instant,
    lines: u32,
    suppressed: u64,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LevelLabel {
    level: &'static str,
}

/// Decision about a line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// The line is written.
    Write {
        /// Number of lines of the same statement that have been suppressed since the last line.
        suppressed: u64,
    },
    Suppress,
}

impl Logs {
    /// Registers the metrics.
    pub fn register(&self, metrics: &Metrics) {
        metrics.register(
            "streamer_log_lines",
            "Warnings and errors written to the log, by level",
            self.0.written.clone(),
        );
        metrics.register(
            "streamer_log_lines_suppressed",
            "Warnings and errors that were not written, because the same statement of the program had written 10 \
             lines within 10 s, by level",
            self.0.suppressed.clone(),
        );
    }

    /// Decides whether a line is written. Lines below the level of warnings are not limited.
    pub(crate) fn admit(&self, metadata: &Metadata<'_>, now: Instant) -> Admission {
        let level = match *metadata.level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            _ => return Admission::Write { suppressed: 0 },
        };
        let admission = {
            let mut statements = self.0.statements.lock();
            let statement = statements.entry(metadata.callsite()).or_insert(Statement {
                interval_start: now,
                lines: 0,
                suppressed: 0,
            });
            statement.admit(now)
        };
        let counters = match admission {
            Admission::Write { .. } => &self.0.written,
            Admission::Suppress => &self.0.suppressed,
        };
        counters.get_or_create(&LevelLabel { level }).inc();
        admission
    }
}

impl Statement {
    fn admit(&mut self, now: Instant) -> Admission {
        if now.duration_since(self.interval_start) >= INTERVAL {
            (self.interval_start, self.lines) = (now, 0);
        }
        if self.lines >= MAX_LINES {
            self.suppressed += 1;
            return Admission::Suppress;
        }
        self.lines += 1;
        Admission::Write { suppressed: std::mem::take(&mut self.suppressed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_writes_ten_lines_per_interval() {
        let start = Instant::now();
        let mut statement = Statement { interval_start: start, lines: 0, suppressed: 0 };
        let written = |admission| admission == Admission::Write { suppressed: 0 };
        assert!((0..10).all(|_| written(statement.admit(start))));
        for _ in 0..3 {
            assert_eq!(statement.admit(start + Duration::from_secs(9)), Admission::Suppress);
        }
        let later = start + INTERVAL;
        assert_eq!(statement.admit(later), Admission::Write { suppressed: 3 });
        assert_eq!(statement.admit(later), Admission::Write { suppressed: 0 });
    }

    #[test]
    fn lines_are_counted_by_level() {
        use tracing_subscriber::{Layer, layer::SubscriberExt};

        struct Admitting(Logs);
        impl<S: tracing::Subscriber> Layer<S> for Admitting {
            fn on_event(
                &self,
                event: &tracing::Event<'_>,
                _: tracing_subscriber::layer::Context<'_, S>,
            ) {
                self.0.admit(event.metadata(), Instant::now());
            }
        }
        let (logs, metrics) = (Logs::default(), Metrics::new());
        logs.register(&metrics);
        let subscriber = tracing_subscriber::registry().with(Admitting(logs));
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..12 {
                tracing::warn!(number, "a warning");
                tracing::info!(number, "information");
            }
            tracing::error!("an error");
        });
        let text = metrics.encode();
        for line in [
            "streamer_log_lines_total{level=\"warn\"} 10",
            "streamer_log_lines_suppressed_total{level=\"warn\"} 2",
            "streamer_log_lines_total{level=\"error\"} 1",
        ] {
            assert!(text.contains(line), "{line} is missing in {text}");
        }
    }
}
