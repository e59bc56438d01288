//! One worker, as the processor knows it: its slots, its stream, and the attempts it runs.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{ActionSpec, Uid};
use streamer_proto::processor::v1::{WorkResponse, work_response::Message};
use streamer_store::{AssignedWorker, Owner};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{grants::Grants, remote_task::RemoteTask, workers::Key};

/// What goes down a worker's stream.
pub(crate) type Outbox = mpsc::Sender<Result<WorkResponse, Status>>;

pub(crate) struct Worker {
    /// The name that it gives itself, for logs.
    pub(crate) id: String,
    /// Whose token opened its streams.
    pub(crate) principal: Owner,
    /// Its identity, and what the owners of its requests see.
    pub(crate) assigned: AssignedWorker,
    state: Mutex<State>,
}

struct State {
    actions: BTreeMap<String, Arc<ActionSpec>>,
    declared_at: Instant,
    grants: Grants,
    slots: u32,
    taken: HashMap<String, u32>,
    stream: Option<Stream>,
    streams: u64,
    last_seen: Instant,
    /// It was not heard of for a lease, and has not been since.
    silent: bool,
    tasks: HashMap<Uid, Arc<RemoteTask>>,
}

struct Stream {
    number: u64,
    outbox: Outbox,
    end: Arc<StreamEnd>,
}

/// Signals to a conversation that its stream is over, and with which status.
#[derive(Default)]
pub(crate) struct StreamEnd {
    over: CancellationToken,
    status: Mutex<Option<Status>>,
}

impl StreamEnd {
    fn end(&self, status: Status) {
        self.status.lock().get_or_insert(status);
        self.over.cancel();
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }

    /// Returns with the status once it is over.
    pub(crate) async fn ended(&self) -> Status {
        self.over.cancelled().await;
        let status = self.status.lock().clone();
        status.unwrap_or_else(|| Status::unavailable("the stream is over"))
    }
}

impl State {
    /// Whoever asked for them waits for the answer of the stream that they went to.
    fn lose_sync_tasks(&self) {
        for task in self.tasks.values().filter(|task| task.sync) {
            task.lose("the stream of the worker ended");
        }
    }

    /// Takes away the tasks that its token no longer allows.
    fn lose_forbidden_tasks(&mut self) {
        let grants = &self.grants;
        self.tasks.retain(|_, task| {
            let is_allowed = grants.allow(&task.action, &task.tenant);
            if !is_allowed {
                task.lose("the worker's token no longer allows the action for this tenant");
            }
            is_allowed
        });
    }
}

