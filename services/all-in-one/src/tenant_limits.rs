//! Limits of tenants: their configuration and their metric.

use std::time::Duration;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};
use streamer_config::{Config, Limits};
use streamer_core::{LimitsByTenant, TenantLimit, TenantLimits};
use streamer_telemetry::Metrics;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// The reported use is the highest of the last one to two intervals.
const USE_INTERVAL: Duration = Duration::from_secs(30);

/// Returns the limits of a configuration.
pub(crate) fn new(config: &Config) -> LimitsByTenant {
    let limits = LimitsByTenant::default();
    replace(&limits, config);
    limits
}

/// Replaces all limits with those of a configuration.
pub(crate) fn replace(limits: &LimitsByTenant, config: &Config) {
    let of_tenants = config.tenants.limits(&config.limits);
    let of_tenants = of_tenants.map(|(tenant, limits)| (tenant.to_owned(), tenant_limits(&limits)));
    limits.replace(tenant_limits(&config.limits), of_tenants.collect());
}

fn tenant_limits(limits: &Limits) -> TenantLimits {
    TenantLimits::new(|limit| match limit {
        TenantLimit::SubmissionsPerTenant => limits.submissions_per_second_per_tenant,
        TenantLimit::SubmissionsPerUser => limits.submissions_per_second_per_user,
        TenantLimit::QueuedPerTenant => limits.queued_requests_per_tenant,
        TenantLimit::QueuedPerUser => limits.queued_requests_per_user,
        TenantLimit::WatchesPerTenant => limits.watches_per_tenant,
        TenantLimit::WatchesPerUser => limits.watches_per_user,
        TenantLimit::StoredBytesPerTenant => limits.stored_bytes_per_tenant.0,
    })
}

/// Reports how close the use of the limits is to them.
#[derive(Debug)]
struct LimitUse(LimitsByTenant);

impl Collector for LimitUse {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let help = "Highest fraction of a limit that a tenant or user had used when it last requested more, within 30 \
                    to 60 s, by the option that sets the limit: 1 means that it was reached.";
        let name = "streamer_tenant_limit_use_ratio";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for limit in TenantLimit::ALL {
            let highest = ConstGauge::new(self.0.highest_usage(limit));
            highest.encode(family.encode_family(&[("limit", limit.option())])?)?;
        }
        Ok(())
    }
}

/// Registers the metric.
pub(crate) fn register(limits: &LimitsByTenant, metrics: &Metrics) {
    metrics.collect(LimitUse(limits.clone()));
}

/// Discards old use at an interval, until `shutdown`.
pub(crate) async fn rotate_use(limits: LimitsByTenant, shutdown: CancellationToken) {
    let mut ticks = interval(USE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => limits.rotate_use(),
        }
    }
}
