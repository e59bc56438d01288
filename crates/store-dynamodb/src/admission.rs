//! Limits the number of concurrent operations of a process. Additional operations would not finish earlier: they would
//! wait in DynamoDB until they time out and are retried, which makes the queue longer.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use streamer_store::StoreError;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

/// Maximum time that an operation waits for a permit before it is rejected.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Maximum number of waiting operations per permit; further operations are rejected immediately.
const MAX_WAITING_PER_PERMIT: usize = 64;

/// Purpose of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Operation on behalf of a caller. All of these operations together leave permits for execution.
    Caller,
    /// Operation that execution needs.
    Execution,
}

/// Admits operations in the order of their arrival.
pub(crate) struct Admission {
    all: Semaphore,
    callers: Semaphore,
    waiting: AtomicUsize,
    max_waiting: usize,
    gauge: Gauge,
}

/// Permit of an operation, released when dropped.
pub(crate) struct OperationPermit<'a> {
    _caller: Option<SemaphorePermit<'a>>,
    _permit: SemaphorePermit<'a>,
}

/// Counts an operation as waiting until dropped.
struct WaitingGuard<'a>(&'a Admission);

impl Drop for WaitingGuard<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.gauge.dec();
    }
}

impl Admission {
    /// Creates an admission with `concurrent` permits, of which callers can use half. `gauge` counts the waiting
    /// operations.
    pub(crate) fn new(concurrent: usize, gauge: Gauge) -> Self {
        Self {
            all: Semaphore::new(concurrent),
            callers: Semaphore::new(concurrent.div_ceil(2)),
            waiting: AtomicUsize::new(0),
            max_waiting: concurrent.saturating_mul(MAX_WAITING_PER_PERMIT),
            gauge,
        }
    }

    /// Waits for a permit.
    pub(crate) async fn admit(&self, purpose: Purpose) -> Result<OperationPermit<'_>, StoreError> {
        if let Some(permit) = self.try_admit(purpose) {
            return Ok(permit);
        }
        let _waiting = self.wait()?;
        let admitted = async {
            let caller = match purpose {
                Purpose::Caller => Some(self.callers.acquire().await.ok()?),
                Purpose::Execution => None,
            };
            Some(OperationPermit { _caller: caller, _permit: self.all.acquire().await.ok()? })
        };
        match timeout(MAX_WAIT, admitted).await {
            Ok(Some(permit)) => Ok(permit),
            // The semaphores are never closed.
            Ok(None) | Err(_) => {
                Err(overloaded(format!("no permit was available within {} s", MAX_WAIT.as_secs())))
            }
        }
    }

    fn try_admit(&self, purpose: Purpose) -> Option<OperationPermit<'_>> {
        let caller = match purpose {
            Purpose::Caller => Some(self.callers.try_acquire().ok()?),
            Purpose::Execution => None,
        };
        Some(OperationPermit { _caller: caller, _permit: self.all.try_acquire().ok()? })
    }

    fn wait(&self) -> Result<WaitingGuard<'_>, StoreError> {
        self.gauge.inc();
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting = WaitingGuard(self);
        if before >= self.max_waiting {
            return Err(overloaded(format!("{before} operations are already waiting")));
        }
        Ok(waiting)
    }
}

fn overloaded(reason: String) -> StoreError {
    StoreError::Overloaded { doing: "waiting for a permit", reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn operations_beyond_the_limit_wait_and_are_rejected_after_a_timeout() {
        let waiting = Gauge::default();
        let admission = Admission::new(2, waiting.clone());
        let first = admission.admit(Purpose::Execution).await.unwrap();
        let _second = admission.admit(Purpose::Execution).await.unwrap();
        let (third, ()) = tokio::join!(admission.admit(Purpose::Caller), async {
            assert_eq!(waiting.get(), 1);
            drop(first);
        });
        assert_eq!(waiting.get(), 0);
        let _third = third.ok().unwrap();
        let fourth = admission.admit(Purpose::Execution).await.err();
        assert!(matches!(fourth, Some(StoreError::Overloaded { .. })), "{fourth:?}");
        assert_eq!(waiting.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_leave_room_for_execution() {
        let admission = Admission::new(4, Gauge::default());
        let mut callers = Vec::new();
        for _ in 0..2 {
            callers.push(admission.admit(Purpose::Caller).await.unwrap());
        }
        assert!(admission.admit(Purpose::Caller).await.is_err());
        for _ in 0..2 {
            callers.push(admission.try_admit(Purpose::Execution).unwrap());
        }
        assert!(admission.try_admit(Purpose::Execution).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn operations_beyond_the_waiting_limit_are_rejected_at_once() {
        let admission = Admission::new(1, Gauge::default());
        let _running = admission.admit(Purpose::Execution).await.unwrap();
        let waiting: Vec<_> =
            (0..MAX_WAITING_PER_PERMIT).map(|_| admission.wait().unwrap()).collect();
        let rejected = admission.admit(Purpose::Execution).await.err().unwrap();
        assert!(rejected.to_string().contains("64 operations are already waiting"), "{rejected}");
        drop(waiting);
        assert_eq!(admission.gauge.get(), 0);
    }
}
