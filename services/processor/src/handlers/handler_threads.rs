//! Threads for the handlers that run in this process. A handler that computes without yielding slows down other
//! handlers, but not the threads that serve calls, renew leases and deliver events.

use std::{io, num::NonZero, sync::Arc, thread};

use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::JoinHandle,
};

use crate::handlers::handler_turns::HandlerTurns;

/// Niceness of the threads in addition to that of the process: under contention, a thread gets a third of the
/// processor time of a thread of the server.
#[cfg(target_os = "linux")]
const ADDED_NICENESS: i32 = 5;
#[cfg(target_os = "linux")]
const MAX_NICENESS: i32 = 19;

/// Number of handler threads per CPU. One tenant uses at most one thread per CPU; the others remain available to other
/// tenants.
const THREADS_PER_PROCESSOR: usize = 2;

/// Threads that run handlers. After this is dropped, each thread ends once its current handler yields.
pub struct HandlerThreads {
    spawner: HandlerSpawner,
    runtime: Option<Runtime>,
}

/// Spawns handlers on the handler threads.
#[derive(Clone)]
pub(crate) struct HandlerSpawner {
    handle: Handle,
    turns: Arc<HandlerTurns>,
}

impl HandlerSpawner {
    /// Creates a spawner for a runtime with `threads` threads, of which each tenant uses at most `max_of_tenant`.
    pub(crate) fn new(handle: Handle, threads: usize, max_of_tenant: usize) -> Self {
        Self { handle, turns: HandlerTurns::new(threads, max_of_tenant) }
    }

    /// Spawns a handler for an attempt of the given tenant.
    pub(crate) fn spawn<F>(&self, tenant: Arc<str>, handler: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        self.handle.spawn(self.turns.run(tenant, handler))
    }
}

impl HandlerThreads {
    /// Starts the threads.
    ///
    /// # Errors
    /// Fails if the operating system cannot create the threads.
    pub fn start() -> io::Result<Self> {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let threads = THREADS_PER_PROCESSOR * processors;
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("handler")
            .on_thread_start(lower_priority)
            .enable_all()
            .build()?;
        let spawner = HandlerSpawner::new(runtime.handle().clone(), threads, processors);
        Ok(Self { spawner, runtime: Some(runtime) })
    }

    /// Returns a spawner for the handler threads.
    pub(crate) fn spawner(&self) -> HandlerSpawner {
        self.spawner.clone()
    }
}

/// Lowers the priority of the calling thread. On systems other than Linux the call would affect the whole process.
#[cfg(target_os = "linux")]
fn lower_priority() {
    use rustix::process::{getpriority_process, setpriority_process};
    let lowered = getpriority_process(None).and_then(|niceness| {
        setpriority_process(None, (niceness + ADDED_NICENESS).min(MAX_NICENESS))
    });
    if let Err(error) = lowered {
        tracing::warn!(%error, "failed to lower the priority of a handler thread");
    }
}

#[cfg(not(target_os = "linux"))]
fn lower_priority() {}

impl Drop for HandlerThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropping the runtime would block, which is not allowed in async code.
            runtime.shutdown_background();
        }
    }
}
