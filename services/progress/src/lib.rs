//! The event log: append, replay, live server-streaming to watchers.
//!
//! Processors publish here, gateways and clients watch here. An event reaches a watcher only once
//! it is durable. A watcher is a cursor: it takes the event after the last one it has, from the
//! tail in memory when that is there, else from the store. So replay joins live without a gap or
//! a repeat, whatever is in memory, and a slow watcher costs only itself.

mod log_service;
mod metrics;
mod topics;
mod watch_service;
mod watcher;

use std::sync::Arc;

use streamer_auth::{AuthLayer, AuthService};
use streamer_core::{Clock, Limits};
use streamer_proto::{
    internal::v1::event_log_service_server::EventLogServiceServer,
    progress::v1::progress_service_server::ProgressServiceServer,
};
use streamer_store::Store;
use streamer_telemetry::Metrics;
use tokio_util::sync::CancellationToken;

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
        let Dependencies { store, clock, auth, metrics, limits } = dependencies;
        let metrics = ProgressMetrics::new(&metrics);
        let topics = Arc::new(Topics::new(store.clone(), metrics.clone()));
        let watch = WatchService::new(topics.clone(), store.clone());
        let public =
            ProgressServiceServer::new(watch).max_decoding_message_size(limits.max_message_bytes());
        let log = LogService::new(topics.clone(), store, clock, metrics);
        let internal =
            EventLogServiceServer::new(log).max_decoding_message_size(limits.max_batch_bytes());
        Self { public: auth.wrap(public), internal, topics }
    }

    /// Keeps the tails small and looks after watchers whose hints were lost, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        self.topics.maintain(shutdown).await;
    }
}
