//! The workers that are connected, what they can run, and which of them gets a task.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{ActionSpec, Timestamp};
use streamer_proto::{
    processor::v1::{Drain, work_response::Message},
    timestamp,
};
use tokio::{sync::watch, time::Instant};
use tonic::Status;

use crate::{
    signal::Signal,
    slots::share,
    worker::{Outbox, StreamEnd, Worker},
};

/// Names a declaration: an action, for one tenant or for all. Declarations of different tenants
/// never meet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) action: String,
    /// `None` for all.
    pub(crate) tenant: Option<String>,
}

/// Every worker that holds a stream, or held one lately.
pub(crate) struct Workers {
    by_identity: Mutex<HashMap<String, Arc<Worker>>>,
    /// Counts changes of what is offered.
    changes: watch::Sender<u64>,
    signal: Arc<Signal>,
    /// A worker that was not heard of for so long loses its attempts.
    lease: Duration,
    /// Percent of all slots that one tenant gets at most.
    tenant_share: u32,
}

/// One slot of one worker, given back when dropped.
pub(crate) struct Seat {
    pub(crate) worker: Arc<Worker>,
    tenant: String,
    signal: Arc<Signal>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.worker.give_back(&self.tenant);
        self.signal.room();
    }
}

impl Workers {
    pub(crate) fn new(signal: Arc<Signal>, lease: Duration, tenant_share: u32) -> Self {
        let changes = watch::Sender::new(0);
        Self { by_identity: Mutex::default(), changes, signal, lease, tenant_share }
    }

    /// The worker of this identity, made anew unless it is known; its declarations are the latest.
    pub(crate) fn enter(&self, worker: Worker) -> Arc<Worker> {
        let worker = {
            let mut by_identity = self.by_identity.lock();
            match by_identity.get(&worker.assigned.identity) {
                Some(known) => {
                    known.renew(worker);
                    known.clone()
                }
                None => {
                    let worker = Arc::new(worker);
                    by_identity.insert(worker.assigned.identity.clone(), worker.clone());
                    worker
                }
            }
        };
        self.changed();
        worker
    }

    /// Takes the place of a worker of the same principal and name: one whose first `welcome` got lost,
    /// or a program that was started again under its old name.
    pub(crate) fn supersede(&self, newer: &Worker) {
        let same = |older: &Worker| older.id == newer.id && older.principal == newer.principal;
        // A `hello` that was held up does not take the place of one that came after it.
        let is_older = |older: &Worker| older.declared_at() < newer.declared_at();
        for older in self.all().into_iter().filter(|older| same(older) && is_older(older)) {
            // It stays here until it is swept: an attempt may be on its way to it.
            older.supersede();
        }
    }

    /// Gives the worker a stream: from now on it can be given tasks.
    pub(crate) fn connect(&self, worker: &Arc<Worker>, outbox: Outbox) -> (u64, Arc<StreamEnd>) {
        let connected = {
            let mut by_identity = self.by_identity.lock();
            // It was taken out if coming back took it longer than a lease.
            by_identity.insert(worker.assigned.identity.clone(), worker.clone());
            worker.connect(outbox)
        };
        self.changed();
        connected
    }

    /// What is offered, or how much of it, has changed.
    pub(crate) fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
        self.signal.look_at_all();
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What workers declare, tenant by tenant, and how many offer it now.
    pub(crate) fn declared(&self) -> BTreeMap<Key, (Arc<ActionSpec>, u32)> {
        let mut present: Vec<_> = self.all();
        present.retain(|worker| worker.is_present());
        // The latest declaration counts.
        present.sort_by_key(|worker| worker.declared_at());
        let mut actions = BTreeMap::new();
        for (key, spec) in present.iter().flat_map(|worker| worker.declared()) {
            let entry = actions.entry(key).or_insert_with(|| (spec.clone(), 0));
            *entry = (spec, entry.1 + 1);
        }
        actions
    }

