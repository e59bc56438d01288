//! Limits the number of changes that run to completion after their callers disconnect.

use std::sync::Arc;

use streamer_rpc::run_to_completion;
use tokio::sync::Semaphore;
use tonic::Status;

/// Total number of permits. Each change requires one permit, plus one for each KiB that it stores.
/// The limit prevents clients that submit and disconnect from exhausting memory while the store is slow.
const PERMITS: u32 = 64 * 1024;

/// Runs changes concurrently, within a fixed number of permits.
pub(crate) struct ChangeLimiter(Arc<Semaphore>);

impl Default for ChangeLimiter {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(PERMITS as usize)))
    }
}

impl ChangeLimiter {
    /// Waits for permits, then runs to completion a change that stores `bytes` bytes. If the caller disconnects
    /// while waiting for permits, the change does not run.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        change: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let change = Box::pin(change);
        let permits = u32::try_from(bytes / 1024).unwrap_or(PERMITS).saturating_add(1).min(PERMITS);
        let permits = self.0.clone().acquire_many_owned(permits).await;
        let permits = permits.map_err(|_| Status::unavailable("the router is stopping"))?;
        run_to_completion(async move {
            let _permits = permits;
            change.await
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn a_started_change_keeps_its_permits_after_its_caller_disconnects() {
        let limiter = ChangeLimiter::default();
        let all_permits = usize::MAX;
        let mut first = Box::pin(limiter.run(all_permits, std::future::pending::<Result<(), _>>()));
        assert!(poll!(&mut first).is_pending());
        let mut second = Box::pin(limiter.run(0, async { Ok(2) }));
        assert!(poll!(&mut second).is_pending());
        drop(second);
        drop(first);
        tokio::task::yield_now().await;
        assert_eq!(limiter.0.available_permits(), 0);
    }

    #[tokio::test]
    async fn permits_are_returned_after_a_change() {
        let limiter = ChangeLimiter::default();
        for _ in 0..3 {
            assert_eq!(limiter.run(usize::MAX, async { Ok(1) }).await.unwrap(), 1);
        }
        assert_eq!(limiter.0.available_permits(), PERMITS as usize);
    }
}
