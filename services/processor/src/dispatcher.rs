//! Dispatcher: finds requests that are due and starts them while permits are available.

mod leases;
mod queue;
mod resume;
mod start;

use std::{collections::HashMap, pin::pin, sync::Arc, time::Duration};

use parking_lot::Mutex;
use streamer_core::{AttemptNumber, Clock, Timestamp, Uid};
use streamer_handler::{MemoryBudget, RequestHistory};
use streamer_store::{QueuedRequest, Store};
use streamer_telemetry::Traces;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{AbortOnDropHandle, TaskTracker, task_tracker::TaskTrackerToken},
};

use crate::{
    actions::{Actions, Runner, SaveDeclarationsError},
    attempt::{AttemptHandle, Environment},
    backlog::Backlog,
    concurrency_limiter::{ConcurrencyLimiter, ConcurrencyPermit},
    declaration::{ActionKey, Declaration},
    event_log_client::EventLogClient,
    fair_queue::FairQueue,
    handlers::handler_threads::HandlerSpawner,
    metrics::ProcessorMetrics,
    options::ProcessorOptions,
    quarantine::Quarantine,
    runtime_estimates::RuntimeEstimates,
    wakeup::Wakeup,
    workers::worker_session::WorkerSession,
};

/// Timeout for the release of running attempts when the processor stops.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between scans of the queue when `queue_polling` is off. They find requests whose hint arrived before the
/// index contained the request, or at a processor that cannot run it.
const FALLBACK_SCAN_INTERVAL: Duration = Duration::from_secs(30);
/// Interval between log lines about the progress of a drain.
const DRAIN_LOG_INTERVAL: Duration = Duration::from_secs(5);
/// Interval between updates of the queue metrics.
const MEASURE_INTERVAL: Duration = Duration::from_secs(5);

/// Dependencies of the dispatcher.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) history: Arc<dyn RequestHistory>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) actions: Arc<Actions>,
    pub(crate) wakeup: Arc<Wakeup>,
    pub(crate) log: EventLogClient,
    pub(crate) output_budget: Arc<MemoryBudget>,
    pub(crate) handlers: HandlerSpawner,
    pub(crate) metrics: ProcessorMetrics,
    pub(crate) traces: Traces,
    pub(crate) options: ProcessorOptions,
}

pub(crate) struct Dispatcher {
    /// Name under which this processor holds leases.
    name: String,
    store: Arc<dyn Store>,
    actions: Arc<Actions>,
    environment: Environment,
    /// Memory budget for reports that are not yet durable, shared by all attempts of this processor.
    output_budget: Arc<MemoryBudget>,
    metrics: ProcessorMetrics,
    traces: Traces,
    options: ProcessorOptions,
    limiter: Arc<ConcurrencyLimiter>,
    running: Mutex<HashMap<Uid, RunningAttempt>>,
    wakeup: Arc<Wakeup>,
    stopping: CancellationToken,
    /// Time at which the earliest known delayed request is due.
    next_due: Mutex<Option<Timestamp>>,
    /// Tenant after which the next scan continues; a scan reads a limited number of tenants.
    after_tenant: Mutex<Option<String>>,
    runtime_estimates: RuntimeEstimates,
    fair_queue: FairQueue,
    backlog: Backlog,
    quarantine: Quarantine,
    tasks: TaskTracker,
    /// Sync calls that workers execute.
    calls: TaskTracker,
}

/// Data for an estimate of the time until a queued request starts.
pub(crate) struct QueueEstimate {
    /// Whether the request was started or is already running.
    pub(crate) started: bool,
    /// Maximum number of requests for the action that can run concurrently.
    pub(crate) slots: u32,
    /// Mean duration of recent attempts; `None` before the first measurement.
    pub(crate) mean_run_duration: Option<Duration>,
}

struct RunningAttempt {
    /// Number of the attempt; 0 until the claim is durable.
    attempt: AttemptNumber,
    tenant: String,
    handle: Arc<AttemptHandle>,
    remote: bool,
}

/// Permit and runner for one attempt.
struct Placement {
    permit: ConcurrencyPermit,
    declared: Arc<Declaration>,
    runner: Runner,
}

