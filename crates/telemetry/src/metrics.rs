//! Metrics registry of a process.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge},
    registry::{Metric, Registry},
};

use crate::{
    ActionLabelOptions, ActionScope, IndexedActionLabel, LatencyHistogram,
    action_labels::ActionLabels, text_format::from_open_metrics,
};

/// Handle to the metrics of a process.
#[derive(Clone, Default)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    actions: ActionLabels,
}

impl Metrics {
    /// Returns an empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns an empty registry with the given options of the label `action`.
    #[must_use]
    pub fn with_action_labels(options: ActionLabelOptions) -> Self {
        Self { actions: ActionLabels::new(options), ..Self::default() }
    }

    /// Returns the label of an action that is declared for the given scope.
    #[must_use]
    pub fn action_label(&self, action: &str, scope: ActionScope) -> IndexedActionLabel {
        self.actions.of(action, scope)
    }

    /// Returns the label of an action without a declaration, whose scope is unknown.
    #[must_use]
    pub fn other_action_label(&self) -> IndexedActionLabel {
        self.actions.other()
    }

    /// Returns the maximum number of labels of actions.
    #[must_use]
    pub fn action_label_count(&self) -> usize {
        self.actions.count()
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
    pub fn latency(&self, name: &str, help: &str) -> LatencyHistogram {
        self.register(name, help, LatencyHistogram::default())
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
