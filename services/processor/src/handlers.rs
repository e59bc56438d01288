//! Threads that run the handlers of this process, and the turns of tenants on them.

pub(crate) mod handler_threads;
pub(crate) mod handler_turns;
