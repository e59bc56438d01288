//! Threads for what takes long: their number is bounded, and a tenant uses one at a time.

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

/// Stack of a thread, in bytes. Only what is used takes memory.
const STACK_BYTES: usize = 64 << 20;
/// Jobs of one tenant that wait at most.
const MAX_WAITING: usize = 64;
/// Longest wait for a thread.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// A caller with too many jobs should wait for this long.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

/// Why a job was not run.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Busy {
    /// The tenant has too many jobs, or one that took too long.
    #[error("too many schemas or large payloads of this tenant are being checked; try again later")]
    Tenant,
    /// Jobs of others took all threads for too long.
    #[error("too many schemas or large payloads are being checked; try again later")]
    All,
    /// No thread could be started, or it broke down.
    #[error("a check of a schema or a payload broke down")]
    Broken,
}

impl From<&Busy> for RequestError {
    fn from(busy: &Busy) -> Self {
        let message = busy.to_string();
        match busy {
            Busy::Tenant => Self::limited("validations of a tenant", &message, Some(BUSY_PAUSE)),
            Busy::All => Self::new(ErrorCode::Unavailable, message),
            Busy::Broken => Self::new(ErrorCode::InternalError, message),
        }
    }
}

/// Threads that run jobs of tenants, taking turns.
///
/// A job first waits for the earlier ones of its tenant, and then for a thread. So at most one job of
/// a tenant waits for a thread, and threads go to tenants in turn.
pub struct Pool {
    threads: Arc<Semaphore>,
    tenants: Mutex<Tenants>,
}

/// Tenants with jobs; those that have none any longer are removed from time to time.
#[derive(Default)]
struct Tenants {
    turns: HashMap<String, Weak<Turns>>,
    /// Those without jobs are removed when there are this many.
    clean_at: usize,
}

/// Turns of one tenant.
struct Turns {
    /// One permit: a job of the tenant is next, or running.
    turn: Semaphore,
    /// Jobs that are waiting or running.
    jobs: Semaphore,
}

impl Default for Pool {
    /// As many threads as there are processors.
    fn default() -> Self {
        Self::new(thread::available_parallelism().map_or(1, usize::from))
    }
}

impl Pool {
    /// Runs at most this many jobs at once.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads.max(1))), tenants: Mutex::default() }
    }

    /// Runs a job of a tenant.
    ///
    /// A job that has begun runs to its end even if the caller goes away.
    ///
    /// # Errors
    ///
    /// The tenant has too many jobs, or waited 10 s; or the job panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        tenant: &str,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        let turns = self.tenants.lock().turns_of(tenant);
        let end = Instant::now() + MAX_WAIT;
        let permits = self.permits(turns, end).await?;
        on_own_thread(move || {
            let outcome = job();
            drop(permits);
            outcome
        })
        .await
    }

    async fn permits(&self, turns: Arc<Turns>, end: Instant) -> Result<Permits, Busy> {
        let place = turns.jobs.try_acquire().map_err(|_| Busy::Tenant)?;
        let turn = timeout_at(end, turns.turn.acquire()).await.map_err(|_| Busy::Tenant)?;
        let thread = timeout_at(end, self.threads.clone().acquire_owned()).await;
        // These are never closed.
        let thread = thread.map_err(|_| Busy::All)?.map_err(|_| Busy::Broken)?;
        let turn = turn.map_err(|_| Busy::Broken)?;
        place.forget();
        turn.forget();
        Ok(Permits { turns, _thread: thread })
    }
}

impl Tenants {
    fn turns_of(&mut self, tenant: &str) -> Arc<Turns> {
        if let Some(turns) = self.turns.get(tenant).and_then(Weak::upgrade) {
            return turns;
        }
        if self.turns.len() >= self.clean_at {
            self.turns.retain(|_, turns| turns.strong_count() > 0);
            self.clean_at = 2 * self.turns.len() + 64;
        }
        let (turn, jobs) = (Semaphore::new(1), Semaphore::new(MAX_WAITING));
        let turns = Arc::new(Turns { turn, jobs });
        self.turns.insert(tenant.to_owned(), Arc::downgrade(&turns));
        turns
    }
}

/// What a running job holds.
struct Permits {
    turns: Arc<Turns>,
    _thread: OwnedSemaphorePermit,
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.turns.jobs.add_permits(1);
        self.turns.turn.add_permits(1);
    }
}

/// Runs a job on a thread of its own, with a stack for the deepest schemas and payloads. The caller
/// bounds how many run at once.
///
/// # Errors
///
/// No thread could be started, or the job panicked.
async fn on_own_thread<T: Send + 'static>(
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Busy> {
    let (sender, receiver) = oneshot::channel();
    let run = move || {
        // The caller may have gone away.
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
    async fn a_tenant_uses_one_thread_and_others_get_theirs() {
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
    async fn too_many_jobs_of_a_tenant_are_refused_and_others_are_not() {
        let pool = Pool::new(2);
        let (release, blocked) = mpsc::channel::<()>();
        let mut first = Box::pin(pool.run("a", move || blocked.recv().unwrap_or_default()));
        assert!(poll!(&mut first).is_pending());
        let mut waiting: Vec<_> =
            (1..MAX_WAITING).map(|_| Box::pin(pool.run("a", || ()))).collect();
        for job in &mut waiting {
            assert!(poll!(job).is_pending());
        }
        assert_eq!(pool.run("a", || ()).await, Err(Busy::Tenant));
        assert_eq!(pool.run("b", || ()).await, Ok(()));
        // Those that leave make room.
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
    async fn a_wait_for_a_thread_is_bounded() {
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
    async fn a_job_that_panics_gives_back_its_permits() {
        let pool = Pool::new(1);
        assert_eq!(pool.run("a", || panic!("as it must")).await, Err::<(), _>(Busy::Broken));
        assert_eq!(pool.run("a", || 1).await, Ok(1));
        assert_eq!(pool.tenants.lock().turns_of("a").jobs.available_permits(), MAX_WAITING);
    }

    #[tokio::test]
    async fn tenants_without_jobs_are_forgotten() {
        let pool = Pool::new(1);
        for tenant in 0..1000 {
            assert_eq!(pool.run(&tenant.to_string(), || ()).await, Ok(()));
        }
        assert!(pool.tenants.lock().turns.len() <= 65);
    }
}
