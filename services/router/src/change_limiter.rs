//! Limits the number of changes that run to completion after their callers disconnect.

use std::sync::Arc;

use streamer_handler::MemoryBudget;
use streamer_rpc::run_to_completion;
use tonic::Status;

/// Maximum total size of changes in progress, which tenants share fairly. It prevents clients that submit and disconnect
/// from exhausting memory while the store is slow.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// Size of a change in addition to the values that it stores.
const BASE_BYTES: usize = 1024;

/// Runs changes concurrently, within a memory budget.
pub(crate) struct ChangeLimiter(Arc<MemoryBudget>);

impl Default for ChangeLimiter {
    fn default() -> Self {
        Self(MemoryBudget::new(MAX_BYTES))
    }
}

impl ChangeLimiter {
    /// Waits for capacity, then runs to completion a change of the given tenant that stores `bytes` bytes. If the caller
    /// disconnects while waiting for capacity, the change does not run.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        tenant: &str,
        bytes: usize,
        change: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> impl Future<Output = Result<T, Status>> + Send {
        // Boxed before the returned future exists, which would contain it several times.
        let change = Box::pin(change);
        async move {
            let reserved = self.0.reserve(&tenant.into(), bytes.saturating_add(BASE_BYTES)).await;
            run_to_completion(async move {
                let _reserved = reserved;
                change.await
            })
            .await
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn a_started_change_keeps_its_capacity_after_its_caller_disconnects() {
        let limiter = ChangeLimiter::default();
        let mut first =
            Box::pin(limiter.run("acme", usize::MAX, std::future::pending::<Result<(), _>>()));
        assert!(poll!(&mut first).is_pending());
        let mut second = Box::pin(limiter.run("acme", 0, async { Ok(2) }));
        assert!(poll!(&mut second).is_pending());
        drop(second);
        drop(first);
        tokio::task::yield_now().await;
        assert_eq!(limiter.0.used(), MAX_BYTES);
    }

    #[tokio::test]
    async fn capacity_is_returned_after_a_change() {
        let limiter = ChangeLimiter::default();
        for _ in 0..3 {
            assert_eq!(limiter.run("acme", usize::MAX, async { Ok(1) }).await.unwrap(), 1);
        }
        assert_eq!(limiter.0.used(), 0);
    }

    #[tokio::test]
    async fn changes_of_one_tenant_do_not_delay_those_of_another_tenant() {
        let limiter = ChangeLimiter::default();
        let large =
            || limiter.run("flooder", MAX_BYTES / 8, std::future::pending::<Result<(), _>>());
        let mut flood: Vec<_> = (0..20).map(|_| Box::pin(large())).collect();
        for change in &mut flood {
            assert!(poll!(change).is_pending());
        }
        assert_eq!(limiter.run("acme", 1_000_000, async { Ok(1) }).await.unwrap(), 1);
    }
}
