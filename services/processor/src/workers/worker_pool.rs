//! Registry of connected workers: the actions that they offer, and the assignment of slots.

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
    declaration::ActionKey,
    scheduler::{concurrency_limiter::percent_of, wakeup::Wakeup},
    workers::worker_session::{Outbox, StreamEnd, WorkerSession},
};

/// Registry of all workers that have a stream, or recently had one.
pub(crate) struct WorkerPool {
    by_identity: Mutex<HashMap<String, Arc<WorkerSession>>>,
    /// Number of changes to the offered actions and slots.
    changes: watch::Sender<u64>,
    wakeup: Arc<Wakeup>,
    /// Time without a message after which a worker loses its attempts.
    lease: Duration,
    /// Maximum percentage of all slots that one tenant uses.
    tenant_share: u32,
}

/// Permit for one slot of a worker, released when dropped.
pub(crate) struct WorkerSlotPermit {
    pub(crate) worker: Arc<WorkerSession>,
    tenant: String,
    wakeup: Arc<Wakeup>,
}

impl Drop for WorkerSlotPermit {
    fn drop(&mut self) {
        self.worker.release_slot(&self.tenant);
        self.wakeup.slot_freed();
    }
}

impl WorkerPool {
    pub(crate) fn new(wakeup: Arc<Wakeup>, lease: Duration, tenant_share: u32) -> Self {
        let changes = watch::Sender::new(0);
        Self { by_identity: Mutex::default(), changes, wakeup, lease, tenant_share }
    }

    /// Registers a worker, or updates the session with the same identity to the new declarations.
    pub(crate) fn register(&self, worker: WorkerSession) -> Arc<WorkerSession> {
        let worker = {
            let mut by_identity = self.by_identity.lock();
            match by_identity.get(&worker.assigned.identity) {
                Some(session) => {
                    session.renew(worker);
                    session.clone()
                }
                None => {
                    let worker = Arc::new(worker);
                    by_identity.insert(worker.assigned.identity.clone(), worker.clone());
                    worker
                }
            }
        };
        self.notify_changed();
        worker
    }

    /// Supersedes workers with the same principal and ID: one whose first `welcome` was lost, or a program that
    /// restarted with the same ID.
    pub(crate) fn supersede(&self, newer: &WorkerSession) {
        let same =
            |older: &WorkerSession| older.id == newer.id && older.principal == newer.principal;
        // A delayed `hello` does not supersede a worker that sent a later one.
        let is_older = |older: &WorkerSession| older.declared_at() < newer.declared_at();
        for older in self.sessions().into_iter().filter(|older| same(older) && is_older(older)) {
            // The worker stays registered until the next sweep, because an attempt may be about to be assigned to it.
            older.supersede();
        }
    }

    /// Attaches a stream to the worker, on which it then receives tasks. Returns the stream's number and the signal of
    /// its end.
    pub(crate) fn connect(
        &self,
        worker: &Arc<WorkerSession>,
        outbox: Outbox,
    ) -> (u64, Arc<StreamEnd>) {
        let connected = {
            let mut by_identity = self.by_identity.lock();
            // The worker was removed if reconnecting took longer than a lease duration.
            by_identity.insert(worker.assigned.identity.clone(), worker.clone());
            worker.connect(outbox)
        };
        self.notify_changed();
        connected
    }

