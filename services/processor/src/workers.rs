//! Workers: their stream, their sessions and slots, and the attempts that run in them.

pub(crate) mod grants;
pub(crate) mod hello;
pub(crate) mod remote_handler;
pub(crate) mod remote_task;
pub(crate) mod report_buffer;
pub(crate) mod schema_checks;
pub(crate) mod session_secret;
pub(crate) mod worker_pool;
pub(crate) mod worker_service;
pub(crate) mod worker_session;
