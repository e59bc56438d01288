//! Threads for the handlers of this process. A handler that computes without yielding slows down
//! other handlers, but not the threads that serve calls, renew leases and deliver events.

use std::{io, num::NonZero, sync::Arc, thread};

use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::JoinHandle,
};

use crate::handler_turns::HandlerTurns;

/// Niceness of the threads: under contention a thread gets a tenth of the processor time of a thread with niceness 0.
const NICENESS: i32 = 10;

/// Threads per processor. One tenant uses at most one thread per processor, the rest is for other tenants.
const THREADS_PER_PROCESSOR: usize = 2;

/// Threads that run handlers. When this is dropped, each thread ends once its handler yields.
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
    /// Creates a spawner for a runtime with `threads` threads, of which one tenant uses at most `max_of_tenant`.
    pub(crate) fn new(handle: Handle, threads: usize, max_of_tenant: usize) -> Self {
        Self { handle, turns: HandlerTurns::new(threads, max_of_tenant) }
    }

    /// Spawns a handler for an attempt of this tenant.
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
    /// Fails if the system cannot create them.
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

    /// Returns a spawner for these threads.
    pub(crate) fn spawner(&self) -> HandlerSpawner {
        self.spawner.clone()
    }
}

/// Lowers the priority of the calling thread below that of the threads of the server.
fn lower_priority() {
    // Linux applies it to the calling thread; POSIX specifies the process.
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%error, "cannot lower the priority of a handler thread");
    }
}

impl Drop for HandlerThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropping the runtime would block, which is not allowed in async code.
            runtime.shutdown_background();
        }
    }
}
