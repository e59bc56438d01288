//! Quotas of tenants and users in the store.

use std::time::Duration;

use streamer_core::{LimitsByTenant, RequestError, TenantLimit};
use streamer_rpc::status;
use streamer_store::{Quota, QuotaUsage};
use tonic::Status;

/// Retry delay returned to a caller whose queue is full.
const QUEUE_FULL_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Returns the quota of a tenant and its users.
pub(crate) fn for_tenant(limits: &LimitsByTenant, tenant: &str) -> Quota {
    let limits = limits.of(tenant);
    Quota {
        queued_of_tenant: limits.get(TenantLimit::QueuedPerTenant),
        queued_of_user: limits.get(TenantLimit::QueuedPerUser),
        stored_bytes_of_tenant: limits.get(TenantLimit::StoredBytesPerTenant),
    }
}

/// Records the usage of a quota.
pub(crate) fn record_usage(limits: &LimitsByTenant, quota: &Quota, used: QuotaUsage) {
    let QuotaUsage { queued_of_tenant, queued_of_user, stored_bytes_of_tenant } = used;
    limits.record_usage(TenantLimit::QueuedPerTenant, queued_of_tenant, quota.queued_of_tenant);
    limits.record_usage(TenantLimit::QueuedPerUser, queued_of_user, quota.queued_of_user);
    let of = quota.stored_bytes_of_tenant;
    limits.record_usage(TenantLimit::StoredBytesPerTenant, stored_bytes_of_tenant, of);
}

/// Returns the status for a request that exceeds the quota.
pub(crate) fn exceeded(limit: TenantLimit, quota: &Quota) -> Status {
    let error = match limit {
        TenantLimit::StoredBytesPerTenant => {
            let allowed = quota.stored_bytes_of_tenant;
            let message = format!(
                "requests and logs of the tenant would exceed {allowed} bytes; delete ended requests"
            );
            RequestError {
                retryable: false,
                ..RequestError::limited(limit.option(), &message, None)
            }
        }
        _ => {
            let (allowed, scope) = match limit {
                TenantLimit::QueuedPerUser => (quota.queued_of_user, "user"),
                _ => (quota.queued_of_tenant, "tenant"),
            };
            let message = format!("more than {allowed} queued requests of one {scope}");
            RequestError::limited(limit.option(), &message, Some(QUEUE_FULL_RETRY_DELAY))
        }
    };
    status(&error)
}
