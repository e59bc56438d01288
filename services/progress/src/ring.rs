//! All instances of the progress service, and whether this one is ready.

use streamer_cluster::{Instance, Instances};
use streamer_core::Uid;
use tokio::sync::watch;
use tonic::Status;

/// All instances of this service. Each request belongs to one instance, to which its events are published first. This
/// only reduces latency, because every instance also finds unannounced events in the store.
#[derive(Clone)]
pub struct Ring {
    /// Name of this instance among the instances.
    pub own: String,
    /// All instances, including this one.
    pub instances: Instances,
    /// Whether this instance is ready. While it is not ready, it rejects watches, and other instances serve them.
    pub serving: watch::Receiver<bool>,
}

impl Ring {
    /// Returns the instance to which a request belongs; `None` if it is this instance.
    pub(crate) fn owner(&self, uid: Uid) -> Option<Instance> {
        self.instances.owner(uid).filter(|instance| *instance.name != *self.own)
    }

    /// Returns `UNAVAILABLE` while this instance is not ready.
    pub(crate) fn check_serving(&self) -> Result<(), Status> {
        if *self.serving.borrow() { Ok(()) } else { Err(not_serving()) }
    }

    /// Waits until this instance is not ready.
    pub(crate) async fn until_not_serving(&self) {
        let mut serving = self.serving.clone();
        if serving.wait_for(|serving| !serving).await.is_err() {
            // The sender is dropped when the server exits, which ends all streams.
            std::future::pending::<()>().await;
        }
    }
}

/// Returns the status of watches while this instance is not ready.
pub(crate) fn not_serving() -> Status {
    Status::unavailable("this progress service cannot reach its store; retry the watch")
}
