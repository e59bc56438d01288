//! Threads that run the handlers of this process, the turns of tenants on them, and the history that handlers read.

pub(crate) mod handler_threads;
pub(crate) mod handler_turns;
pub(crate) mod request_history;
