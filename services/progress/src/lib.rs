//! Event log service: appends events, replays them, and streams them to watchers.
//!
//! Processors publish events; gateways and clients watch them. An event is delivered to watchers only after it is
//! durable. A watcher is a cursor: it reads the events after its position from the tail in memory if the tail contains
//! them, otherwise from the store. Therefore replay continues with live delivery without gaps or duplicates, and a slow
//! watcher does not delay other watchers.

mod log_service;
mod metrics;
mod ring;
#[cfg(test)]
mod testing;
mod topics;
mod unread_budget;
mod watch_service;
mod watcher;

use std::sync::Arc;

use streamer_auth::{AuthLayer, AuthService};
use streamer_core::{Clock, Limits, OpenWatches};
use streamer_handler::MemoryBudget;
use streamer_proto::stubs::{EventLogServiceEndpoint, ProgressServiceEndpoint};
use streamer_store::Store;
use streamer_telemetry::Metrics;
use tokio_util::sync::CancellationToken;

pub use ring::Ring;

use crate::{
    log_service::LogService, metrics::ProgressMetrics, topics::Topics, watch_service::WatchService,
};

/// Dependencies of the progress service.
pub struct Dependencies {
    /// Store of the event logs.
    pub store: Arc<dyn Store>,
    /// Source of timestamps.
    pub clock: Arc<dyn Clock>,
    /// Authenticates calls to the public service.
    pub auth: AuthLayer,
    /// Metrics registry.
    pub metrics: Metrics,
    /// Size limits for payloads, results and chunks.
    pub limits: Limits,
    /// All instances of this service; `None` if this is the only one.
    pub ring: Option<Ring>,
    /// Counts the open watches of tenants and users in this process.
    pub open_watches: Arc<OpenWatches>,
    /// Maximum total bytes of messages that were sent to watchers and not read, over all watchers.
    pub max_unread_bytes: usize,
    /// Whether other processes write to the store.
    pub is_shared: bool,
}

/// The progress service, ready to be served.
pub struct Progress {
    /// Public API, `streamer.progress.v1`.
    pub public: AuthService<ProgressServiceEndpoint<WatchService>>,
    /// API for routers and processors, `streamer.internal.v1`.
    pub internal: EventLogServiceEndpoint<LogService>,
    topics: Arc<Topics>,
}

impl Progress {
    /// Builds the service from its dependencies.
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
        let unread = MemoryBudget::new(max_unread_bytes);
        metrics::observe_unread(&metrics, &unread, max_unread_bytes);
        let metrics = ProgressMetrics::new(&metrics);
        let topics = Arc::new(Topics::new(store.clone(), metrics.clone(), ring.clone(), is_shared));
        let watch =
            WatchService::new(topics.clone(), store.clone(), ring, limits, open_watches, unread);
        let public = ProgressServiceEndpoint::new(watch)
            .max_decoding_message_size(limits.max_message_bytes());
        let log = LogService::new(topics.clone(), store, clock, metrics);
        let internal =
            EventLogServiceEndpoint::new(log).max_decoding_message_size(limits.max_batch_bytes());
        Self { public: auth.wrap(public), internal, topics }
    }

    /// Ends all watches; watchers continue at another instance.
    pub fn drain(&self) {
        self.topics.draining.cancel();
    }

    /// Drops unneeded topics, and compares watched requests with the store in case an announcement was lost, until
    /// `shutdown` is cancelled.
    pub async fn run(&self, shutdown: CancellationToken) {
        self.topics.maintain(shutdown).await;
    }
}
