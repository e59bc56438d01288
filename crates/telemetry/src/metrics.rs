//! Metrics registry of a process.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry},
};

use crate::{action_labels::ActionLabels, text_format::from_open_metrics};

/// Bucket bounds of latency histograms, in seconds: 0.1 ms to 10 s.
const LATENCY_BOUNDS: [f64; 12] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 10.0];

/// Handle to the metrics of a process.
#[derive(Clone, Default)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    actions: ActionLabels,
}

/// Labels of metrics by action.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ActionLabel {
    action: Arc<str>,
}

/// Histograms by action.
pub type ActionHistograms = Family<ActionLabel, Histogram, fn() -> Histogram>;

impl Metrics {
    /// Returns an empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns an empty registry with at most `limit` actions as label values; all others are `_other`.
    #[must_use]
    pub fn with_max_actions(limit: usize) -> Self {
        Self { actions: ActionLabels::new(limit), ..Self::default() }
    }

    /// Returns the label value of an action.
    #[must_use]
    pub fn action(&self, action: &str) -> Arc<str> {
        self.actions.of(action)
    }

    /// Returns the labels of an action.
    #[must_use]
    pub fn action_label(&self, action: &str) -> ActionLabel {
        ActionLabel { action: self.actions.of(action) }
    }

    /// Registers a metric under `name`, which ends with the unit; the name of a counter omits `_total`.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        self.registry.lock().register(name, help, metric.clone());
        metric
    }

    /// Registers a collector, which runs each time the metrics are read.
    pub fn register_collector(&self, collector: impl Collector + 'static) {
        self.registry.lock().register_collector(Box::new(collector));
    }

    /// Registers a counter; `_total` is appended to its name.
    #[must_use]
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(name, help, Counter::default())
    }

    /// Registers a gauge.
    #[must_use]
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(name, help, Gauge::default())
    }

    /// Registers a histogram of durations in seconds.
    #[must_use]
    pub fn latency(&self, name: &str, help: &str) -> Histogram {
        self.register(name, help, latency_histogram())
    }

    /// Registers histograms of durations in seconds, by action.
    #[must_use]
    pub fn latency_by_action(&self, name: &str, help: &str) -> ActionHistograms {
        self.register(
            name,
            help,
            Family::new_with_constructor(latency_histogram as fn() -> Histogram),
        )
    }

    /// Returns all metrics in the text format of Prometheus, version 0.0.4.
    #[must_use]
    pub fn encode_text(&self) -> String {
        from_open_metrics(&self.encode())
    }

    /// Returns all metrics in the OpenMetrics text format.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry.lock()) {
            Ok(()) => text,
            // Writing to a string cannot fail: only the encoding of a metric can.
            Err(fmt::Error) => String::from("# EOF\n"),
        }
    }
}

/// Returns a histogram of durations in seconds.
#[must_use]
pub fn latency_histogram() -> Histogram {
    Histogram::new(LATENCY_BOUNDS)
}
