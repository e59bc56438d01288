//! Finds requests that may start, and starts them while there is room.

mod adoption;
mod leases;
mod queue;
mod run;

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use streamer_core::{Clock, Timestamp, Uid};
use streamer_handler::{OutputBudget, RequestHistory};
use streamer_store::{Store, WaitingRequest};
use streamer_telemetry::Traces;
use tokio::runtime::Handle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{AbortOnDropHandle, TaskTracker, task_tracker::TaskTrackerToken},
};

use crate::{
    ProcessorOptions,
    actions::{Actions, Declared, RememberError, Runner},
    attempt::{AttemptHandle, Environment},
    durations::Durations,
    fair::Turns,
    log_client::LogClient,
    metrics::ProcessorMetrics,
    set_aside::SetAside,
    signal::Signal,
    slots::{Slot, Slots},
    waiting::Waiting,
    worker::Worker,
    workers::Key,
};

/// How long handing back what runs may take when the processor stops.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the queue is looked at without `poll_queue`: a hint that came before the index showed
/// its request, or to a processor that cannot run it, is lost.
const SLOW_POLL: Duration = Duration::from_secs(30);
/// How often the queue is measured.
const MEASURE_INTERVAL: Duration = Duration::from_secs(5);

/// What a dispatcher is made of.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) history: Arc<dyn RequestHistory>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) actions: Arc<Actions>,
    pub(crate) signal: Arc<Signal>,
    pub(crate) log: LogClient,
    pub(crate) output_budget: Arc<OutputBudget>,
    pub(crate) handlers: Handle,
    pub(crate) metrics: ProcessorMetrics,
    pub(crate) traces: Traces,
    pub(crate) options: ProcessorOptions,
}

pub(crate) struct Dispatcher {
    /// The holder's name in leases.
    name: String,
    store: Arc<dyn Store>,
    actions: Arc<Actions>,
    environment: Environment,
    /// What the attempts that run here have reported, and is not stored yet.
    output_budget: Arc<OutputBudget>,
    metrics: ProcessorMetrics,
    traces: Traces,
    options: ProcessorOptions,
    slots: Arc<Slots>,
    running: Mutex<HashMap<Uid, Running>>,
    signal: Arc<Signal>,
    stopping: CancellationToken,
    /// When the earliest known delayed request becomes due.
    next_due: Mutex<Option<Timestamp>>,
    /// Where the next look at the queue begins, when there are more tenants than one look takes.
    after_tenant: Mutex<Option<String>>,
    durations: Durations,
    turns: Turns,
    waiting: Waiting,
    set_aside: SetAside,
    tasks: TaskTracker,
    /// Sync calls that workers answer.
    calls: TaskTracker,
}

/// How long a request will wait, as far as can be told here.
pub(crate) struct Outlook {
    /// It does not wait.
    pub(crate) started: bool,
    /// How many for its action can run at once.
    pub(crate) slots: u32,
    /// How long they took lately.
    pub(crate) usual_run: Option<Duration>,
}

struct Running {
    /// 0 until its claim is durable.
    attempt: u32,
    tenant: String,
    handle: Arc<AttemptHandle>,
    remote: bool,
}

