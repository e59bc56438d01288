//! Metrics of the process and its version, with the names that Prometheus client libraries use.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        counter::ConstCounter,
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
};
use streamer_core::Timestamp;
use streamer_telemetry::Metrics;

/// /proc counts 100 clock ticks per second on all supported Linux platforms.
const TICKS_PER_SECOND: f64 = 100.0;

/// Registers the metrics.
pub(crate) fn register(metrics: &Metrics, now: Timestamp) {
    let info: Family<[(&str, &str); 1], Gauge> = metrics.register(
        "streamer_build_info",
        "Version of this program; the value is always 1",
        Family::default(),
    );
    info.get_or_create(&[("version", env!("CARGO_PKG_VERSION"))]).set(1);
    metrics.register_collector(ProcessMetrics { start_seconds: now.as_millis() as f64 / 1000.0 });
}

#[derive(Debug)]
struct ProcessMetrics {
    start_seconds: f64,
}

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut gauge = |name, help, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        gauge(
            "process_start_time_seconds",
            "Start of the process, as a Unix time",
            self.start_seconds,
        )?;
        if let Some(bytes) = resident_bytes() {
            gauge("process_resident_memory_bytes", "Resident memory of the process", bytes)?;
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            gauge("process_open_fds", "Open file descriptors of the process", open.count() as f64)?;
        }
        if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
            gauge("process_max_fds", "Maximum number of open file descriptors", limit as f64)?;
        }
        if let Some(seconds) = processor_seconds() {
            let counter = ConstCounter::new(seconds);
            let help = "Processor time of the process, in user and system mode";
            let descriptor = encoder.encode_descriptor(
                "process_cpu_seconds",
                help,
                None,
                counter.metric_type(),
            )?;
            counter.encode(descriptor)?;
        }
        Ok(())
    }
}

fn resident_bytes() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024.0)
}

fn processor_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the program, in parentheses, may contain spaces.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11).map(str::parse::<f64>);
    Some((ticks.next()?.ok()? + ticks.next()?.ok()?) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_has_memory_and_processor_time() {
        let metrics = Metrics::new();
        register(&metrics, Timestamp::from_millis(1_700_000_000_000));
        let text = metrics.encode();
        for name in [
            "streamer_build_info{version=",
            "process_start_time_seconds 1",
            "process_resident_memory_bytes ",
            "process_open_fds ",
            "process_max_fds ",
            "process_cpu_seconds_total ",
        ] {
            assert!(text.contains(name), "{name} is missing in {text}");
        }
    }
}
