//! Notification of queued requests, in addition to hints and polls.

use std::sync::Arc;

use async_trait::async_trait;
use streamer_core::{Clock, Timestamp, Uid};
use tokio_util::sync::CancellationToken;

/// A queued request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedRequest {
    /// Id of the request.
    pub uid: Uid,
    /// Name of the action.
    pub action: String,
    /// Tenant of the owner.
    pub tenant: String,
    /// When the request becomes due.
    pub not_before: Timestamp,
}

/// Callback that receives each queued request.
pub type QueueCallback = Arc<dyn Fn(QueuedRequest) + Send + Sync>;

/// Notifies processors of queued requests. A notification is a hint: it may be missing, late or
/// repeated.
#[async_trait]
pub trait QueueNotifier: Send + Sync + 'static {
    /// Passes this processor, named `name`, its share of the queued requests until `shutdown`.
    async fn follow(
        self: Arc<Self>,
        name: String,
        clock: Arc<dyn Clock>,
        notify: QueueCallback,
        shutdown: CancellationToken,
    );
}