/// Room for one attempt.
struct Place {
    slot: Slot,
    declared: Declared,
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
            signal,
            log,
            output_budget,
            handlers,
            metrics,
            traces,
            options,
        } = parts;
        let slots = Slots::new(options.max_concurrent_attempts, options.tenant_share);
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
                cancel_grace: options.cancel_grace,
            },
            output_budget,
            metrics,
            traces,
            options,
            slots: Arc::new(slots),
            running: Mutex::default(),
            signal,
            stopping: CancellationToken::new(),
            next_due: Mutex::default(),
            after_tenant: Mutex::default(),
            durations: Durations::default(),
            turns: Turns::default(),
            waiting: Waiting::default(),
            set_aside: SetAside::default(),
            tasks: TaskTracker::new(),
            calls: TaskTracker::new(),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.environment.clock.now()
    }

    /// What the attempts that run here have reported, and is not stored yet.
    pub(crate) fn output_budget(&self) -> &Arc<OutputBudget> {
        &self.output_budget
    }

    /// Learns what was declared before this process was started.
    pub(crate) async fn load_actions(&self, shutdown: &CancellationToken) {
        while let Err(error) = self.actions.load(&*self.store, &*self.environment.clock).await {
            tracing::warn!(%error, "could not read the declared actions, will try again");
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(self.options.poll_interval) => {}
            }
        }
        if self.options.shared
            && let Err(error) = self.remember_local().await
        {
            tracing::warn!(%error, "could not save what this processor can run");
        }
    }

    async fn remember_local(&self) -> Result<(), RememberError> {
        let local = self.actions.local().map(|spec| {
            let key = Key { action: spec.name.clone(), tenant: None };
            (key, spec.clone())
        });
        let local = local.collect();
        self.actions.remember(local, &*self.store, &*self.environment.clock).await
    }

    /// Keeps what a worker declares, for the time when nobody offers it.
    pub(crate) async fn remember_actions(&self, worker: &Worker) -> Result<(), RememberError> {
        let declared = worker.declared();
        self.actions.remember(declared, &*self.store, &*self.environment.clock).await
    }

    /// A hint that a request waits: starts it when nothing waits before it and there is room.
    pub(crate) fn wake(
        self: &Arc<Self>,
        uid: Uid,
        action: &str,
        tenant: &str,
        not_before: Option<Timestamp>,
    ) -> Outlook {
        let started = match not_before {
            Some(not_before) if not_before > self.now() => {
                self.note_due(not_before);
                false
            }
            _ => self.start_or_queue(uid, action, tenant),
        };
        Outlook {
            started,
            slots: self.actions.slots(action, tenant, self.options.max_concurrent_attempts),
            usual_run: self.durations.usual(tenant, action),
        }
    }

    /// Whether it was started, or runs already.
    fn start_or_queue(self: &Arc<Self>, uid: Uid, action: &str, tenant: &str) -> bool {
        if self.running.lock().contains_key(&uid) {
            return true;
        }
        if self.is_stopping() {
            return false;
        }
        // Nothing overtakes what waits of the same tenant, also while the queue is being read and a slot
        // is free; work of others waits for slots of its own.
        let behind = self.waiting.may_have(tenant);
        let place = if behind { None } else { self.place(action, tenant) };
        match place {
            Some(place) => {
                self.turns.took(tenant);
                self.start(uid, tenant, place);
                true
            }
            None => {
                self.waiting.note(tenant);
                self.signal.look_at_all();
                false
            }
        }
    }

    /// A hint that cancellation of a request was asked for.
    pub(crate) fn signal_cancel(&self, uid: Uid, reason: &str) {
        if let Some(running) = self.running.lock().get(&uid) {
            running.handle.cancel(reason);
        }
    }

    /// Dispatches until `shutdown`, then lets what runs end, within the drain timeout.
    pub(crate) async fn run(self: &Arc<Self>, shutdown: CancellationToken) {
        // At once, whatever is being done when it comes.
        let stopping = self.stopping.clone();
        let told = shutdown.clone();
        let _stops = AbortOnDropHandle::new(tokio::spawn(async move {
            told.cancelled().await;
            stopping.cancel();
        }));
        let telling = self.follow_trigger(shutdown.clone());
        let keeping = CancellationToken::new();
        let keeper = tokio::spawn(self.clone().keep_leases(keeping.clone()));
        let mut polls = interval(self.options.poll_interval);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut measured: Option<Instant> = None;
        let mut looked_at = Instant::now();
        loop {
            let delay = self.until_next_due();
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = self.signal.wanted() => {}
                () = tokio::time::sleep(delay) => self.signal.note_backlog(),
                _ = polls.tick() => {
                    if self.options.poll_queue || looked_at.elapsed() >= SLOW_POLL {
                        looked_at = Instant::now();
                        self.signal.note_backlog();
                    }
                    self.take_over_expired().await;
                    self.fail_overdue().await;
                    if measured.is_none_or(|at| at.elapsed() >= MEASURE_INTERVAL) {
                        measured = Some(Instant::now());
                        self.measure_queue().await;
                    }
                }
            }
            if let Err(error) = self.dispatch().await {
                tracing::warn!(%error, "could not read the queue");
            }
        }
        drop(telling);
        self.stop().await;
        keeping.cancel();
        if let Err(error) = keeper.await {
            tracing::error!(%error, "the lease keeper failed");
        }
    }

    /// Listens to whoever else tells of requests that wait.
    fn follow_trigger(
        self: &Arc<Self>,
        shutdown: CancellationToken,
    ) -> Option<AbortOnDropHandle<()>> {
        let trigger = self.store.queue_trigger()?;
        let dispatcher = self.clone();
        let told = Arc::new(move |waiting: WaitingRequest| {
            let WaitingRequest { uid, action, tenant, not_before } = waiting;
            dispatcher.wake(uid, &action, &tenant, Some(not_before));
        });
        let (name, clock) = (self.name.clone(), self.environment.clock.clone());
        let following = trigger.follow(name, clock, told, shutdown);
        Some(AbortOnDropHandle::new(tokio::spawn(following)))
    }

    /// Lets what runs here end, and hands back what does not in time. What workers run is left to
    /// them: they connect elsewhere, or here again, and go on.
    async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.close();
        let deadline = self.now().plus(self.options.drain_timeout);
        let until = Instant::now() + self.options.drain_timeout;
        // Sync calls end with the streams of the workers that answer them, so those come last.
        self.actions.workers.drain(deadline, |worker| !worker.answers_calls());
        self.calls.close();
        if timeout_at(until, self.calls.wait()).await.is_err() {
            tracing::warn!("stopping with calls that workers have not answered in time");
        }
        self.actions.workers.drain(deadline, |_| true);
        self.leave_to_workers();
        if timeout_at(until, self.tasks.wait()).await.is_ok() {
            return;
        }
        for running in self.running.lock().values() {
            running.handle.release("the processor stops");
        }
        if timeout(RELEASE_TIMEOUT, self.tasks.wait()).await.is_err() {
            let left = self.running.lock().len();
            tracing::warn!(left, "stopping with attempts still running; their leases will run out");
        }
    }

    /// What workers run is theirs to bring along; what they have not been given is handed back.
    fn leave_to_workers(&self) {
        for running in self.running.lock().values().filter(|running| running.remote) {
            if running.attempt == 0 {
                running.handle.release("the processor stops");
            } else {
                running.handle.lose();
            }
        }
    }

    /// What this worker has brought along it may bring elsewhere.
    pub(crate) fn leave_to(&self, worker: &Worker) {
        let tasks = worker.tasks();
        let running = self.running.lock();
        for running in tasks.iter().filter_map(|task| running.get(&task.uid)) {
            running.handle.lose();
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// What holds up the end of workers' streams while one of them answers a call; `None` once they end.
    pub(crate) fn call(&self) -> Option<TaskTrackerToken> {
        let call = self.calls.token();
        (!self.is_stopping()).then_some(call)
    }

    /// Once the processor takes on nothing more.
    pub(crate) fn stopped(&self) -> WaitForCancellationFutureOwned {
        self.stopping.clone().cancelled_owned()
    }

    /// Room for one attempt of this action for this tenant, if there is.
    fn place(&self, action: &str, tenant: &str) -> Option<Place> {
        let declared = self.actions.find(action, tenant)?;
        let slot = self.slots.take(&declared, tenant)?;
        let runner = self.actions.runner(action, tenant)?;
        Some(Place { slot, declared, runner })
    }

    /// Claims a request and runs the attempt, in a task of its own.
    fn start(self: &Arc<Self>, uid: Uid, tenant: &str, place: Place) {
        let handle = Arc::new(AttemptHandle::default());
        let remote = matches!(place.runner, Runner::Remote(_));
        if !self.enter(
            uid,
            Running { attempt: 0, tenant: tenant.to_owned(), handle: handle.clone(), remote },
        ) {
            return;
        }
        let Place { slot, declared, runner } = place;
        let spec = declared.spec;
        let started = Started { dispatcher: self.clone(), uid, slot: Some(slot) };
        // Boxed, because tokio copies a task several times on its way to the heap.
        self.tasks.spawn(Box::pin(async move {
            started.dispatcher.claim_and_run(uid, spec, runner, handle).await;
        }));
    }

    /// Notes that an attempt of this request runs here, unless one does.
    fn enter(&self, uid: Uid, running: Running) -> bool {
        let mut all = self.running.lock();
        if all.contains_key(&uid) {
            return false;
        }
        all.insert(uid, running);
        true
    }

    async fn measure_queue(&self) {
        match self.store.queue_stats(self.now()).await {
            Ok(stats) => {
                self.metrics.queue_depth.set(i64::try_from(stats.queued).unwrap_or(i64::MAX));
                let age = stats.oldest_due.map_or(Duration::ZERO, |due| self.now().since(due));
                self.metrics.queue_age_ms.set(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
            }
            Err(error) => tracing::warn!(%error, "could not measure the queue"),
        }
    }

    fn note_due(&self, at: Timestamp) {
        let mut next_due = self.next_due.lock();
        if next_due.is_none_or(|known| at < known) {
            *next_due = Some(at);
            self.signal.wake();
        }
    }

    fn until_next_due(&self) -> Duration {
        // Without a known one the poll comes first anyway.
        let next_due = *self.next_due.lock();
        next_due.map_or(self.options.poll_interval * 2, |due| due.since(self.now()))
    }
}

/// A started request; gives its slot back and looks for the next one when it ends.
struct Started {
    dispatcher: Arc<Dispatcher>,
    uid: Uid,
    slot: Option<Slot>,
}

impl Drop for Started {
    fn drop(&mut self) {
        self.dispatcher.running.lock().remove(&self.uid);
        drop(self.slot.take());
        self.dispatcher.signal.room();
    }
}
