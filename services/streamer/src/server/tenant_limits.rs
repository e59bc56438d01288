//! Configuration and metric of the tenant limits.

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

/// Interval at which old usage is discarded. The metric reports the highest usage of the last one to two intervals.
const USE_INTERVAL: Duration = Duration::from_secs(30);

/// Creates tenant limits from a configuration.
pub(crate) fn new(config: &Config) -> LimitsByTenant {
    let limits = LimitsByTenant::default();
    replace(&limits, config);
    limits
}

/// Replaces all tenant limits with those of a configuration.
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

/// Collects the highest used fraction of each limit.
#[derive(Debug)]
struct LimitUse(LimitsByTenant);

impl Collector for LimitUse {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let help = "Highest fraction of a limit used by any tenant or user, measured when it requested more in the \
                    last 30 to 60 s, by the option that sets the limit. 1 means that the limit was reached.";
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
    metrics.register_collector(LimitUse(limits.clone()));
}

/// Discards old usage every [`USE_INTERVAL`] until `shutdown` is cancelled.
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
