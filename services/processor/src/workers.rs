//! The workers that are connected, what they can run, and which of them gets a task.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use streamer_auth::Principal;
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
    by_id: Mutex<BTreeMap<String, Arc<Worker>>>,
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
        Self { by_id: Mutex::default(), changes, signal, lease, tenant_share }
    }

    /// The worker of this name, made anew unless it is known; its declarations are the latest.
    pub(crate) fn enter(&self, worker: Worker) -> Arc<Worker> {
        let worker = {
            let mut by_id = self.by_id.lock();
            match by_id.get(&worker.id) {
                Some(known) => {
                    known.renew(worker);
                    known.clone()
                }
                None => {
                    let worker = Arc::new(worker);
                    by_id.insert(worker.id.clone(), worker.clone());
                    worker
                }
            }
        };
        self.changed();
        worker
    }

    /// Gives the worker a stream: from now on it can be given tasks.
    pub(crate) fn connect(&self, worker: &Arc<Worker>, outbox: Outbox) -> (u64, Arc<StreamEnd>) {
        let connected = {
            let mut by_id = self.by_id.lock();
            // It was taken out if coming back took it longer than a lease.
            by_id.insert(worker.id.clone(), worker.clone());
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
        let by_id = self.by_id.lock();
        let mut names = BTreeMap::new();
        for worker in by_id.values().filter(|worker| worker.is_present()) {
            let free = worker.free() > 0;
            for spec in worker.actions() {
                *names.entry(spec.name.clone()).or_insert(false) |= free;
            }
        }
        names
    }

    /// What the workers that are there declare this action of this tenant to be.
    pub(crate) fn spec(&self, action: &str, tenant: &str) -> Option<(Key, Arc<ActionSpec>)> {
        let by_id = self.by_id.lock();
        let able = by_id.values().filter(|worker| worker.offers(action, tenant));
        let latest = able.max_by_key(|worker| worker.declared_at())?;
        Some((latest.key(action, tenant), latest.action(action)?))
    }

    /// How many of this action of this tenant can run at once.
    pub(crate) fn slots(&self, action: &str, tenant: &str) -> u32 {
        let by_id = self.by_id.lock();
        let able = by_id.values().filter(|worker| worker.offers(action, tenant));
        able.fold(0, |slots, worker| slots.saturating_add(worker.slots()))
    }

    /// Takes a slot of the worker that has the most of them free.
    pub(crate) fn seat(&self, action: &str, tenant: &str) -> Option<Seat> {
        let by_id = self.by_id.lock();
        let able = || by_id.values().filter(|worker| worker.offers(action, tenant));
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
        self.seat_of(worker, tenant)
    }

    fn seat_of(&self, worker: Arc<Worker>, tenant: &str) -> Seat {
        Seat { worker, tenant: tenant.to_owned(), signal: self.signal.clone() }
    }

    /// Takes their attempts from workers that have fallen silent, and forgets those that left.
    pub(crate) fn sweep(&self, now: Instant) {
        let silent: Vec<_> = {
            let by_id = self.by_id.lock();
            by_id.values().filter(|worker| worker.silent_for(now) >= self.lease).cloned().collect()
        };
        let mut changed = false;
        for worker in silent {
            if worker.fall_silent(self.lease) {
                tracing::warn!(worker = worker.id, "a worker was not heard of for too long");
                changed = true;
            }
            // It may be coming back at this moment.
            let mut by_id = self.by_id.lock();
            if !worker.has_stream() && worker.silent_for(now) >= self.lease {
                by_id.remove(&worker.id);
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
        self.by_id.lock().values().cloned().collect()
    }
}

/// Which actions of which tenants a token allows: permissions `worker:<action>` (of the token's own
/// tenant), `worker:<action>@<tenant>` and `worker:<action>@*`; `*` stands for every action.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Grants {
    /// Tenants by action; `*` for all.
    by_action: HashMap<String, Vec<String>>,
}

impl Grants {
    pub(crate) fn of(principal: &Principal) -> Self {
        let mut by_action: HashMap<String, Vec<String>> = HashMap::new();
        for permission in &principal.permissions {
            // `*` is everything, in the token's own tenant.
            let grant = if permission == "*" {
                "*"
            } else {
                let Some(grant) = permission.strip_prefix("worker:") else { continue };
                grant
            };
            let (action, tenant) = grant.split_once('@').unwrap_or((grant, &principal.tenant));
            by_action.entry(action.to_owned()).or_default().push(tenant.to_owned());
        }
        Self { by_action }
    }

    /// Whether it may run this action, for whomever.
    pub(crate) fn names(&self, action: &str) -> bool {
        self.by_action.contains_key(action) || self.by_action.contains_key("*")
    }

    /// For which tenants it may run this action; `None` for all of them.
    pub(crate) fn tenants(&self, action: &str) -> Option<BTreeSet<&str>> {
        let granted = [action, "*"].into_iter().filter_map(|name| self.by_action.get(name));
        let granted: BTreeSet<&str> = granted.flatten().map(String::as_str).collect();
        (!granted.contains("*")).then_some(granted)
    }

    /// Whether it may run this action for this tenant.
    pub(crate) fn allow(&self, action: &str, tenant: &str) -> bool {
        [action, "*"]
            .into_iter()
            .filter_map(|name| self.by_action.get(name))
            .flatten()
            .any(|granted| granted == "*" || granted == tenant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grants(permissions: &[&str]) -> Grants {
        Grants::of(&Principal {
            tenant: "acme".into(),
            user: "worker".into(),
            permissions: permissions.iter().map(ToString::to_string).collect(),
            expires_at: Timestamp::default(),
        })
    }

    #[test]
    fn a_token_allows_named_actions_of_named_tenants_only() {
        let some = grants(&["worker:report", "worker:resize@other", "requests:read"]);
        assert!(some.allow("report", "acme") && !some.allow("report", "other"));
        assert!(some.allow("resize", "other") && !some.allow("resize", "acme"));
        assert!(!some.names("echo") && !some.allow("echo", "acme"));
    }

    #[test]
    fn stars_stand_for_all() {
        assert!(grants(&["worker:*"]).allow("any", "acme"));
        assert!(!grants(&["worker:*"]).allow("any", "other"));
        assert!(grants(&["worker:*@*"]).allow("any", "other"));
        assert!(grants(&["worker:report@*"]).allow("report", "other"));
        assert!(grants(&["*"]).allow("any", "acme") && !grants(&["*"]).allow("any", "other"));
        assert!(!grants(&[]).names("any"));
    }
}
