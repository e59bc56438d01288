//! Session of one worker: its slots, its stream, and the attempts that it runs.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{ActionSpec, AttemptNumber, Uid};
use streamer_proto::processor::v1::{WorkResponse, work_response::Message};
use streamer_store::{AssignedWorker, Owner};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    declaration::ActionKey,
    workers::{grants::Grants, remote_task::RemoteTask},
};

/// Maximum number of slots of one worker.
pub(crate) const MAX_SLOTS: i64 = 10_000;

/// Sender for the messages on a worker's stream.
pub(crate) type Outbox = mpsc::Sender<Result<WorkResponse, Status>>;

pub(crate) struct WorkerSession {
    /// ID that the worker chose, for logs.
    pub(crate) id: String,
    /// Principal of the token that opened the worker's streams.
    pub(crate) principal: Owner,
    /// Identity of the worker, and the name shown to the owners of the requests that it runs.
    pub(crate) assigned: AssignedWorker,
    state: Mutex<State>,
}

struct State {
    actions: BTreeMap<String, Arc<ActionSpec>>,
    declared_at: Instant,
    grants: Grants,
    slots: u32,
    used_slots: HashMap<String, u32>,
    stream: Option<Stream>,
    streams: u64,
    last_seen: Instant,
    /// Whether no message has arrived for a lease duration.
    silent: bool,
    tasks: HashMap<Uid, Arc<RemoteTask>>,
}

struct Stream {
    number: u64,
    outbox: Outbox,
    end: Arc<StreamEnd>,
}

/// Signal that a stream has ended, with the status.
#[derive(Default)]
pub(crate) struct StreamEnd {
    ended: CancellationToken,
    status: Mutex<Option<Status>>,
}

impl StreamEnd {
    fn end(&self, status: Status) {
        self.status.lock().get_or_insert(status);
        self.ended.cancel();
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Waits until the stream has ended; returns the status.
    pub(crate) async fn ended(&self) -> Status {
        self.ended.cancelled().await;
        let status = self.status.lock().clone();
        status.unwrap_or_else(|| Status::unavailable("the stream has ended"))
    }
}

impl State {
    /// Revokes sync tasks, whose callers wait for a result on the stream that ended.
    fn revoke_sync_tasks(&self) {
        for task in self.tasks.values().filter(|task| task.sync) {
            task.revoke("the worker's stream ended");
        }
    }

    /// Revokes the tasks that the worker's token no longer allows.
    fn revoke_unauthorized_tasks(&mut self) {
        let grants = &self.grants;
        self.tasks.retain(|_, task| {
            let is_allowed = grants.allows(&task.action, &task.tenant);
            if !is_allowed {
                task.revoke("the worker's token no longer allows the action for this tenant");
            }
            is_allowed
        });
    }
}

impl WorkerSession {
    pub(crate) fn new(
        id: String,
        principal: Owner,
        assigned: AssignedWorker,
        actions: Vec<ActionSpec>,
        grants: Grants,
        slots: u32,
    ) -> Self {
        let actions = actions.into_iter().map(|spec| (spec.name.clone(), Arc::new(spec)));
        Self {
            id,
            principal,
            assigned,
            state: Mutex::new(State {
                actions: actions.collect(),
                declared_at: Instant::now(),
                grants,
                slots,
                used_slots: HashMap::new(),
                stream: None,
                streams: 0,
                last_seen: Instant::now(),
                silent: false,
                tasks: HashMap::new(),
            }),
        }
    }

    /// Updates the session after a reconnect to the declarations, permissions and slots of `newer`.
    pub(crate) fn renew(&self, newer: Self) {
        let newer = newer.state.into_inner();
        let mut state = self.state.lock();
        state.last_seen = newer.last_seen;
        state.silent = false;
        state.actions = newer.actions;
        state.declared_at = newer.declared_at;
        state.grants = newer.grants;
        state.slots = newer.slots;
        state.revoke_unauthorized_tasks();
    }

