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
    concurrency_limiter::percent_of,
    wakeup::Wakeup,
    worker_session::{Outbox, StreamEnd, WorkerSession},
};

/// Identifies a declaration: an action, for one tenant or for all. Declarations of different
/// tenants are independent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ActionKey {
    pub(crate) action: String,
    /// `None` for all tenants.
    pub(crate) tenant: Option<String>,
}

/// All workers that have a stream, or had one recently.
pub(crate) struct WorkerPool {
    by_identity: Mutex<HashMap<String, Arc<WorkerSession>>>,
    /// Number of changes of the offered actions and slots.
    changes: watch::Sender<u64>,
    wakeup: Arc<Wakeup>,
    /// A worker that is silent for this long loses its attempts.
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

    /// Registers a worker, or renews the one of the same identity with the new declarations.
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

    /// Supersedes workers of the same principal and name: one whose first `welcome` was lost, or a
    /// program that restarted under its old name.
    pub(crate) fn supersede(&self, newer: &WorkerSession) {
        let same =
            |older: &WorkerSession| older.id == newer.id && older.principal == newer.principal;
        // A delayed `hello` does not supersede a worker that sent a later one.
        let is_older = |older: &WorkerSession| older.declared_at() < newer.declared_at();
        for older in self.sessions().into_iter().filter(|older| same(older) && is_older(older)) {
            // It stays registered until it is swept: an attempt may be about to be assigned to it.
            older.supersede();
        }
    }

    /// Attaches a stream to the worker; from now on it receives tasks.
    pub(crate) fn connect(
        &self,
        worker: &Arc<WorkerSession>,
        outbox: Outbox,
    ) -> (u64, Arc<StreamEnd>) {
        let connected = {
            let mut by_identity = self.by_identity.lock();
            // It was removed if reconnecting took longer than a lease.
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

    /// Returns the declarations of connected workers, and how many workers offer each.
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

    /// Returns the names of offered actions, each with whether a worker has a free slot for it.
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

    /// Returns the spec that connected workers declare under this key.
    pub(crate) fn spec(&self, key: &ActionKey) -> Option<Arc<ActionSpec>> {
        let by_identity = self.by_identity.lock();
        let able = by_identity.values().filter(|worker| worker.declares(key));
        able.max_by_key(|worker| worker.declared_at())?.action(&key.action)
    }

    /// Returns how many attempts of the declaration under this key can run concurrently.
    pub(crate) fn slots(&self, key: &ActionKey) -> u32 {
        let by_identity = self.by_identity.lock();
        let able = by_identity.values().filter(|worker| worker.declares(key));
        able.fold(0, |slots, worker| slots.saturating_add(worker.slots()))
    }

    /// Acquires a slot for this tenant, from the worker with the most free slots. Requests that
    /// were admitted by a declaration go only to workers that declare the action under the same
    /// key: others may require other permissions and payloads.
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

    /// Acquires a slot of this worker for an attempt that it runs already.
    pub(crate) fn acquire_slot_for_running(
        &self,
        worker: Arc<WorkerSession>,
        tenant: &str,
    ) -> WorkerSlotPermit {
        worker.force_acquire_slot(tenant);
        // A sweep during the reconnection may have removed it; then no sweep would find the
        // attempt.
        let identity = worker.assigned.identity.clone();
        self.by_identity.lock().entry(identity).or_insert_with(|| worker.clone());
        self.slot_permit(worker, tenant)
    }

    fn slot_permit(&self, worker: Arc<WorkerSession>, tenant: &str) -> WorkerSlotPermit {
        WorkerSlotPermit { worker, tenant: tenant.to_owned(), wakeup: self.wakeup.clone() }
    }

    /// Revokes the attempts of silent workers, and removes workers that left.
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
                    "worker silent for a lease; its attempts are revoked"
                );
                changed = true;
            }
            // It may be reconnecting at this moment.
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

    /// Asks these workers to reconnect to another processor, and ends their streams.
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
