//! How much of what tenants and users have in the store their limits allow.

use std::time::Duration;

use streamer_core::{LimitsByTenant, RequestError, TenantLimit};
use streamer_rpc::status;
use streamer_store::{Quota, QuotaUse};
use tonic::Status;

/// How long a caller should wait when its queue is full.
const QUEUE_PAUSE: Duration = Duration::from_secs(1);

/// What the tenant and its users may have.
pub(crate) fn of(limits: &LimitsByTenant, tenant: &str) -> Quota {
    let limits = limits.of(tenant);
    Quota {
        queued_of_tenant: limits.get(TenantLimit::QueuedPerTenant),
        queued_of_user: limits.get(TenantLimit::QueuedPerUser),
        stored_bytes_of_tenant: limits.get(TenantLimit::StoredBytesPerTenant),
    }
}

/// Notes how much of it is used.
pub(crate) fn note_use(limits: &LimitsByTenant, quota: &Quota, used: QuotaUse) {
    let QuotaUse { queued_of_tenant, queued_of_user, stored_bytes_of_tenant } = used;
    limits.note_use(TenantLimit::QueuedPerTenant, queued_of_tenant, quota.queued_of_tenant);
    limits.note_use(TenantLimit::QueuedPerUser, queued_of_user, quota.queued_of_user);
    let of = quota.stored_bytes_of_tenant;
    limits.note_use(TenantLimit::StoredBytesPerTenant, stored_bytes_of_tenant, of);
}

/// Refuses a request beyond the quota.
pub(crate) fn refusal(limit: TenantLimit, quota: &Quota) -> Status {
    let error = match limit {
        TenantLimit::StoredBytesPerTenant => {
            let allowed = quota.stored_bytes_of_tenant;
            let message = format!(
                "requests and logs of the tenant would take more than {allowed} bytes; delete some that have ended"
            );
            RequestError {
                retryable: false,
                ..RequestError::limited(limit.option(), &message, None)
            }
        }
        _ => {
            let (allowed, whose) = match limit {
                TenantLimit::QueuedPerUser => (quota.queued_of_user, "user"),
                _ => (quota.queued_of_tenant, "tenant"),
            };
            let message = format!("more than {allowed} queued requests of one {whose}");
            RequestError::limited(limit.option(), &message, Some(QUEUE_PAUSE))
        }
    };
    status(&error)
}
