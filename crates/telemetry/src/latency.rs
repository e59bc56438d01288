//! Histograms of durations, with the traces of examples.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder},
    metrics::{MetricType, TypedMetric, exemplar::HistogramWithExemplars, family::Family},
};

use streamer_core::{Clock, SystemClock};

use crate::traces::{TraceContext, is_sampled};

/// Bucket bounds in seconds: 0.1 ms to 10 s. They include the latency objectives of 50 ms and 100 ms.
const BOUNDS: [f64; 16] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

/// Histogram of durations in seconds. The latest duration of each bucket that was measured in a sampled trace is the
/// exemplar of the bucket, which is in the OpenMetrics format only.
#[derive(Clone, Debug)]
pub struct LatencyHistogram(HistogramWithExemplars<TraceLabel>);

/// Histograms of durations in seconds, by labels `L`.
pub type LatencyFamily<L> = Family<L, LatencyHistogram>;

/// Trace of an exemplar.
#[derive(Clone, Debug, EncodeLabelSet)]
struct TraceLabel {
    trace_id: String,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self(HistogramWithExemplars::new(BOUNDS.into_iter()))
    }
}

impl LatencyHistogram {
    /// Records a duration, which was measured in the current trace.
    pub fn observe(&self, duration: Duration) {
        let trace = if is_sampled() { TraceContext::current() } else { None };
        self.observe_in(duration, trace.as_ref());
    }

    /// Records a duration, which was measured in the given trace.
    pub fn observe_in(&self, duration: Duration, trace: Option<&TraceContext>) {
        let trace = trace.filter(|trace| trace.is_sampled());
        let label = trace.map(|trace| TraceLabel { trace_id: trace.trace_id() });
        let time = label.as_ref().map(|_| SystemTime::from(SystemClock.now()));
        self.0.observe(duration.as_secs_f64(), label, time);
    }
}

impl TypedMetric for LatencyHistogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for LatencyHistogram {
    fn encode(&self, encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.encode(encoder)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Metrics;

    fn trace(flags: &str) -> TraceContext {
        let parent = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
        TraceContext::parse(&parent, None).unwrap()
    }

    #[test]
    fn exemplars_are_sampled_traces() {
        let metrics = Metrics::new();
        let histogram = metrics.latency("a_seconds", "A.");
        histogram.observe_in(Duration::from_millis(20), Some(&trace("01")));
        histogram.observe_in(Duration::from_millis(60), Some(&trace("00")));
        histogram.observe(Duration::from_secs(20));
        let text = metrics.encode();
        let exemplar = "a_seconds_bucket{le=\"0.025\"} 1 # {trace_id=\"0af7651916cd43dd8448eb211c80319c\"} 0.02 ";
        assert!(text.contains(exemplar), "{text}");
        assert_eq!(text.matches('{').count(), 17 + 1, "{text}");
        let plain = metrics.encode_text();
        assert!(plain.contains("a_seconds_bucket{le=\"0.025\"} 1\n"), "{plain}");
        assert!(!plain.contains("trace_id"), "{plain}");
    }
}