    /// Notifies routers and the dispatcher that offered actions or slots have changed.
    pub(crate) fn notify_changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
        self.wakeup.request_scan();
    }

    pub(crate) fn subscribe_changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Returns the declarations of connected workers, each with the number of workers that offer it.
    pub(crate) fn declarations(&self) -> BTreeMap<ActionKey, (Arc<ActionSpec>, u32)> {
        let mut available: Vec<_> = self.sessions();
        available.retain(|worker| worker.is_available());
        // The latest declaration takes precedence.
        available.sort_by_key(|worker| worker.declared_at());
        let mut actions = BTreeMap::new();
        for (key, spec) in available.iter().flat_map(|worker| worker.declarations()) {
            let entry = actions.entry(key).or_insert_with(|| (spec.clone(), 0));
            *entry = (spec, entry.1 + 1);
        }
        actions
    }

    /// Returns the names of offered actions, and for each whether a worker has a free slot for it.
    pub(crate) fn offered_actions(&self) -> BTreeMap<String, bool> {
        let by_identity = self.by_identity.lock();
        let mut names = BTreeMap::new();
        for worker in by_identity.values().filter(|worker| worker.is_available()) {
            let free = worker.free_slots() > 0;
            for spec in worker.actions() {
                *names.entry(spec.name.clone()).or_insert(false) |= free;
            }
        }
        names
    }

    /// Returns the latest spec that a connected worker declares under the given key.
    pub(crate) fn spec(&self, key: &ActionKey) -> Option<Arc<ActionSpec>> {
        let by_identity = self.by_identity.lock();
        let able = by_identity.values().filter(|worker| worker.declares(key));
        able.max_by_key(|worker| worker.declared_at())?.action(&key.action)
    }

    /// Returns the number of attempts that can run concurrently under the given key.
    pub(crate) fn slots(&self, key: &ActionKey) -> u32 {
        let by_identity = self.by_identity.lock();
        let able = by_identity.values().filter(|worker| worker.declares(key));
        able.fold(0, |slots, worker| slots.saturating_add(worker.slots()))
    }

    /// Acquires a slot for the given tenant, from the worker with the most free slots. Requests that were admitted by a
    /// declaration are sent only to workers that declare the action under the same key, because other workers may
    /// require different permissions and payloads.
    pub(crate) fn acquire_slot(&self, key: &ActionKey, tenant: &str) -> Option<WorkerSlotPermit> {
        let by_identity = self.by_identity.lock();
        let able = || by_identity.values().filter(|worker| worker.declares(key));
        let (slots, used) = able().fold((0_u32, 0), |(slots, used), worker| {
            (slots.saturating_add(worker.slots()), used + worker.slots_used_by(tenant))
        });
        if used >= percent_of(slots, self.tenant_share) {
            return None;
        }
        let worker = able().max_by_key(|worker| worker.free_slots())?;
        worker.try_acquire_slot(tenant).then(|| self.slot_permit(worker.clone(), tenant))
    }

    /// Acquires a slot of the given worker for an attempt that it already runs.
    pub(crate) fn acquire_slot_for_running(
        &self,
        worker: Arc<WorkerSession>,
        tenant: &str,
    ) -> WorkerSlotPermit {
        worker.force_acquire_slot(tenant);
        // A sweep may have removed the worker while it reconnected; later sweeps would then not find the attempt.
        let identity = worker.assigned.identity.clone();
        self.by_identity.lock().entry(identity).or_insert_with(|| worker.clone());
        self.slot_permit(worker, tenant)
    }

    fn slot_permit(&self, worker: Arc<WorkerSession>, tenant: &str) -> WorkerSlotPermit {
        WorkerSlotPermit { worker, tenant: tenant.to_owned(), wakeup: self.wakeup.clone() }
    }

    /// Revokes the attempts of silent workers, and removes those that have no stream.
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
            if worker.mark_silent(self.lease) {
                tracing::warn!(
                    worker = worker.id,
                    "worker was silent for a lease duration, revoking its attempts"
                );
                changed = true;
            }
            // The worker may have reconnected in the meantime.
            let mut by_identity = self.by_identity.lock();
            if !worker.has_stream() && worker.silent_for(now) >= self.lease {
                by_identity.remove(&worker.assigned.identity);
                changed = true;
            }
        }
        if changed {
            self.notify_changed();
        }
    }

    /// Asks the workers that `select` accepts to reconnect to another processor, and ends their streams.
    pub(crate) fn drain(&self, deadline: Timestamp, select: impl Fn(&WorkerSession) -> bool) {
        for worker in self.sessions().into_iter().filter(|worker| select(worker)) {
            let deadline = Some(timestamp(deadline.as_millis()));
            worker.send(Message::Drain(Drain { deadline }));
            worker.end_stream(Status::unavailable("the processor is shutting down"));
        }
    }

    pub(crate) fn sessions(&self) -> Vec<Arc<WorkerSession>> {
        self.by_identity.lock().values().cloned().collect()
    }
}
