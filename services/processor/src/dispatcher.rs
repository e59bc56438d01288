//! Finds requests that may start, and starts them while there is room.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{Clock, RetryPolicy, Timestamp, Uid};
use streamer_handler::{Handlers, RequestHistory};
use streamer_proto::common::v1::event::Kind;
use streamer_store::{
    Append, Claim, ClaimOutcome, Claimed, Lease, RequestRecord, Store, StoreError, Writer,
};
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use crate::{
    ProcessorOptions,
    attempt::{self, AttemptHandle, Environment, Finished},
    log_client::LogClient,
    metrics::ProcessorMetrics,
    outcome,
    slots::{Slot, Slots},
    takeover,
};

/// Requests taken from the queue's index at a time.
const PAGE: usize = 256;

/// What a dispatcher is made of.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) history: Arc<dyn RequestHistory>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) handlers: Handlers,
    pub(crate) log: LogClient,
    pub(crate) metrics: ProcessorMetrics,
    pub(crate) options: ProcessorOptions,
}

pub(crate) struct Dispatcher {
    /// The holder's name in leases.
    name: String,
    store: Arc<dyn Store>,
    handlers: Handlers,
    environment: Environment,
    metrics: ProcessorMetrics,
    options: ProcessorOptions,
    slots: Arc<Slots>,
    running: Mutex<HashMap<Uid, Running>>,
    /// There may be more in the queue than hints told of: hints wait their turn.
    backlog: AtomicBool,
    stopping: AtomicBool,
    /// Looks at the queue again.
    look: Notify,
    /// When the earliest known delayed request becomes due.
    next_due: Mutex<Option<Timestamp>>,
    tasks: TaskTracker,
}

struct Running {
    attempt: u32,
    handle: Arc<AttemptHandle>,
}

