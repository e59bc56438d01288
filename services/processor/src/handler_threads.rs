//! Threads for the handlers of this process. A handler that computes without yielding slows down
//! other handlers, but not the threads that serve calls, renew leases and deliver events.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

/// As many threads as the machine has processors. They end when this is dropped, each once its
/// handler yields.
pub struct HandlerThreads {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl HandlerThreads {
    /// Starts the threads.
    ///
    /// # Errors
    /// Fails if the system cannot create them.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().thread_name("handler").enable_all().build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Returns the runtime to spawn handlers on.
    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
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
