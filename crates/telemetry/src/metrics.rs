//! Metrics registry of a process.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry},
};

/// Bucket bounds of latency histograms, in seconds: 0.1 ms to 10 s.
const LATENCY_BOUNDS: [f64; 12] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 10.0];

/// Handle to the metrics of a process.
#[derive(Clone, Default)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// Returns an empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a metric under `name`, which ends with the unit; the name of a counter omits `_total`.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        self.registry.lock().register(name, help, metric.clone());
        metric
    }

    /// Registers a collector, which runs each time the metrics are read.
    pub fn collect(&self, collector: impl Collector + 'static) {
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

    /// Returns all metrics in the OpenMetrics text format, which Prometheus reads.
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