impl Dispatcher {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { name, store, history, clock, handlers, log, metrics, options } = parts;
        let slots = Arc::new(Slots::new(&handlers, options.max_concurrent_attempts));
        Self {
            name,
            store,
            handlers,
            environment: Environment {
                clock,
                log,
                history,
                limits: options.limits,
                cancel_grace: options.cancel_grace,
            },
            metrics,
            options,
            slots,
            running: Mutex::default(),
            // What an earlier process left is looked for first.
            backlog: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            look: Notify::new(),
            next_due: Mutex::default(),
            tasks: TaskTracker::new(),
        }
    }

    fn now(&self) -> Timestamp {
        self.environment.clock.now()
    }

    /// A hint that a request waits: starts it when nothing waits before it and there is room.
    pub(crate) fn wake(self: &Arc<Self>, uid: Uid, action: &str, not_before: Option<Timestamp>) {
        if let Some(not_before) = not_before
            && not_before > self.now()
        {
            self.note_due(not_before);
            return;
        }
        if self.handlers.get(action).is_none() || self.stopping.load(Ordering::SeqCst) {
            return;
        }
        if !self.backlog.load(Ordering::SeqCst)
            && let Some(slot) = self.slots.take(action)
        {
            self.start(uid, slot);
        } else {
            self.backlog.store(true, Ordering::SeqCst);
            self.look.notify_one();
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
        let keeping = CancellationToken::new();
        let keeper = tokio::spawn(self.clone().keep_leases(keeping.clone()));
        let mut polls = interval(self.options.poll_interval);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let delay = self.until_next_due();
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = self.look.notified() => {}
                () = tokio::time::sleep(delay) => self.backlog.store(true, Ordering::SeqCst),
                _ = polls.tick() => {
                    self.backlog.store(true, Ordering::SeqCst);
                    self.take_over_expired().await;
                    self.measure_queue().await;
                }
            }
            if let Err(error) = self.dispatch().await {
                tracing::warn!(%error, "could not read the queue");
            }
        }
        self.stopping.store(true, Ordering::SeqCst);
        self.tasks.close();
        if timeout(self.options.drain_timeout, self.tasks.wait()).await.is_err() {
            let left = self.running.lock().len();
            tracing::warn!(left, "stopping with attempts still running; their leases will run out");
        }
        keeping.cancel();
        if let Err(error) = keeper.await {
            tracing::error!(%error, "the lease keeper failed");
        }
    }

    /// Starts what is due while there is room.
    async fn dispatch(self: &Arc<Self>) -> Result<(), StoreError> {
        while self.backlog.swap(false, Ordering::SeqCst) {
            let now = self.now();
            let actions: Vec<String> = self
                .handlers
                .specs()
                .filter(|spec| self.slots.has_room(&spec.name))
                .map(|spec| spec.name.clone())
                .collect();
            if actions.is_empty() {
                // A slot that is given back looks again.
                self.backlog.store(true, Ordering::SeqCst);
                return Ok(());
            }
            // The index still shows what is being claimed; ask for as many more.
            let claiming = self.claiming();
            let wanted = self.slots.free().clamp(1, PAGE) + claiming;
            let due = match self.store.due_requests(actions, now, wanted).await {
                Ok(due) => due,
                Err(error) => {
                    self.backlog.store(true, Ordering::SeqCst);
                    return Err(error);
                }
            };
            let more = due.len() == wanted;
            let mut left_out = false;
            let mut started = 0;
            for request in due {
                if self.running.lock().contains_key(&request.uid) {
                    continue;
                }
                match self.slots.take(&request.action) {
                    Some(slot) => {
                        self.start(request.uid, slot);
                        started += 1;
                    }
                    None => left_out = true,
                }
            }
            if more || left_out {
                self.backlog.store(true, Ordering::SeqCst);
            }
            if started == 0 {
                break;
            }
        }
        *self.next_due.lock() = self.store.next_due(self.now()).await?;
        Ok(())
    }

    /// How many requests are started whose claim is not durable yet.
    fn claiming(&self) -> usize {
        self.running.lock().values().filter(|running| running.attempt == 0).count()
    }

    /// Claims a request and runs the attempt, in a task of its own.
    fn start(self: &Arc<Self>, uid: Uid, slot: Slot) {
        let handle = Arc::new(AttemptHandle::default());
        {
            let mut running = self.running.lock();
            if running.contains_key(&uid) {
                return;
            }
            running.insert(uid, Running { attempt: 0, handle: handle.clone() });
        }
        let dispatcher = self.clone();
        self.tasks.spawn(async move {
            let _started = Started { dispatcher: &dispatcher, uid, slot: Some(slot) };
            dispatcher.claim_and_run(uid, handle).await;
        });
    }

    async fn claim_and_run(&self, uid: Uid, handle: Arc<AttemptHandle>) {
        let now = self.now();
        let claim = Claim {
            uid,
            holder: self.name.clone(),
            now,
            lease_until: now.plus(self.options.lease),
        };
        match self.store.claim(claim).await {
            Ok(ClaimOutcome::Claimed(claimed)) => {
                if let Some(running) = self.running.lock().get_mut(&uid) {
                    running.attempt = claimed.record.attempt;
                }
                self.metrics
                    .wait_seconds
                    .observe(now.since(claimed.record.not_before).as_secs_f64());
                let span = tracing::info_span!(
                    "attempt",
                    request_id = claimed.record.request_id(),
                    uid = %uid,
                    tenant_id = claimed.record.owner.tenant,
                    action = claimed.record.action,
                    attempt = claimed.record.attempt,
                );
                self.run_attempt(*claimed, handle).instrument(span).await;
            }
            Ok(ClaimOutcome::DeadlinePassed(record)) => self.fail_unrun(&record).await,
            Ok(ClaimOutcome::NotClaimable) => {}
            Err(error) => {
                tracing::warn!(%error, %uid, "could not claim; it will be found again");
                self.backlog.store(true, Ordering::SeqCst);
            }
        }
    }

    async fn run_attempt(&self, claimed: Claimed, handle: Arc<AttemptHandle>) {
        let Some((spec, handler)) = self.handlers.get(&claimed.record.action) else {
            // Only actions with a handler are started.
            return;
        };
        if let Some(reason) = &claimed.record.cancel_reason {
            handle.cancel(reason);
        }
        let began = Instant::now();
        self.metrics.running.inc();
        let running = attempt::run(
            &self.environment,
            claimed,
            handler.clone(),
            spec.retry,
            spec.start_to_close,
            handle,
        );
        let finished = Box::pin(running).await;
        self.metrics.running.dec();
        self.metrics.run_seconds.observe(began.elapsed().as_secs_f64());
        match finished {
            Finished::Concluded(kind, retry_at) => {
                self.count(&kind);
                if let Some(retry_at) = retry_at {
                    self.note_due(retry_at);
                }
            }
            Finished::Lost => {
                self.metrics.lost.inc();
            }
        }
    }

    fn count(&self, kind: &Kind) {
        match kind {
            Kind::Succeeded(_) => self.metrics.succeeded.inc(),
            Kind::Failed(_) => self.metrics.failed.inc(),
            Kind::Cancelled(_) => self.metrics.cancelled.inc(),
            Kind::Retrying(_) => self.metrics.retried.inc(),
            Kind::Accepted(_) | Kind::Started(_) | Kind::Progress(_) | Kind::Output(_) => return,
        };
    }

    /// Ends a request whose deadline passed while it waited.
    async fn fail_unrun(&self, record: &RequestRecord) {
        let now = self.now();
        let kind = outcome::deadline_passed(record.deadline.unwrap_or(now));
        self.conclude(record, Writer::Queued(record.attempt), kind, None).await;
    }

    /// Appends the last event of an attempt that nobody runs, and delivers it.
    async fn conclude(
        &self,
        record: &RequestRecord,
        writer: Writer,
        kind: Kind,
        retry_at: Option<Timestamp>,
    ) {
        let now = self.now();
        let event = outcome::event(record.last_seq + 1, record.attempt, now, kind.clone());
        let append = Append {
            uid: record.uid,
            writer,
            events: vec![event.clone()],
            checkpoint: None,
            retry_at,
            now,
        };
        match self.store.append(append).await {
            Ok(streamer_store::Appended::Applied { .. }) => {
                self.count(&kind);
                self.environment.log.announce(record.uid, vec![event]).await;
                if let Some(retry_at) = retry_at {
                    self.note_due(retry_at);
                }
            }
            // Somebody else was first.
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, uid = %record.uid, "could not end an attempt; it will be found again");
            }
        }
    }

    /// Ends attempts whose holder is gone.
    async fn take_over_expired(&self) {
        let expired = match self.store.expired_leases(self.now(), PAGE).await {
            Ok(expired) => expired,
            Err(error) => {
                tracing::warn!(%error, "could not look for expired leases");
                return;
            }
        };
        for record in expired {
            let policy = self
                .handlers
                .get(&record.action)
                .map_or_else(RetryPolicy::default, |(spec, _)| spec.retry);
            match takeover::conclude(&*self.store, &record, policy, self.now()).await {
                Ok(ending) => {
                    self.metrics.lease_expiries.inc();
                    let writer = Writer::ExpiredLease(record.attempt);
                    self.conclude(&record, writer, ending.kind, ending.retry_at).await;
                }
                Err(error) => {
                    tracing::warn!(%error, uid = %record.uid, "could not take over an attempt");
                }
            }
        }
    }

    /// Prolongs the leases of everything that runs here, one timer for all.
    async fn keep_leases(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = interval(self.options.lease / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let leases: Vec<Lease> = {
                let running = self.running.lock();
                let claimed = running.iter().filter(|(_, running)| running.attempt > 0);
                claimed
                    .map(|(uid, running)| Lease { uid: *uid, attempt: running.attempt })
                    .collect()
            };
            if leases.is_empty() {
                continue;
            }
            let until = self.now().plus(self.options.lease);
            match self.store.renew_leases(self.name.clone(), leases, until).await {
                Ok(renewed) => renewed.into_iter().for_each(|renewed| self.note_renewal(&renewed)),
                Err(error) => tracing::warn!(%error, "could not renew leases"),
            }
        }
    }

    fn note_renewal(&self, renewed: &streamer_store::Renewed) {
        let running = self.running.lock();
        let Some(running) = running.get(&renewed.lease.uid) else { return };
        if running.attempt != renewed.lease.attempt {
            return;
        }
        if let Some(reason) = &renewed.cancel_reason {
            running.handle.cancel(reason);
        }
        // An attempt that has just ended has no lease either, and takes no notice of this.
        if !renewed.held {
            running.handle.lose();
        }
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
            self.look.notify_one();
        }
    }

    fn until_next_due(&self) -> Duration {
        // Without a known one the poll comes first anyway.
        let next_due = *self.next_due.lock();
        next_due.map_or(self.options.poll_interval * 2, |due| due.since(self.now()))
    }
}

/// A started request; gives its slot back and looks for the next one when it ends.
struct Started<'a> {
    dispatcher: &'a Dispatcher,
    uid: Uid,
    slot: Option<Slot>,
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        self.dispatcher.running.lock().remove(&self.uid);
        drop(self.slot.take());
        if self.dispatcher.backlog.load(Ordering::SeqCst) {
            self.dispatcher.look.notify_one();
        }
    }
}
