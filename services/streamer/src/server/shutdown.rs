//! Steps of the shutdown.

use tokio_util::sync::CancellationToken;

/// Steps of the shutdown, in order.
#[derive(Clone, Default)]
pub(crate) struct Shutdown {
    /// Cancelled to stop accepting connections; pending calls may complete.
    pub(crate) accepting: CancellationToken,
    /// Cancelled to stop accepting work; running attempts may complete.
    pub(crate) working: CancellationToken,
    /// Cancelled to end all remaining calls and tasks.
    pub(crate) serving: CancellationToken,
    /// Cancelled after the last task that calls other services has ended.
    pub(crate) ended: CancellationToken,
}
