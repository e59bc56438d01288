//! Bounds changes that run to their end after their callers have gone away.

use std::sync::Arc;

use streamer_rpc::run_to_completion;
use tokio::sync::Semaphore;
use tonic::Status;

/// Permits of all changes that are under way: one for each change, and one for each KiB that it stores.
/// While the store is slow, clients that submit and disconnect must not fill the memory.
const PERMITS: u32 = 64 * 1024;

/// Runs changes, as many at the same time as there are permits for.
pub(crate) struct ChangeLimiter(Arc<Semaphore>);

impl Default for ChangeLimiter {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(PERMITS as usize)))
    }
}

impl ChangeLimiter {
    /// Waits for permits, then runs a change that stores so many bytes to its end. A caller that goes away
    /// while it waits takes the change with it.
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
    async fn a_change_waits_for_permits_and_its_caller_may_leave_meanwhile() {
        let limiter = ChangeLimiter::default();
        let everything = usize::MAX;
        let mut first = Box::pin(limiter.run(everything, std::future::pending::<Result<(), _>>()));
        assert!(poll!(&mut first).is_pending());
        let mut second = Box::pin(limiter.run(0, async { Ok(2) }));
        assert!(poll!(&mut second).is_pending());
        drop(second);
        // The first one keeps its permits although its caller has left.
        drop(first);
        tokio::task::yield_now().await;
        assert_eq!(limiter.0.available_permits(), 0);
    }

    #[tokio::test]
    async fn permits_come_back() {
        let limiter = ChangeLimiter::default();
        for _ in 0..3 {
            assert_eq!(limiter.run(usize::MAX, async { Ok(1) }).await.unwrap(), 1);
        }
        assert_eq!(limiter.0.available_permits(), PERMITS as usize);
    }
}
