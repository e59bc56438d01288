//! Execution: claim, lease, dispatch to handlers, retry, time out.
//!
//! Sync actions run at once, for the router that calls. Async requests are claimed from the store,
//! which makes their attempt number the fencing token for everything they report; what they
//! report goes to the progress service. Hints from the router start a claim at once, a slow poll
//! finds whatever hints did not reach. A lease that is not renewed in time is taken over by
//! whoever finds it.

mod actions;
mod attempt;
mod dispatcher;
mod durations;
mod execution_service;
mod fair;
mod grants;
mod handler_threads;
mod hello;
mod history;
mod log_client;
mod mailbox;
mod metrics;
mod outcome;
mod remote;
mod remote_task;
mod schema_checks;
mod session_secret;
mod set_aside;
mod signal;
mod slots;
mod takeover;
mod waiting;
mod worker;
mod worker_service;
mod workers;

use std::{sync::Arc, time::Duration};

use streamer_auth::{AuthLayer, AuthService, Authenticator};
use streamer_core::{Clock, Limits, Timestamp, Uid};
use streamer_handler::{Handlers, OutputBudget};
use streamer_proto::{
    internal::v1::execution_service_server::ExecutionServiceServer,
    processor::v1::worker_service_server::WorkerServiceServer,
};
use streamer_rpc::Channel;
use streamer_store::Store;
use streamer_telemetry::{Metrics, Traces};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

pub use handler_threads::HandlerThreads;

use crate::{
    actions::Actions, dispatcher::Dispatcher, execution_service::ExecutionApi,
    history::StoredHistory, log_client::LogClient, metrics::ProcessorMetrics, signal::Signal,
    worker_service::WorkerApi, workers::Workers,
};

/// What the operator sets.
#[derive(Clone, Copy, Debug)]
pub struct ProcessorOptions {
    /// Async attempts that run at once at most.
    pub max_concurrent_attempts: u32,
    /// Percent of those, and of the slots of all workers, that one tenant gets at most.
    pub tenant_share: u32,
    /// Sync actions that run at once at most.
    pub max_concurrent_sync: usize,
    /// Longest run of a sync action that sets no limit of its own.
    pub sync_timeout: Duration,
    /// How long a lease lasts unless renewed.
    pub lease: Duration,
    /// How long a handler may go on after cancellation was asked for.
    pub cancel_grace: Duration,
    /// How often the store is asked for work that no hint told of.
    pub poll_interval: Duration,
    /// How long running attempts may go on when the processor stops.
    pub drain_timeout: Duration,
    /// Bytes of reports and results that are not stored yet, over all attempts.
    pub max_buffered_output_bytes: usize,
    /// Sizes that bound payloads, results and chunks.
    pub limits: Limits,
    /// Actions faster than this are sync.
    pub sync_threshold: Duration,
    /// Whether the queue is looked at again and again, also when nobody told of anything.
    pub poll_queue: bool,
    /// Whether others work on the same store: they are told what this one can run, for the time
    /// when it is gone.
    pub shared: bool,
}

/// What the processor needs.
pub struct Dependencies {
    /// Where requests wait.
    pub store: Arc<dyn Store>,
    /// For timestamps.
    pub clock: Arc<dyn Clock>,
    /// Verifies the tokens of those who ask for sync actions, and of workers.
    pub authenticator: Arc<Authenticator>,
    /// The same, in front of gRPC services, with the audit log.
    pub auth: AuthLayer,
    /// What it can run.
    pub handlers: Handlers,
    /// Where it runs those.
    pub handler_threads: HandlerThreads,
    /// To the progress service.
    pub progress: Channel,
    /// Where metrics go.
    pub metrics: Metrics,
    /// Where traces go.
    pub traces: Traces,
    /// What the operator sets.
    pub options: ProcessorOptions,
}

/// The processor, ready to be served.
pub struct Processor {
    /// For the router: `streamer.internal.v1`.
    pub internal: ExecutionServiceServer<ExecutionApi>,
    /// For workers.
    pub workers: AuthService<WorkerServiceServer<WorkerApi>>,
    dispatcher: Arc<Dispatcher>,
    /// They live as long as this.
    _handler_threads: HandlerThreads,
    registry: Arc<Workers>,
    sweep_interval: Duration,
}

impl Processor {
    /// Wires the service.
    #[must_use]
    pub fn build(dependencies: Dependencies) -> Self {
        let Dependencies {
            store,
            clock,
            authenticator,
            auth,
            handlers,
            handler_threads,
            progress,
            metrics,
            traces,
            options,
        } = dependencies;
        let metrics = ProcessorMetrics::new(&metrics);
        let max_message_bytes = options.limits.max_message_bytes();
        let name = name(clock.now());
        let signal = Arc::new(Signal::default());
        let registry = Arc::new(Workers::new(signal.clone(), options.lease, options.tenant_share));
        let actions = Arc::new(Actions::new(handlers, registry.clone(), options.sync_threshold));
        let output_budget = OutputBudget::new(options.max_buffered_output_bytes);
        metrics.watch_output(&output_budget, options.max_buffered_output_bytes);
        let dispatcher = Arc::new(Dispatcher::new(dispatcher::Parts {
            name: name.clone(),
            history: Arc::new(StoredHistory::new(store.clone())),
            store,
            clock: clock.clone(),
            actions: actions.clone(),
            signal,
            log: LogClient::new(progress, options.limits.max_batch_bytes()),
            output_budget,
            handlers: handler_threads.handle(),
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
        let internal = ExecutionServiceServer::new(service)
            .max_decoding_message_size(max_message_bytes)
            .max_encoding_message_size(max_worker_message_bytes);
        Self {
            internal,
            workers: auth.wrap(workers),
            dispatcher,
            _handler_threads: handler_threads,
            registry,
            sweep_interval: options.lease / 10,
        }
    }

    /// Learns which actions were declared before, then claims and runs requests until `shutdown`;
    /// then lets running ones end, for as long as the options say.
    pub async fn run(&self, shutdown: CancellationToken) {
        let registry = self.registry.clone();
        let mut ticks = interval(self.sweep_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let sweeping = AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                registry.sweep(ticks.tick().await);
            }
        }));
        self.dispatcher.load_actions(&shutdown).await;
        self.dispatcher.run(shutdown).await;
        drop(sweeping);
    }
}

/// One run of one processor, in leases and `started` events.
fn name(now: Timestamp) -> String {
    format!("processor-{}", Uid::new(now))
}
