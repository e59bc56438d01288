//! The registry that services put their metrics into.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry},
};

/// Bounds of latency histograms, in seconds: 0.1 ms to 10 s.
const LATENCY_BOUNDS: [f64; 12] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 10.0];

/// A handle to the metrics of this process.
#[derive(Clone, Default)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// No metrics yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a metric under `name`, which ends in its unit or `_total`'s stem.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        self.registry.lock().register(name, help, metric.clone());
        metric
    }

    /// Registers what is collected each time that metrics are read.
    pub fn collect(&self, collector: impl Collector + 'static) {
        self.registry.lock().register_collector(Box::new(collector));
    }

    /// A counter; `_total` is added to its name.
    #[must_use]
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(name, help, Counter::default())
    }

    /// A gauge.
    #[must_use]
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(name, help, Gauge::default())
    }

    /// A histogram of seconds.
    #[must_use]
    pub fn latency(&self, name: &str, help: &str) -> Histogram {
        self.register(name, help, Histogram::new(LATENCY_BOUNDS))
    }

    /// Everything, in the OpenMetrics text format that Prometheus reads.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry.lock()) {
            Ok(()) => text,
            // Writing to a string fails only when a metric's own encoding does.
            Err(fmt::Error) => String::from("# EOF\n"),
        }
    }
}
