//! Notifies processors of queued requests, in addition to hints and polling.

use std::sync::Arc;

use async_trait::async_trait;
use streamer_core::{Clock, Timestamp, Uid};
use tokio_util::sync::CancellationToken;

/// Queued request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedRequest {
    /// UID of the request.
    pub uid: Uid,
    /// Name of the action.
    pub action: String,
    /// Tenant of the owner.
    pub tenant: String,
    /// User name of the owner.
    pub user: String,
    /// Time at which the request becomes due; `None` if it has no delay.
    pub not_before: Option<Timestamp>,
}

/// Callback that receives each queued request.
pub type QueueCallback = Arc<dyn Fn(QueuedRequest) + Send + Sync>;

/// Notifies processors of queued requests. A notification is a hint: it may be lost, delayed or repeated.
#[async_trait]
pub trait QueueNotifier: Send + Sync + 'static {
    /// Calls `notify` for the share of queued requests of the processor named `name`, until `shutdown` is cancelled.
    async fn follow(
        self: Arc<Self>,
        name: String,
        clock: Arc<dyn Clock>,
        notify: QueueCallback,
        shutdown: CancellationToken,
    );
}
