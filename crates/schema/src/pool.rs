//! Threads for long jobs. The number of threads is limited, and a tenant uses one at a time.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{ErrorCode, RequestError};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout_at},
};

/// Stack size of a thread, in bytes. Only the used part occupies memory.
const STACK_BYTES: usize = 64 << 20;
/// Maximum number of waiting and running jobs of a tenant.
const MAX_JOBS: usize = 64;
/// Maximum time that a job waits for a thread.
const THREAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Retry delay for a tenant with too many jobs.
const BUSY_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Reason why a job has no result.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Busy {
    /// The tenant has too many jobs, or its earlier jobs took too long.
    #[error("too many schemas or large payloads of this tenant are being checked; try again later")]
    Tenant,
    /// Jobs of other tenants occupied all threads for too long.
    #[error("too many schemas or large payloads are being checked; try again later")]
    All,
    /// The thread could not be started, or the job panicked.
    #[error("failed to check a schema or a payload")]
    Broken,
}

impl From<&Busy> for RequestError {
    fn from(busy: &Busy) -> Self {
        let message = busy.to_string();
        match busy {
            Busy::Tenant => {
                Self::limited("validations of a tenant", &message, Some(BUSY_RETRY_DELAY))
            }
            Busy::All => Self::new(ErrorCode::Unavailable, message),
            Busy::Broken => Self::new(ErrorCode::InternalError, message),
        }
    }
}

/// Thread pool that is shared fairly between tenants.
///
/// A job first waits for the earlier jobs of its tenant, and then for a thread. At most one job of each
/// tenant waits for a thread, so that tenants get threads in turn.
pub struct Pool {
    threads: Arc<Semaphore>,
    tenants: Mutex<Tenants>,
}

/// Tenants with jobs. Tenants without jobs are removed periodically.
#[derive(Default)]
struct Tenants {
    queues: HashMap<String, Weak<TenantQueue>>,
    /// Number of tenants at which tenants without jobs are removed.
    clean_at: usize,
}

/// Permits of one tenant.
struct TenantQueue {
    /// Semaphore with one permit, for the job that waits for a thread or runs.
    active: Semaphore,
    /// Semaphore with [`MAX_JOBS`] permits, for waiting and running jobs.
    jobs: Semaphore,
}

impl Default for Pool {
    /// Creates a pool with one thread for each processor.
    fn default() -> Self {
        Self::new(thread::available_parallelism().map_or(1, usize::from))
    }
}

impl Pool {
    /// Creates a pool that runs at most `threads` jobs concurrently.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads.max(1))), tenants: Mutex::default() }
    }

    /// Runs a job of a tenant.
    ///
    /// A started job runs to completion even if the caller is dropped.
    ///
    /// # Errors
    ///
    /// Returns an error if the tenant has too many jobs, the wait for a thread exceeds 10 s, no thread can be
    /// started, or the job panics.
    pub async fn run<T: Send + 'static>(
        &self,
        tenant: &str,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        let queue = self.tenants.lock().queue_of(tenant);
        let deadline = Instant::now() + THREAD_TIMEOUT;
        let permits = self.acquire(queue, deadline).await?;
        run_on_new_thread(move || {
            let outcome = job();
            drop(permits);
            outcome
        })
        .await
    }

    async fn acquire(&self, queue: Arc<TenantQueue>, deadline: Instant) -> Result<Permits, Busy> {
        let job = queue.jobs.try_acquire().map_err(|_| Busy::Tenant)?;
        let active = timeout_at(deadline, queue.active.acquire()).await;
        let active = active.map_err(|_| Busy::Tenant)?;
        let thread = timeout_at(deadline, self.threads.clone().acquire_owned()).await;
        // The semaphores are never closed.
        let thread = thread.map_err(|_| Busy::All)?.map_err(|_| Busy::Broken)?;
        let active = active.map_err(|_| Busy::Broken)?;
        job.forget();
        active.forget();
        Ok(Permits { queue, _thread: thread })
    }
}

