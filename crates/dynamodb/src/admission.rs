//! How many calls a process makes at once. More would not be answered faster: they would queue in
//! DynamoDB until they time out there and are repeated, which makes the queue longer.

use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use streamer_store::StoreError;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

/// How long a call waits for its turn before it is refused.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Lets calls through in the order in which they come.
pub(crate) struct Admission {
    permits: Semaphore,
    waiting: Gauge,
}

/// One call that waits.
struct Waiting<'a>(&'a Gauge);

impl<'a> Waiting<'a> {
    fn new(gauge: &'a Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Admission {
    /// For so many calls at once; `waiting` counts those that wait.
    pub(crate) fn new(concurrent: usize, waiting: Gauge) -> Self {
        Self { permits: Semaphore::new(concurrent), waiting }
    }

    /// Returns once a call may be made; it counts until the permit is dropped.
    pub(crate) async fn admit(&self) -> Result<SemaphorePermit<'_>, StoreError> {
        if let Ok(permit) = self.permits.try_acquire() {
            return Ok(permit);
        }
        let _waiting = Waiting::new(&self.waiting);
        match timeout(MAX_WAIT, self.permits.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => Err(StoreError::Overloaded {
                doing: "waiting for earlier calls",
                reason: format!("none of them ended within {} s", MAX_WAIT.as_secs()),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn calls_beyond_the_limit_wait_and_are_refused_after_a_time() {
        let waiting = Gauge::default();
        let admission = Admission::new(2, waiting.clone());
        let first = admission.admit().await.unwrap();
        let _second = admission.admit().await.unwrap();
        let (third, ()) = tokio::join!(admission.admit(), async {
            assert_eq!(waiting.get(), 1);
            drop(first);
        });
        assert_eq!(waiting.get(), 0);
        let _third = third.unwrap();
        let fourth = admission.admit().await;
        assert!(matches!(fourth, Err(StoreError::Overloaded { .. })), "{fourth:?}");
        assert_eq!(waiting.get(), 0);
    }
}
