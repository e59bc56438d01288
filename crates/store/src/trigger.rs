//! Who tells of requests that wait, beside hints and polls.

use std::sync::Arc;

use async_trait::async_trait;
use streamer_core::{Clock, Timestamp, Uid};
use tokio_util::sync::CancellationToken;

/// A request that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitingRequest {
    /// Its id.
    pub uid: Uid,
    /// What is asked for.
    pub action: String,
    /// By which tenant.
    pub tenant: String,
    /// It is due from then on.
    pub not_before: Timestamp,
}

/// Is called for each of them.
pub type Told = Arc<dyn Fn(WaitingRequest) + Send + Sync>;

/// Tells of requests that wait. What it tells is a hint: some may be missed, some told late or twice.
#[async_trait]
pub trait QueueTrigger: Send + Sync + 'static {
    /// Tells this processor, of that name, its share of them, until `shutdown`.
    async fn follow(
        self: Arc<Self>,
        name: String,
        clock: Arc<dyn Clock>,
        told: Told,
        shutdown: CancellationToken,
    );
}
