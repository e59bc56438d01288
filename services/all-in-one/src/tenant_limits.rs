//! Limits of tenants: from the configuration, and as metrics.

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

/// The highest use is that of between one and two of these.
const USE_INTERVAL: Duration = Duration::from_secs(30);

/// The limits that the configuration sets.
pub(crate) fn new(config: &Config) -> LimitsByTenant {
    let limits = LimitsByTenant::default();
    replace(&limits, config);
    limits
}

/// Sets all of them as the configuration does.
pub(crate) fn replace(limits: &LimitsByTenant, config: &Config) {
    let of_tenants = config.tenants.limits(&config.limits);
    let of_tenants = of_tenants.map(|(tenant, limits)| (tenant.to_owned(), of(&limits)));
    limits.replace(of(&config.limits), of_tenants.collect());
}

fn of(limits: &Limits) -> TenantLimits {
    TenantLimits::new(|limit| match limit {
        TenantLimit::SubmissionsPerTenant => limits.submissions_per_second_per_tenant,
        TenantLimit::SubmissionsPerUser => limits.submissions_per_second_per_user,
        TenantLimit::QueuedPerTenant => limits.queued_requests_per_tenant,
        TenantLimit::QueuedPerUser => limits.queued_requests_per_user,
        TenantLimit::WatchesPerTenant => limits.watches_per_tenant,
        TenantLimit::WatchesPerUser => limits.watches_per_user,
        TenantLimit::StoredBytesPerTenant => limits.stored_bytes_per_tenant,
    })
}

/// Shows how near the limits are.
#[derive(Debug)]
struct LimitUse(LimitsByTenant);

impl Collector for LimitUse {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let help = "Largest part of a limit that a tenant or user had used when it last asked for more, within 30 to \
                    60 s, by the option that sets the limit: 1 means that it was reached.";
        let name = "streamer_tenant_limit_use_ratio";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for limit in TenantLimit::ALL {
            let highest = ConstGauge::new(self.0.highest_use(limit));
            highest.encode(family.encode_family(&[("limit", limit.option())])?)?;
        }
        Ok(())
    }
}

/// Registers the metric.
pub(crate) fn register(limits: &LimitsByTenant, metrics: &Metrics) {
    metrics.collect(LimitUse(limits.clone()));
}

/// Lets what was used long ago be forgotten, until `shutdown`.
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