impl Tenants {
    fn queue_of(&mut self, tenant: &str) -> Arc<TenantQueue> {
        if let Some(queue) = self.queues.get(tenant).and_then(Weak::upgrade) {
            return queue;
        }
        if self.queues.len() >= self.clean_at {
            self.queues.retain(|_, queue| queue.strong_count() > 0);
            self.clean_at = 2 * self.queues.len() + 64;
        }
        let (active, jobs) = (Semaphore::new(1), Semaphore::new(MAX_JOBS));
        let queue = Arc::new(TenantQueue { active, jobs });
        self.queues.insert(tenant.to_owned(), Arc::downgrade(&queue));
        queue
    }
}

/// Permits of a running job.
struct Permits {
    queue: Arc<TenantQueue>,
    _thread: OwnedSemaphorePermit,
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.queue.jobs.add_permits(1);
        self.queue.active.add_permits(1);
    }
}

/// Runs a job on a new thread, with a stack for the deepest schemas and payloads. The caller limits the number of
/// threads.
///
/// # Errors
///
/// Returns an error if no thread can be started, or the job panics.
async fn run_on_new_thread<T: Send + 'static>(
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Busy> {
    let (sender, receiver) = oneshot::channel();
    let run = move || {
        // This fails if the caller was dropped.
        let _ = sender.send(job());
    };
    let thread = thread::Builder::new().name("schema".into()).stack_size(STACK_BYTES);
    thread.spawn(run).map_err(|_| Busy::Broken)?;
    receiver.await.map_err(|_| Busy::Broken)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn a_tenant_uses_one_thread_while_other_tenants_use_the_rest() {
        let pool = Pool::new(2);
        let (release, blocked) = mpsc::channel::<()>();
        let mut first = Box::pin(pool.run("a", move || blocked.recv().unwrap_or_default()));
        assert!(poll!(&mut first).is_pending());
        let mut second = Box::pin(pool.run("a", || 2));
        assert!(poll!(&mut second).is_pending());
        assert_eq!(pool.run("b", || 3).await, Ok(3));
        assert!(poll!(&mut second).is_pending());
        drop(release);
        assert_eq!(first.await, Ok(()));
        assert_eq!(second.await, Ok(2));
    }

    #[tokio::test]
    async fn excess_jobs_of_one_tenant_are_rejected_and_other_tenants_are_unaffected() {
        let pool = Pool::new(2);
        let (release, blocked) = mpsc::channel::<()>();
        let mut first = Box::pin(pool.run("a", move || blocked.recv().unwrap_or_default()));
        assert!(poll!(&mut first).is_pending());
        let mut waiting: Vec<_> = (1..MAX_JOBS).map(|_| Box::pin(pool.run("a", || ()))).collect();
        for job in &mut waiting {
            assert!(poll!(job).is_pending());
        }
        assert_eq!(pool.run("a", || ()).await, Err(Busy::Tenant));
        assert_eq!(pool.run("b", || ()).await, Ok(()));
        // A dropped job returns its permit.
        waiting.pop();
        let mut late = Box::pin(pool.run("a", || ()));
        assert!(poll!(&mut late).is_pending());
        drop(release);
        assert_eq!(first.await, Ok(()));
        for job in waiting {
            assert_eq!(job.await, Ok(()));
        }
        assert_eq!(late.await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_for_a_thread_times_out() {
        let pool = Pool::new(1);
        let (release, blocked) = mpsc::channel::<()>();
        let mut first = Box::pin(pool.run("a", move || blocked.recv().unwrap_or_default()));
        assert!(poll!(&mut first).is_pending());
        assert_eq!(pool.run("a", || ()).await, Err(Busy::Tenant));
        assert_eq!(pool.run("b", || ()).await, Err(Busy::All));
        drop(release);
        assert_eq!(first.await, Ok(()));
    }

    #[tokio::test]
    async fn a_panicking_job_returns_its_permits() {
        let pool = Pool::new(1);
        assert_eq!(
            pool.run("a", || panic!("expected by the test")).await,
            Err::<(), _>(Busy::Broken)
        );
        assert_eq!(pool.run("a", || 1).await, Ok(1));
        assert_eq!(pool.tenants.lock().queue_of("a").jobs.available_permits(), MAX_JOBS);
    }

    #[tokio::test]
    async fn tenants_without_jobs_are_removed() {
        let pool = Pool::new(1);
        for tenant in 0..1000 {
            assert_eq!(pool.run(&tenant.to_string(), || ()).await, Ok(()));
        }
        assert!(pool.tenants.lock().queues.len() <= 65);
    }
}
