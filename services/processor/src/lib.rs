//! Execution service: claims and leases requests, runs handlers, retries attempts and enforces time
//! limits.
//!
//! Sync actions run immediately, within the call from the router. Async requests are claimed from the store; the claim
//! assigns the attempt number, which is the fencing token for all reports of the attempt to the progress service. A
//! hint from the router triggers a claim immediately; infrequent polls find requests whose hints were lost. An attempt
//! whose lease is not renewed in time is recovered by the first processor that finds the expired lease.

mod actions;
mod attempt;
mod declaration;
mod dispatcher;
mod execution_service;
mod handlers;
mod metrics;
mod options;
mod scheduler;
mod workers;

use std::{sync::Arc, time::Duration};

use streamer_auth::{AuthLayer, AuthService, Authenticator};
use streamer_core::{Clock, Timestamp, Uid};
use streamer_handler::{Handlers, MemoryBudget};
use streamer_proto::{
    processor::v1::worker_service_server::WorkerServiceServer, stubs::ExecutionServiceEndpoint,
};
use streamer_rpc::Channel;
use streamer_store::Store;
use streamer_telemetry::{Metrics, Traces};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

pub use handlers::handler_threads::HandlerThreads;
pub use options::ProcessorOptions;

use crate::{
    actions::Actions,
    attempt::event_log_client::EventLogClient,
    dispatcher::Dispatcher,
    execution_service::ExecutionApi,
    handlers::request_history::StoredHistory,
    metrics::ProcessorMetrics,
    scheduler::wakeup::Wakeup,
    workers::{worker_pool::WorkerPool, worker_service::WorkerApi},
};

/// Dependencies of the processor.
pub struct Dependencies {
    /// Store of the request queue.
    pub store: Arc<dyn Store>,
    /// Clock for timestamps.
    pub clock: Arc<dyn Clock>,
    /// Verifies the tokens of callers of sync actions, and of workers.
    pub authenticator: Arc<Authenticator>,
    /// Authentication layer of gRPC services, with the audit log.
    pub auth: AuthLayer,
    /// Handlers that run in this process.
    pub handlers: Handlers,
    /// Threads that run the handlers.
    pub handler_threads: HandlerThreads,
    /// Channel to the internal API of the progress service, the event log.
    pub event_log: Channel,
    /// Metrics registry.
    pub metrics: Metrics,
    /// Decides which requests are traced, and exports their spans.
    pub traces: Traces,
    /// Options that the operator sets.
    pub options: ProcessorOptions,
}

/// The processor service, ready to be served.
pub struct Processor {
    /// Internal service for routers: `streamer.internal.v1`.
    pub internal: ExecutionServiceEndpoint<ExecutionApi>,
    /// Public service for workers.
    pub workers: AuthService<WorkerServiceServer<WorkerApi>>,
    dispatcher: Arc<Dispatcher>,
    /// Threads that run the handlers until the processor is dropped.
    _handler_threads: HandlerThreads,
    worker_pool: Arc<WorkerPool>,
    sweep_interval: Duration,
}

impl Processor {
    /// Builds the service.
    #[must_use]
    pub fn build(dependencies: Dependencies) -> Self {
        let Dependencies {
            store,
            clock,
            authenticator,
            auth,
            handlers,
            handler_threads,
            event_log,
            metrics,
            traces,
            options,
        } = dependencies;
        let log = EventLogClient::new(event_log, options.limits.max_batch_bytes(), &metrics);
        let metrics = ProcessorMetrics::new(&metrics);
        let max_message_bytes = options.limits.max_message_bytes();
        let name = name(clock.now());
        let wakeup = Arc::new(Wakeup::default());
        let worker_pool =
            Arc::new(WorkerPool::new(wakeup.clone(), options.lease, options.tenant_share));
        let actions = Arc::new(Actions::new(handlers, worker_pool.clone(), options.sync_threshold));
        let output_budget = MemoryBudget::new(options.max_buffered_output_bytes);
        metrics.export_output(&output_budget, options.max_buffered_output_bytes);
        let dispatcher = Arc::new(Dispatcher::new(dispatcher::Parts {
            name: name.clone(),
            history: Arc::new(StoredHistory::new(store.clone())),
            store,
            clock: clock.clone(),
            actions: actions.clone(),
            wakeup,
            log,
            output_budget,
            handlers: handler_threads.spawner(),
            metrics: metrics.clone(),
            traces,
            options,
        }));
        let workers = WorkerApi::new(
            name,
            dispatcher.clone(),
            actions.clone(),
            authenticator.clone(),
            clock,
            options,
        );
        let max_worker_message_bytes = options.limits.max_worker_message_bytes();
        let workers = WorkerServiceServer::new(workers)
            .max_decoding_message_size(max_worker_message_bytes)
            .max_encoding_message_size(max_worker_message_bytes);
        let service =
            ExecutionApi::new(dispatcher.clone(), actions, authenticator.clone(), metrics, options);
        let internal = ExecutionServiceEndpoint::new(service)
            .max_decoding_message_size(max_message_bytes)
            .max_encoding_message_size(max_worker_message_bytes);
        Self {
            internal,
            workers: auth.wrap(workers),
            dispatcher,
            _handler_threads: handler_threads,
            worker_pool,
            sweep_interval: options.lease / 10,
        }
    }

    /// Loads the saved action declarations, then claims and runs requests until `shutdown` is cancelled; then drains
    /// running attempts within the drain timeout.
    pub async fn run(&self, shutdown: CancellationToken) {
        let worker_pool = self.worker_pool.clone();
        let mut ticks = interval(self.sweep_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let sweeper = AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                worker_pool.sweep(ticks.tick().await);
            }
        }));
        self.dispatcher.load_actions(&shutdown).await;
        self.dispatcher.run(shutdown).await;
        drop(sweeper);
    }
}

/// Returns the name of this run of the processor, for leases and `started` events.
fn name(now: Timestamp) -> String {
    format!("processor-{}", Uid::new(now))
}
