//! The event log: append, replay, live server-streaming to watchers.
//!
//! Processors publish here, gateways and clients watch here. An event reaches a watcher only once
//! it is durable. A watcher is a cursor: it takes the event after the last one it has, from the
//! tail in memory when that is there, else from the store. So replay joins live without a gap or
//! a repeat, whatever is in memory, and a slow watcher costs only itself.

mod log_service;
mod metrics;
#[cfg(test)]
mod testing;
mod topics;
mod unread;
mod watch_service;
mod watcher;

use std::sync::Arc;

use streamer_auth::{AuthLayer, AuthService};
use streamer_core::{Clock, Limits, OpenWatches, Uid};
use streamer_handler::OutputBudget;
use streamer_proto::{
    internal::v1::event_log_service_server::EventLogServiceServer,
    progress::v1::progress_service_server::ProgressServiceServer,
};
use streamer_rpc::{Member, Members};
use streamer_store::Store;
use streamer_telemetry::Metrics;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    log_service::LogService, metrics::ProgressMetrics, topics::Topics, watch_service::WatchService,
};

/// What the progress service needs.
pub struct Dependencies {
    /// Where logs are.
    pub store: Arc<dyn Store>,
    /// For timestamps.
    pub clock: Arc<dyn Clock>,
    /// In front of the public service.
    pub auth: AuthLayer,
    /// Where metrics go.
    pub metrics: Metrics,
    /// Sizes that bound payloads, results and chunks.
    pub limits: Limits,
    /// Where this instance stands among others; `None` when it is the only one.
    pub ring: Option<Ring>,
    /// How many watches tenants and users have open in this process.
    pub open_watches: Arc<OpenWatches>,
    /// Bytes of messages that watchers have been sent and have not read, over all of them.
    pub max_unread_bytes: usize,
    /// Whether other processes write to the store.
    pub is_shared: bool,
}

/// All instances of this service. Each request belongs to one of them, where its events are
/// published first. That only makes things fast: what an instance is not told, it finds in the store.
#[derive(Clone)]
pub struct Ring {
    /// The name of this one among the members.
    pub own: String,
    /// All of them.
    pub members: Members,
    /// Whether this one can do its job. While it cannot, it serves no watches: what it does not learn
    /// itself, another member does.
    pub serving: watch::Receiver<bool>,
}

impl Ring {
    /// To the instance that a request belongs to; `None` when that is this one.
    fn owner(&self, uid: Uid) -> Option<Member> {
        self.members.owner(uid).filter(|member| *member.name != *self.own)
    }

    /// UNAVAILABLE while this instance cannot do its job.
    fn check_serving(&self) -> Result<(), Status> {
        if *self.serving.borrow() { Ok(()) } else { Err(not_serving()) }
    }

    /// Returns once this instance cannot do its job.
    async fn stops_serving(&self) {
        let mut serving = self.serving.clone();
        if serving.wait_for(|serving| !serving).await.is_err() {
            // The server has ended, and with it all streams.
            std::future::pending::<()>().await;
        }
    }
}

fn not_serving() -> Status {
    Status::unavailable("this progress service cannot reach its store; watch again")
}

/// The progress service, ready to be served.
pub struct Progress {
    /// For everybody: `streamer.progress.v1`.
    pub public: AuthService<ProgressServiceServer<WatchService>>,
    /// For router and processor: `streamer.internal.v1`.
    pub internal: EventLogServiceServer<LogService>,
    topics: Arc<Topics>,
}

impl Progress {
    /// Wires the service.
    #[must_use]
    pub fn build(dependencies: Dependencies) -> Self {
        let Dependencies {
            store,
            clock,
            auth,
            metrics,
            limits,
            ring,
            open_watches,
            max_unread_bytes,
            is_shared,
        } = dependencies;
        let unread = OutputBudget::new(max_unread_bytes);
        metrics::watch_unread(&metrics, &unread, max_unread_bytes);
        let metrics = ProgressMetrics::new(&metrics);
        let topics = Arc::new(Topics::new(store.clone(), metrics.clone(), ring.clone(), is_shared));
        let watch =
            WatchService::new(topics.clone(), store.clone(), ring, limits, open_watches, unread);
        let public =
            ProgressServiceServer::new(watch).max_decoding_message_size(limits.max_message_bytes());
        let log = LogService::new(topics.clone(), store, clock, metrics);
        let internal =
            EventLogServiceServer::new(log).max_decoding_message_size(limits.max_batch_bytes());
        Self { public: auth.wrap(public), internal, topics }
    }

    /// Ends every watch: whoever watches goes on elsewhere.
    pub fn drain(&self) {
        self.topics.draining.cancel();
    }

    /// Keeps the tails small and looks after watchers whose hints were lost, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        self.topics.maintain(shutdown).await;
    }
}
