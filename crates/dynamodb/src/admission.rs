//! How many operations a process has under way at once. More would not be answered faster: they would
//! queue in DynamoDB until they time out there and are repeated, which makes the queue longer.

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

/// How long an operation waits for its turn before it is refused.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// For each operation that may be under way, this many may wait; more are refused at once.
const WAITING_FOR_EACH: usize = 64;

/// For whom an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A caller asked for it. All of these together leave room for the others.
    Caller,
    /// Execution needs it.
    Execution,
}

/// Lets operations through in the order in which they come.
pub(crate) struct Admission {
    all: Semaphore,
    callers: Semaphore,
    waiting: AtomicUsize,
    max_waiting: usize,
    gauge: Gauge,
}

/// An operation that is under way, until it is dropped.
pub(crate) struct Turn<'a> {
    _caller: Option<SemaphorePermit<'a>>,
    _permit: SemaphorePermit<'a>,
}

/// An operation that waits.
struct Waiting<'a>(&'a Admission);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.gauge.dec();
    }
}

impl Admission {
    /// Allows this many operations at once, half of them for callers; `gauge` counts those that wait.
    pub(crate) fn new(concurrent: usize, gauge: Gauge) -> Self {
        Self {
            all: Semaphore::new(concurrent),
            callers: Semaphore::new(concurrent.div_ceil(2)),
            waiting: AtomicUsize::new(0),
            max_waiting: concurrent.saturating_mul(WAITING_FOR_EACH),
            gauge,
        }
    }

    /// Returns once the operation may begin.
    pub(crate) async fn admit(&self, purpose: Purpose) -> Result<Turn<'_>, StoreError> {
        if let Some(turn) = self.try_admit(purpose) {
            return Ok(turn);
        }
        let _waiting = self.wait()?;
        let admitted = async {
            let caller = match purpose {
                Purpose::Caller => Some(self.callers.acquire().await.ok()?),
                Purpose::Execution => None,
            };
            Some(Turn { _caller: caller, _permit: self.all.acquire().await.ok()? })
        };
        match timeout(MAX_WAIT, admitted).await {
            Ok(Some(turn)) => Ok(turn),
            // The semaphores are never closed.
            Ok(None) | Err(_) => {
                Err(overloaded(format!("it was not its turn within {} s", MAX_WAIT.as_secs())))
            }
        }
    }

    fn try_admit(&self, purpose: Purpose) -> Option<Turn<'_>> {
        let caller = match purpose {
            Purpose::Caller => Some(self.callers.try_acquire().ok()?),
            Purpose::Execution => None,
        };
        Some(Turn { _caller: caller, _permit: self.all.try_acquire().ok()? })
    }

    fn wait(&self) -> Result<Waiting<'_>, StoreError> {
        self.gauge.inc();
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting = Waiting(self);
        if before >= self.max_waiting {
            return Err(overloaded(format!("{before} operations wait already")));
        }
        Ok(waiting)
    }
}

fn overloaded(reason: String) -> StoreError {
    StoreError::Overloaded { doing: "waiting for earlier operations", reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn operations_beyond_the_limit_wait_and_are_refused_after_a_time() {
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
    async fn what_would_wait_behind_very_many_is_refused_at_once() {
        let admission = Admission::new(1, Gauge::default());
        let _running = admission.admit(Purpose::Execution).await.unwrap();
        let waiting: Vec<_> = (0..WAITING_FOR_EACH).map(|_| admission.wait().unwrap()).collect();
        let refused = admission.admit(Purpose::Execution).await.err().unwrap();
        assert!(refused.to_string().contains("64 operations wait already"), "{refused}");
        drop(waiting);
        assert_eq!(admission.gauge.get(), 0);
    }
}