impl Worker {
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
                taken: HashMap::new(),
                stream: None,
                streams: 0,
                last_seen: Instant::now(),
                silent: false,
                tasks: HashMap::new(),
            }),
        }
    }

    /// It has connected again, with these declarations.
    pub(crate) fn renew(&self, newer: Self) {
        let newer = newer.state.into_inner();
        let mut state = self.state.lock();
        state.last_seen = newer.last_seen;
        state.silent = false;
        state.actions = newer.actions;
        state.declared_at = newer.declared_at;
        state.grants = newer.grants;
        state.slots = newer.slots;
        state.lose_forbidden_tasks();
    }

    /// Takes its stream away, so that it gets no tasks: another one is about to take its place.
    pub(crate) fn detach(&self) {
        let reason = "another stream of the same worker took its place";
        self.end_stream(Status::already_exists(reason));
    }

    /// Gives it a stream. Returns its number, and what tells when it is over.
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

    /// Ends its stream with this status, if it has one.
    pub(crate) fn end_stream(&self, status: Status) {
        let mut state = self.state.lock();
        if let Some(stream) = state.stream.take() {
            stream.end.end(status);
            state.lose_sync_tasks();
        }
    }

    /// This stream has ended.
    pub(crate) fn disconnect(&self, number: u64) {
        let mut state = self.state.lock();
        if state.stream.as_ref().is_none_or(|stream| stream.number == number) {
            state.stream = None;
            state.lose_sync_tasks();
        }
    }

    /// A sign of life; whether it had fallen silent before.
    pub(crate) fn seen(&self) -> bool {
        let mut state = self.state.lock();
        state.last_seen = Instant::now();
        mem::take(&mut state.silent)
    }

    pub(crate) fn silent_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.state.lock().last_seen)
    }

    /// Another program of the same principal has its id now: ends its stream, and takes its attempts
    /// away.
    pub(crate) fn supersede(&self) {
        self.detach();
        let tasks = mem::take(&mut self.state.lock().tasks);
        for task in tasks.values() {
            // It may have begun.
            task.lose("another worker of the same id took its place");
        }
    }

    /// Takes its attempts away; whether it was taken for alive before.
    pub(crate) fn fall_silent(&self, lease: Duration) -> bool {
        let (tasks, first) = {
            let mut state = self.state.lock();
            let first = !mem::replace(&mut state.silent, true);
            (mem::take(&mut state.tasks), first)
        };
        for task in tasks.values() {
            task.lose(format!(
                "the lease ran out: worker {} was not heard of for {} ms",
                self.assigned.display_name,
                lease.as_millis()
            ));
        }
        first
    }

    pub(crate) fn has_stream(&self) -> bool {
        self.state.lock().stream.is_some()
    }

    /// Whether it can be given tasks.
    pub(crate) fn is_present(&self) -> bool {
        let state = self.state.lock();
        state.stream.is_some() && !state.silent
    }

    pub(crate) fn actions(&self) -> Vec<Arc<ActionSpec>> {
        self.state.lock().actions.values().cloned().collect()
    }

    pub(crate) fn action(&self, action: &str) -> Option<Arc<ActionSpec>> {
        self.state.lock().actions.get(action).cloned()
    }

    /// Whether it can be given tasks that were admitted by a declaration under this key.
    pub(crate) fn declares(&self, key: &Key) -> bool {
        let state = self.state.lock();
        state.stream.is_some()
            && !state.silent
            && state.actions.contains_key(&key.action)
            && match &key.tenant {
                None => state.grants.is_for_all(&key.action),
                Some(tenant) => {
                    !state.grants.is_for_all(&key.action) && state.grants.allow(&key.action, tenant)
                }
            }
    }

    /// Its declarations, for each tenant that they are for.
    pub(crate) fn declared(&self) -> Vec<(Key, Arc<ActionSpec>)> {
        let state = self.state.lock();
        let mut declared = Vec::new();
        for (action, spec) in &state.actions {
            let key = |tenant| Key { action: action.clone(), tenant };
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
        self.state.lock().grants.allow(action, tenant)
    }

    pub(crate) fn set_grants(&self, grants: Grants) {
        let mut state = self.state.lock();
        state.grants = grants;
        state.lose_forbidden_tasks();
    }

    pub(crate) fn slots(&self) -> u32 {
        self.state.lock().slots
    }

    pub(crate) fn set_slots(&self, slots: u32) {
        self.state.lock().slots = slots;
    }

    pub(crate) fn free(&self) -> u32 {
        let state = self.state.lock();
        state.slots.saturating_sub(state.taken.values().sum())
    }

    pub(crate) fn taken_by(&self, tenant: &str) -> u32 {
        self.state.lock().taken.get(tenant).copied().unwrap_or(0)
    }

    /// Takes a slot, if one is free.
    pub(crate) fn take(&self, tenant: &str) -> bool {
        let mut state = self.state.lock();
        let free = state.slots.saturating_sub(state.taken.values().sum()) > 0;
        if free {
            *state.taken.entry(tenant.to_owned()).or_insert(0) += 1;
        }
        free
    }

    /// Takes a slot whether one is free or not: for an attempt that runs in it already.
    pub(crate) fn take_anyway(&self, tenant: &str) {
        *self.state.lock().taken.entry(tenant.to_owned()).or_insert(0) += 1;
    }

    pub(crate) fn give_back(&self, tenant: &str) {
        let mut state = self.state.lock();
        if let Some(count) = state.taken.get_mut(tenant) {
            *count -= 1;
            if *count == 0 {
                state.taken.remove(tenant);
            }
        }
    }

    /// From now on it runs this, unless its token has come not to allow it.
    pub(crate) fn assign(&self, task: Arc<RemoteTask>) {
        let mut state = self.state.lock();
        state.tasks.insert(task.uid, task);
        state.lose_forbidden_tasks();
    }

    /// It does not run this any more.
    pub(crate) fn unassign(&self, task: &RemoteTask) {
        let mut state = self.state.lock();
        if state.tasks.get(&task.uid).is_some_and(|known| known.attempt == task.attempt) {
            state.tasks.remove(&task.uid);
        }
    }

    pub(crate) fn task(&self, uid: Uid, attempt: u32) -> Option<Arc<RemoteTask>> {
        let state = self.state.lock();
        let is_this = |task: &&Arc<RemoteTask>| {
            task.attempt == attempt && state.grants.allow(&task.action, &task.tenant)
        };
        state.tasks.get(&uid).filter(is_this).cloned()
    }

    /// Whether somebody waits for it to answer.
    pub(crate) fn answers_calls(&self) -> bool {
        self.state.lock().tasks.values().any(|task| task.sync)
    }

    pub(crate) fn tasks(&self) -> Vec<Arc<RemoteTask>> {
        self.state.lock().tasks.values().cloned().collect()
    }

    /// Sends it a message; whether there is a stream that takes it. A stream that takes nothing
    /// for so long that its outbox is full is ended: the worker connects again and resumes.
    pub(crate) fn send(&self, message: Message) -> bool {
        let mut state = self.state.lock();
        let Some(stream) = &state.stream else { return false };
        match stream.outbox.try_send(Ok(WorkResponse { message: Some(message) })) {
            Ok(()) => true,
            Err(_) => {
                if let Some(stream) = state.stream.take() {
                    stream.end.end(Status::unavailable("the worker does not read"));
                    state.lose_sync_tasks();
                }
                false
            }
        }
    }
}