    /// Ends the stream before a new one replaces it, so that the worker receives no tasks in
    /// between.
    pub(crate) fn detach(&self) {
        let reason = "replaced by a newer stream of the same worker";
        self.end_stream(Status::already_exists(reason));
    }

    /// Attaches a stream. Returns its number and the signal of its end.
    pub(crate) fn connect(&self, outbox: Outbox) -> (u64, Arc<StreamEnd>) {
        self.detach();
        let end = Arc::new(StreamEnd::default());
        let mut state = self.state.lock();
        state.streams += 1;
        let number = state.streams;
        state.stream = Some(Stream { number, outbox, end: end.clone() });
        state.last_seen = Instant::now();
        state.silent = false;
        (number, end)
    }

    /// Ends the stream, if any, with the given status.
    pub(crate) fn end_stream(&self, status: Status) {
        let mut state = self.state.lock();
        if let Some(stream) = state.stream.take() {
            stream.end.end(status);
            state.revoke_sync_tasks();
        }
    }

    /// Records that the stream with the given number has ended.
    pub(crate) fn disconnect(&self, number: u64) {
        let mut state = self.state.lock();
        if state.stream.as_ref().is_none_or(|stream| stream.number == number) {
            state.stream = None;
            state.revoke_sync_tasks();
        }
    }

    /// Records a message from the worker; returns whether the worker was silent before.
    pub(crate) fn record_activity(&self) -> bool {
        let mut state = self.state.lock();
        state.last_seen = Instant::now();
        mem::take(&mut state.silent)
    }