impl Dispatcher {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            name,
            store,
            history,
            clock,
            actions,
            wakeup,
            log,
            output_budget,
            handlers,
            metrics,
            traces,
            options,
        } = parts;
        let limiter =
            ConcurrencyLimiter::new(options.max_concurrent_attempts, options.tenant_share);
        Self {
            name,
            store,
            actions,
            environment: Environment {
                clock,
                log,
                handlers,
                history,
                limits: options.limits,
                cancellation_grace_period: options.cancellation_grace_period,
            },
            output_budget,
            metrics,
            traces,
            options,
            limiter: Arc::new(limiter),
            running: Mutex::default(),
            wakeup,
            stopping: CancellationToken::new(),
            next_due: Mutex::default(),
            after_tenant: Mutex::default(),
            runtime_estimates: RuntimeEstimates::default(),
            fair_queue: FairQueue::default(),
            backlog: Backlog::default(),
            quarantine: Quarantine::default(),
            tasks: TaskTracker::new(),
            calls: TaskTracker::new(),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.environment.clock.now()
    }

    /// Returns the memory budget for reports that are not yet durable, shared by all attempts of this processor.
    pub(crate) fn output_budget(&self) -> &Arc<MemoryBudget> {
        &self.output_budget
    }

    /// Loads the saved declarations with retries. If other processors share the store, also saves those of this
    /// processor.
    pub(crate) async fn load_actions(&self, shutdown: &CancellationToken) {
        while let Err(error) = self.actions.load(&*self.store, &*self.environment.clock).await {
            tracing::warn!(%error, "failed to load the declared actions, retrying");
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(self.options.poll_interval) => {}
            }
        }
        if self.options.shared
            && let Err(error) = self.save_local_actions().await
        {
            tracing::warn!(%error, "failed to save the actions of this processor");
        }
    }

    async fn save_local_actions(&self) -> Result<(), SaveDeclarationsError> {
        let local = self.actions.local().map(|spec| {
            let key = ActionKey { action: spec.name.clone(), tenant: None };
            (key, spec.clone())
        });
        let local = local.collect();
        self.actions.save(local, &*self.store, &*self.environment.clock).await
    }

    /// Saves the declarations of a worker, so that they remain available while no worker offers the actions.
    pub(crate) async fn save_declarations(
        &self,
        worker: &WorkerSession,
    ) -> Result<(), SaveDeclarationsError> {
        let declared = worker.declarations();
        self.actions.save(declared, &*self.store, &*self.environment.clock).await
    }

    /// Handles a hint that a request is queued: starts the request if a permit is available and no other request of the
    /// tenant is queued before it. Returns data for an estimate of its start.
    pub(crate) fn notify_queued(
        self: &Arc<Self>,
        uid: Uid,
        action: &str,
        tenant: &str,
        not_before: Option<Timestamp>,
    ) -> QueueEstimate {
        let started = match not_before {
            Some(not_before) if not_before > self.now() => {
                self.record_due(not_before);
                false
            }
            _ => self.start_or_queue(uid, action, tenant),
        };
        QueueEstimate {
            started,
            slots: self.actions.slots(action, tenant, self.options.max_concurrent_attempts),
            mean_run_duration: self.runtime_estimates.mean(tenant, action),
        }
    }

    /// Starts or queues the request. Returns whether the request was started or is already running.
    fn start_or_queue(self: &Arc<Self>, uid: Uid, action: &str, tenant: &str) -> bool {
        if self.running.lock().contains_key(&uid) {
            return true;
        }
        if self.is_stopping() {
            return false;
        }
        // A request does not overtake queued requests of its tenant, even if a slot is free during a scan. It may
        // overtake those of other tenants, which wait for their own slots.
        let behind = self.backlog.may_contain(tenant);
        let placement = if behind { None } else { self.acquire_placement(action, tenant) };
        match placement {
            Some(placement) => {
                self.fair_queue.charge(tenant);
                self.start(uid, tenant, placement);
                true
            }
            None => {
                self.backlog.insert(tenant);
                self.wakeup.request_scan();
                false
            }
        }
    }

    /// Handles a hint that cancellation of a request was requested.
    pub(crate) fn signal_cancel(&self, uid: Uid, reason: &str) {
        if let Some(running) = self.running.lock().get(&uid) {
            running.handle.cancel(reason);
        }
    }

    /// Dispatches requests until `shutdown` is cancelled, then drains running attempts within the drain timeout.
    pub(crate) async fn run(self: &Arc<Self>, shutdown: CancellationToken) {
        // A separate task, so that the signal takes effect while the loop below is busy.
        let stopping = self.stopping.clone();
        let stop_requested = shutdown.clone();
        let _stopper = AbortOnDropHandle::new(tokio::spawn(async move {
            stop_requested.cancelled().await;
            stopping.cancel();
        }));
        let notifications = self.follow_queue_notifications(shutdown.clone());
        let stop_renewal = CancellationToken::new();
        let lease_renewal = tokio::spawn(self.clone().renew_leases_until(stop_renewal.clone()));
        let mut polls = interval(self.options.poll_interval);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_measured: Option<Instant> = None;
        let mut last_scan = Instant::now();
        loop {
            let delay = self.until_next_due();
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = self.wakeup.notified() => {}
                () = tokio::time::sleep(delay) => self.wakeup.mark_scan_pending(),
                _ = polls.tick() => {
                    if self.options.queue_polling || last_scan.elapsed() >= FALLBACK_SCAN_INTERVAL {
                        last_scan = Instant::now();
                        self.wakeup.mark_scan_pending();
                    }
                    self.recover_expired_leases().await;
                    self.fail_overdue().await;
                    if last_measured.is_none_or(|at| at.elapsed() >= MEASURE_INTERVAL) {
                        last_measured = Some(Instant::now());
                        self.measure_queue().await;
                    }
                }
            }
            if let Err(error) = self.dispatch().await {
                tracing::warn!(%error, "failed to scan the queue");
            }
        }
        drop(notifications);
        self.stop().await;
        stop_renewal.cancel();
        if let Err(error) = lease_renewal.await {
            tracing::error!(%error, "the lease renewal task failed");
        }
    }

    /// Follows the notifications of queued requests from the store, if it sends any.
    fn follow_queue_notifications(
        self: &Arc<Self>,
        shutdown: CancellationToken,
    ) -> Option<AbortOnDropHandle<()>> {
        let trigger = self.store.queue_notifier()?;
        let dispatcher = self.clone();
        let on_queued = Arc::new(move |request: QueuedRequest| {
            let QueuedRequest { uid, action, tenant, not_before } = request;
            dispatcher.notify_queued(uid, &action, &tenant, Some(not_before));
        });
        let (name, clock) = (self.name.clone(), self.environment.clock.clone());
        let following = trigger.follow(name, clock, on_queued, shutdown);
        Some(AbortOnDropHandle::new(tokio::spawn(following)))
    }

    /// Waits for `work`, and logs the progress. Returns whether the work has ended by the given time.
    async fn drained_by(&self, until: Instant, work: impl Future<Output = ()>) -> bool {
        let mut work = pin!(work);
        let mut ticks = interval(DRAIN_LOG_INTERVAL);
        loop {
            tokio::select! {
                biased;
                () = &mut work => return true,
                () = sleep_until(until) => return false,
                _ = ticks.tick() => {
                    let (attempts, sync_calls) = (self.running.lock().len(), self.calls.len());
                    tracing::info!(attempts, sync_calls, "draining: waiting for running work");
                }
            }
        }
    }

    /// Drains running attempts, and releases those that do not finish in time. Attempts on workers
    /// continue: the workers reconnect to this or another processor.
    async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.close();
        let deadline = self.now().plus(self.options.drain_timeout);
        let until = Instant::now() + self.options.drain_timeout;
        // Sync calls fail when the streams of their workers end, so these streams end last.
        self.actions.workers.drain(deadline, |worker| !worker.answers_calls());
        self.calls.close();
        if !self.drained_by(until, self.calls.wait()).await {
            tracing::warn!("drain timed out with sync calls in progress");
        }
        self.actions.workers.drain(deadline, |_| true);
        self.detach_remote_attempts();
        if self.drained_by(until, self.tasks.wait()).await {
            return;
        }
        for running in self.running.lock().values() {
            running.handle.release("the processor is shutting down");
        }
        if timeout(RELEASE_TIMEOUT, self.tasks.wait()).await.is_err() {
            let left = self.running.lock().len();
            tracing::warn!(left, "drain timed out with running attempts; their leases will expire");
        }
    }

    /// Detaches the running attempts on workers, so that the workers can resume them on another processor; releases
    /// those that were not yet assigned.
    fn detach_remote_attempts(&self) {
        for running in self.running.lock().values().filter(|running| running.remote) {
            if running.attempt == AttemptNumber::NONE {
                running.handle.release("the processor is shutting down");
            } else {
                running.handle.fence();
            }
        }
    }

    /// Detaches the attempts of the given worker, so that it can resume them on another processor.
    pub(crate) fn detach_attempts_of(&self, worker: &WorkerSession) {
        let tasks = worker.tasks();
        let running = self.running.lock();
        for running in tasks.iter().filter_map(|task| running.get(&task.uid)) {
            running.handle.fence();
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Returns a token that keeps the streams of workers open during a call; `None` if the processor is shutting down.
    pub(crate) fn track_call(&self) -> Option<TaskTrackerToken> {
        let call = self.calls.token();
        (!self.is_stopping()).then_some(call)
    }

    /// Waits until the processor is shutting down.
    pub(crate) fn stopped(&self) -> WaitForCancellationFutureOwned {
        self.stopping.clone().cancelled_owned()
    }

    /// Acquires a placement for one attempt of the given action and tenant; `None` if none is available.
    fn acquire_placement(&self, action: &str, tenant: &str) -> Option<Placement> {
        let declared = self.actions.find(action, tenant)?;
        let permit = self.limiter.try_acquire(&declared, tenant)?;
        let runner = self.actions.acquire_runner(action, tenant)?;
        Some(Placement { permit, declared, runner })
    }

    /// Claims a request and runs its attempt in a separate task.
    fn start(self: &Arc<Self>, uid: Uid, tenant: &str, placement: Placement) {
        let handle = Arc::new(AttemptHandle::default());
        let remote = matches!(placement.runner, Runner::Remote(_));
        if !self.register(
            uid,
            RunningAttempt {
                attempt: AttemptNumber::NONE,
                tenant: tenant.to_owned(),
                handle: handle.clone(),
                remote,
            },
        ) {
            return;
        }
        let Placement { permit, declared, runner } = placement;
        let guard = RunningGuard { dispatcher: self.clone(), uid, permit: Some(permit) };
        // Boxed, because tokio copies the future several times before it allocates the task.
        self.tasks.spawn(Box::pin(async move {
            guard.dispatcher.claim_and_run(uid, declared, runner, handle).await;
        }));
    }

    /// Registers the running attempt of a request; returns `false` if the request already has one.
    fn register(&self, uid: Uid, running: RunningAttempt) -> bool {
        let mut running_attempts = self.running.lock();
        if running_attempts.contains_key(&uid) {
            return false;
        }
        running_attempts.insert(uid, running);
        true
    }

    async fn measure_queue(&self) {
        match self.store.queue_stats(self.now()).await {
            Ok(stats) => {
                let age = stats.oldest_due.map_or(Duration::ZERO, |due| self.now().since(due));
                self.metrics.set_queue(stats.queued, age);
            }
            Err(error) => tracing::warn!(%error, "failed to measure the queue"),
        }
    }

    fn record_due(&self, at: Timestamp) {
        let mut next_due = self.next_due.lock();
        if next_due.is_none_or(|due| at < due) {
            *next_due = Some(at);
            self.wakeup.notify();
        }
    }

    fn until_next_due(&self) -> Duration {
        // If no delayed request is known, the poll timer fires before this delay ends.
        let next_due = *self.next_due.lock();
        next_due.map_or(self.options.poll_interval * 2, |due| due.since(self.now()))
    }
}

/// Guard of a running attempt. When dropped, it removes the attempt, releases its permit and wakes the dispatcher.
struct RunningGuard {
    dispatcher: Arc<Dispatcher>,
    uid: Uid,
    permit: Option<ConcurrencyPermit>,
}

impl Drop for RunningGuard {
    fn drop(&mut self) {
        self.dispatcher.running.lock().remove(&self.uid);
        drop(self.permit.take());
        self.dispatcher.wakeup.slot_freed();
    }
}

#[cfg(test)]
mod tests;