    /// The names of what is offered, each with whether somebody has a free slot for it.
    pub(crate) fn names(&self) -> BTreeMap<String, bool> {
        let by_identity = self.by_identity.lock();
        let mut names = BTreeMap::new();
        for worker in by_identity.values().filter(|worker| worker.is_present()) {
            let free = worker.free() > 0;
            for spec in worker.actions() {
                *names.entry(spec.name.clone()).or_insert(false) |= free;
            }
        }
        names
    }

    /// What the workers that are there declare under this key.
    pub(crate) fn spec(&self, key: &Key) -> Option<Arc<ActionSpec>> {
        let by_identity = self.by_identity.lock();
        let able = by_identity.values().filter(|worker| worker.declares(key));
        able.max_by_key(|worker| worker.declared_at())?.action(&key.action)
    }

    /// How many of what is declared under this key can run at once.
    pub(crate) fn slots(&self, key: &Key) -> u32 {
        let by_identity = self.by_identity.lock();
        let able = by_identity.values().filter(|worker| worker.declares(key));
        able.fold(0, |slots, worker| slots.saturating_add(worker.slots()))
    }

    /// Takes a slot for this tenant, of the worker that has the most of them free. Only workers that
    /// declare the action under this key get what was admitted by that declaration: others may ask for
    /// permissions and payloads of their own.
    pub(crate) fn seat(&self, key: &Key, tenant: &str) -> Option<Seat> {
        let by_identity = self.by_identity.lock();
        let able = || by_identity.values().filter(|worker| worker.declares(key));
        let (slots, taken) = able().fold((0_u32, 0), |(slots, taken), worker| {
            (slots.saturating_add(worker.slots()), taken + worker.taken_by(tenant))
        });
        if taken >= share(slots, self.tenant_share) {
            return None;
        }
        let worker = able().max_by_key(|worker| worker.free())?;
        worker.take(tenant).then(|| self.seat_of(worker.clone(), tenant))
    }

    /// A slot of this worker for an attempt that runs in it already.
    pub(crate) fn seat_of_running(&self, worker: Arc<Worker>, tenant: &str) -> Seat {
        worker.take_anyway(tenant);
        // It may have been swept while it was coming back; then no sweep would find the attempt.
        let identity = worker.assigned.identity.clone();
        self.by_identity.lock().entry(identity).or_insert_with(|| worker.clone());
        self.seat_of(worker, tenant)
    }

    fn seat_of(&self, worker: Arc<Worker>, tenant: &str) -> Seat {
        Seat { worker, tenant: tenant.to_owned(), signal: self.signal.clone() }
    }

    /// Takes their attempts from workers that have fallen silent, and forgets those that left.
    pub(crate) fn sweep(&self, now: Instant) {
        let silent: Vec<_> = {
            let by_identity = self.by_identity.lock();
            by_identity
                .values()
                .filter(|worker| worker.silent_for(now) >= self.lease)
                .cloned()
                .collect()
        };
        let mut changed = false;
        for worker in silent {
            if worker.fall_silent(self.lease) {
                tracing::warn!(worker = worker.id, "a worker was not heard of for too long");
                changed = true;
            }
            // It may be coming back at this moment.
            let mut by_identity = self.by_identity.lock();
            if !worker.has_stream() && worker.silent_for(now) >= self.lease {
                by_identity.remove(&worker.assigned.identity);
                changed = true;
            }
        }
        if changed {
            self.changed();
        }
    }

    /// The processor stops: these workers go elsewhere, and take along what they run.
    pub(crate) fn drain(&self, deadline: Timestamp, now: impl Fn(&Worker) -> bool) {
        for worker in self.all().into_iter().filter(|worker| now(worker)) {
            let deadline = Some(timestamp(deadline.as_millis()));
            worker.send(Message::Drain(Drain { deadline }));
            worker.end_stream(Status::unavailable("the processor stops"));
        }
    }

    pub(crate) fn all(&self) -> Vec<Arc<Worker>> {
        self.by_identity.lock().values().cloned().collect()
    }
}