    pub(crate) fn silent_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.state.lock().last_seen)
    }

    /// Ends the stream and revokes all attempts, because a different worker of the same principal uses the same ID.
    pub(crate) fn supersede(&self) {
        self.detach();
        let tasks = mem::take(&mut self.state.lock().tasks);
        for task in tasks.values() {
            // The attempt may have started, so it counts as a failed one.
            task.revoke("replaced by another worker with the same id");
        }
    }

    /// Marks the worker as silent and revokes all its attempts; returns whether it was not silent before.
    pub(crate) fn mark_silent(&self, lease: Duration) -> bool {
        let (tasks, first) = {
            let mut state = self.state.lock();
            let first = !mem::replace(&mut state.silent, true);
            (mem::take(&mut state.tasks), first)
        };
        for task in tasks.values() {
            task.revoke(format!(
                "the lease expired: worker {} was silent for {} ms",
                self.assigned.display_name,
                lease.as_millis()
            ));
        }
        first
    }

    pub(crate) fn has_stream(&self) -> bool {
        self.state.lock().stream.is_some()
    }

    /// Returns whether the worker can receive tasks.
    pub(crate) fn is_available(&self) -> bool {
        let state = self.state.lock();
        state.stream.is_some() && !state.silent
    }

    pub(crate) fn actions(&self) -> Vec<Arc<ActionSpec>> {
        self.state.lock().actions.values().cloned().collect()
    }

    pub(crate) fn action(&self, action: &str) -> Option<Arc<ActionSpec>> {
        self.state.lock().actions.get(action).cloned()
    }

    /// Returns whether the worker can receive tasks of the declaration with the given key.
    pub(crate) fn declares(&self, key: &ActionKey) -> bool {
        let state = self.state.lock();
        state.stream.is_some()
            && !state.silent
            && state.actions.contains_key(&key.action)
            && match &key.tenant {
                None => state.grants.allows_all_tenants(&key.action),
                Some(tenant) => {
                    !state.grants.allows_all_tenants(&key.action)
                        && state.grants.allows(&key.action, tenant)
                }
            }
    }

    /// Returns the declarations of the worker: one per action and tenant.
    pub(crate) fn declarations(&self) -> Vec<(ActionKey, Arc<ActionSpec>)> {
        let state = self.state.lock();
        let mut declared = Vec::new();
        for (action, spec) in &state.actions {
            let key = |tenant| ActionKey { action: action.clone(), tenant };
            match state.grants.tenants(action) {
                None => declared.push((key(None), spec.clone())),
                Some(tenants) => declared.extend(
                    tenants.into_iter().map(|tenant| (key(Some(tenant.to_owned())), spec.clone())),
                ),
            }
        }
        declared
    }

    pub(crate) fn declared_at(&self) -> Instant {
        self.state.lock().declared_at
    }

    pub(crate) fn may_run(&self, action: &str, tenant: &str) -> bool {
        self.state.lock().grants.allows(action, tenant)
    }

    pub(crate) fn set_grants(&self, grants: Grants) {
        let mut state = self.state.lock();
        state.grants = grants;
        state.revoke_unauthorized_tasks();
    }

    pub(crate) fn slots(&self) -> u32 {
        self.state.lock().slots
    }

    pub(crate) fn set_slots(&self, slots: u32) {
        self.state.lock().slots = slots;
    }

    pub(crate) fn free_slots(&self) -> u32 {
        let state = self.state.lock();
        state.slots.saturating_sub(state.used_slots.values().sum())
    }

    pub(crate) fn slots_used_by(&self, tenant: &str) -> u32 {
        self.state.lock().used_slots.get(tenant).copied().unwrap_or(0)
    }

    /// Acquires a slot for the given tenant if one is free; returns whether it was acquired.
    pub(crate) fn try_acquire_slot(&self, tenant: &str) -> bool {
        let mut state = self.state.lock();
        let free = state.slots.saturating_sub(state.used_slots.values().sum()) > 0;
        if free {
            *state.used_slots.entry(tenant.to_owned()).or_insert(0) += 1;
        }
        free
    }

    /// Acquires a slot even if none is free, for an attempt that the worker already runs.
    pub(crate) fn force_acquire_slot(&self, tenant: &str) {
        *self.state.lock().used_slots.entry(tenant.to_owned()).or_insert(0) += 1;
    }

    pub(crate) fn release_slot(&self, tenant: &str) {
        let mut state = self.state.lock();
        if let Some(count) = state.used_slots.get_mut(tenant) {
            *count -= 1;
            if *count == 0 {
                state.used_slots.remove(tenant);
            }
        }
    }

    /// Adds a task, and revokes it if the token no longer allows it.
    pub(crate) fn assign(&self, task: Arc<RemoteTask>) {
        let mut state = self.state.lock();
        state.tasks.insert(task.uid, task);
        state.revoke_unauthorized_tasks();
    }

    /// Removes a task.
    pub(crate) fn unassign(&self, task: &RemoteTask) {
        let mut state = self.state.lock();
        if state.tasks.get(&task.uid).is_some_and(|current| current.attempt == task.attempt) {
            state.tasks.remove(&task.uid);
        }
    }

    pub(crate) fn task(&self, uid: Uid, attempt: AttemptNumber) -> Option<Arc<RemoteTask>> {
        let state = self.state.lock();
        let is_this = |task: &&Arc<RemoteTask>| {
            task.attempt == attempt && state.grants.allows(&task.action, &task.tenant)
        };
        state.tasks.get(&uid).filter(is_this).cloned()
    }

    /// Returns whether a sync call waits for a result from this worker.
    pub(crate) fn answers_calls(&self) -> bool {
        self.state.lock().tasks.values().any(|task| task.sync)
    }

    pub(crate) fn tasks(&self) -> Vec<Arc<RemoteTask>> {
        self.state.lock().tasks.values().cloned().collect()
    }

    /// Sends a message; returns whether it was queued on a stream. A stream whose outbox is full is ended; the worker
    /// then reconnects and resumes its attempts.
    pub(crate) fn send(&self, message: Message) -> bool {
        let mut state = self.state.lock();
        let Some(stream) = &state.stream else { return false };
        match stream.outbox.try_send(Ok(WorkResponse { message: Some(message) })) {
            Ok(()) => true,
            Err(_) => {
                if let Some(stream) = state.stream.take() {
                    stream.end.end(Status::unavailable("slow consumer: the send buffer is full"));
                    state.revoke_sync_tasks();
                }
                false
            }
        }
    }
}
