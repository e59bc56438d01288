//! Options of the processor.

use std::time::Duration;

use streamer_core::Limits;

/// Options of the processor, which the operator sets.
#[derive(Clone, Copy, Debug)]
pub struct ProcessorOptions {
    /// Maximum number of async attempts that run concurrently.
    pub max_concurrent_attempts: u32,
    /// Maximum percentage of the concurrent attempts, of the concurrent sync actions, and of the slots of all workers,
    /// that one tenant uses.
    pub tenant_share: u32,
    /// Waiting time after which the priority of a request counts as one higher; zero means never.
    pub priority_aging: Duration,
    /// Maximum number of sync actions that run concurrently.
    pub max_concurrent_sync: usize,
    /// Timeout of a sync action that does not declare one.
    pub sync_timeout: Duration,
    /// Duration of a lease, after which the lease expires unless it is renewed.
    pub lease: Duration,
    /// Time that a handler has to finish after cancellation was requested.
    pub cancellation_grace_period: Duration,
    /// Interval between polls of the store for requests whose hint was lost.
    pub poll_interval: Duration,
    /// Time that running attempts have to finish when the processor stops.
    pub drain_timeout: Duration,
    /// Maximum total bytes of reports and results that are not yet durable, over all attempts.
    pub max_buffered_output_bytes: usize,
    /// Size limits for payloads, results and chunks.
    pub limits: Limits,
    /// Sync threshold: actions with a shorter estimated duration are sync.
    pub sync_threshold: Duration,
    /// Whether the queue is scanned at every poll, even without a hint.
    pub queue_polling: bool,
    /// Whether other processors share the store. If so, the actions of this processor are saved, so that they remain
    /// declared while it is unavailable.
    pub shared: bool,
}
