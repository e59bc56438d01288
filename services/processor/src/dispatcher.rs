//! Dispatcher: finds requests that are due and starts them while permits are available.

mod claim;
mod leases;
mod queue;
mod resume;
mod running_attempts;
mod start;

use std::{pin::pin, sync::Arc, time::Duration};

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
    attempt::{AttemptHandle, Environment, event_log_client::EventLogClient},
    declaration::{ActionKey, Declaration},
    handlers::handler_threads::HandlerSpawner,
    metrics::ProcessorMetrics,
    options::ProcessorOptions,
    scheduler::{
        Hint, HintDecision, Scheduler,
        concurrency_limiter::{ConcurrencyLimiter, ConcurrencyPermit},
        runtime_estimates::RuntimeEstimates,
        wakeup::Wakeup,
    },
    workers::worker_session::WorkerSession,
};

use running_attempts::{RunningAttempt, RunningAttempts};

/// Timeout for the release of running attempts when the processor stops.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);
/// Reason for the release of attempts when the processor stops.
const SHUTTING_DOWN: &str = "the processor is shutting down";
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
    running: RunningAttempts,
    scheduler: Mutex<Scheduler>,
    wakeup: Arc<Wakeup>,
    stopping: CancellationToken,
    runtime_estimates: RuntimeEstimates,
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
            running: RunningAttempts::default(),
            scheduler: Mutex::new(Scheduler::new(options.priority_aging)),
            wakeup,
            stopping: CancellationToken::new(),
            runtime_estimates: RuntimeEstimates::default(),
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
        hint: Hint<'_>,
    ) -> QueueEstimate {
        QueueEstimate {
            started: self.start_or_queue(uid, action, hint),
            slots: self.actions.slots(action, hint.tenant, self.options.max_concurrent_attempts),
            mean_run_duration: self.runtime_estimates.mean(hint.tenant, action),
        }
    }

    /// Starts or queues the request. Returns whether the request was started or is already running.
    fn start_or_queue(self: &Arc<Self>, uid: Uid, action: &str, hint: Hint<'_>) -> bool {
        if self.running.contains(uid) {
            return true;
        }
        if self.is_stopping() {
            return false;
        }
        let acquire = || self.acquire_placement(action, hint.tenant);
        let decision = self.scheduler.lock().on_hint(hint, self.now(), acquire);
        match decision {
            HintDecision::Start(placement) => {
                self.start(uid, hint.tenant, hint.user, placement);
                return true;
            }
            HintDecision::Scan => self.wakeup.request_scan(),
            HintDecision::Delayed(true) => self.wakeup.notify(),
            HintDecision::Delayed(false) => {}
        }
        false
    }

    /// Handles a hint that cancellation of a request was requested.
    pub(crate) fn signal_cancel(&self, uid: Uid, reason: &str) {
        self.running.cancel(uid, reason);
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
            let QueuedRequest { uid, action, tenant, user, not_before } = request;
            let hint = Hint { tenant: &tenant, user: &user, not_before };
            dispatcher.notify_queued(uid, &action, hint);
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
                    let (attempts, sync_calls) = (self.running.len(), self.calls.len());
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
        self.running.detach_remote(SHUTTING_DOWN);
        if self.drained_by(until, self.tasks.wait()).await {
            return;
        }
        self.running.release_all(SHUTTING_DOWN);
        if timeout(RELEASE_TIMEOUT, self.tasks.wait()).await.is_err() {
            let left = self.running.len();
            tracing::warn!(left, "drain timed out with running attempts; their leases will expire");
        }
    }

    /// Detaches the attempts of the given worker, so that it can resume them on another processor.
    pub(crate) fn detach_attempts_of(&self, worker: &WorkerSession) {
        self.running.fence(worker.tasks().iter().map(|task| task.uid));
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
    fn start(self: &Arc<Self>, uid: Uid, tenant: &str, user: &str, placement: Placement) {
        let handle = Arc::new(AttemptHandle::default());
        let attempt = RunningAttempt {
            attempt: AttemptNumber::NONE,
            tenant: tenant.to_owned(),
            user: user.to_owned(),
            handle: handle.clone(),
            is_remote: matches!(placement.runner, Runner::Remote(_)),
        };
        if !self.running.insert(uid, attempt) {
            drop(placement);
            self.wakeup.slot_freed();
            return;
        }
        let Placement { permit, declared, runner } = placement;
        let guard = RunningGuard { dispatcher: self.clone(), uid, permit: Some(permit) };
        // Boxed, because tokio copies the future several times before it allocates the task.
        self.tasks.spawn(Box::pin(async move {
            guard.dispatcher.claim_and_run(uid, declared, runner, handle).await;
        }));
    }

    async fn measure_queue(&self) {
        match self.store.queue_stats().await {
            Ok(stats) => {
                let find = |action: &str| self.actions.find(action, "");
                self.metrics.set_queue(&stats, find, self.now());
            }
            Err(error) => tracing::warn!(%error, "failed to measure the queue"),
        }
    }

    fn record_due(&self, at: Timestamp) {
        if self.scheduler.lock().on_delayed(at) {
            self.wakeup.notify();
        }
    }

    fn until_next_due(&self) -> Duration {
        // If no delayed request is known, the poll timer fires before this delay ends.
        let next_due = self.scheduler.lock().next_due();
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
        self.dispatcher.running.remove(self.uid);
        drop(self.permit.take());
        self.dispatcher.wakeup.slot_freed();
    }
}

#[cfg(test)]
mod tests;
