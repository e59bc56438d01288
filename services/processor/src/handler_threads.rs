//! Threads for the handlers of this process. One that computes without a pause takes processor time from
//! others, but never the threads that serve calls, renew leases and deliver events.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};

/// As many threads as there are processors. They end when this is dropped, each once its handler yields.
pub struct HandlerThreads {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl HandlerThreads {
    /// Starts them.
    ///
    /// # Errors
    /// When the system cannot create them.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().thread_name("handler").enable_all().build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Where to spawn handlers.
    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for HandlerThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropping it would block, which asynchronous code must not.
            runtime.shutdown_background();
        }
    }
}
