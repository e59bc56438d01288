//! One worker, as the processor knows it: its slots, its stream, and the attempts it runs.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{ActionSpec, Uid};
use streamer_handler::ReportQueue;
use streamer_proto::processor::v1::{
    Acknowledgment, Cancel, Revoke, WorkResponse, report, work_response::Message,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    mailbox::{Full, MAX_BYTES, MAX_REPORTS, Mailbox},
    workers::{Grants, Key},
};

/// What goes down a worker's stream.
pub(crate) type Outbox = mpsc::Sender<Result<WorkResponse, Status>>;

pub(crate) struct Worker {
    pub(crate) id: String,
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

/// Tells a conversation that its stream is over, and with which status.
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

    /// Returns with the status once it is over.
    pub(crate) async fn ended(&self) -> Status {
        self.over.cancelled().await;
        let status = self.status.lock().clone();
        status.unwrap_or_else(|| Status::unavailable("the stream is over"))
    }
}

impl State {
    /// Whoever asked for them waits for the answer of the stream that they went to.
    fn lose_sync_tasks(&self, worker: &str) {
        for task in self.tasks.values().filter(|task| task.sync) {
            task.lose(format!("the stream of worker {worker} ended"));
        }
    }
}

/// A worker's end of one attempt.
pub(crate) struct RemoteTask {
    pub(crate) uid: Uid,
    pub(crate) attempt: u32,
    /// A sync task ends with its worker's stream.
    sync: bool,
    since: Instant,
    pub(crate) mailbox: Mailbox,
    /// Progress and output reports that have come.
    received: Mutex<i64>,
    /// The worker does not run it any more; why.
    lost: CancellationToken,
    lost_reason: Mutex<Option<String>>,
    never_arrived: AtomicBool,
    cancel: Mutex<Option<Cancel>>,
    reports: Arc<ReportQueue>,
}

impl RemoteTask {
    /// Of an attempt whose first `received` reports are durable.
    pub(crate) fn new(uid: Uid, attempt: u32, received: i64, reports: Arc<ReportQueue>) -> Self {
        reports.note_durable(received);
        Self {
            uid,
            attempt,
            sync: false,
            since: Instant::now(),
            mailbox: Mailbox::default(),
            received: Mutex::new(received),
            lost: CancellationToken::new(),
            lost_reason: Mutex::default(),
            never_arrived: AtomicBool::new(false),
            cancel: Mutex::default(),
            reports,
        }
    }

    /// Of a sync action.
    pub(crate) fn sync(uid: Uid) -> Self {
        Self { sync: true, ..Self::new(uid, 1, 0, Arc::new(ReportQueue::discarding())) }
    }

    /// Reports up to this one are durable.
    pub(crate) fn acknowledgment(&self, ended: bool) -> Acknowledgment {
        Acknowledgment {
            uid: self.uid.to_string(),
            attempt: i32::try_from(self.attempt).unwrap_or(i32::MAX),
            number: *self.reports.durable().borrow(),
            ended,
        }
    }

    /// Follows how many reports are durable.
    pub(crate) fn durable(&self) -> watch::Receiver<i64> {
        self.reports.durable()
    }

    pub(crate) fn revoke(&self, reason: impl Into<String>) -> Revoke {
        let attempt = i32::try_from(self.attempt).unwrap_or(i32::MAX);
        Revoke { uid: self.uid.to_string(), attempt, reason: reason.into() }
    }

    /// Takes a report of the worker.
    ///
    /// # Errors
    /// When it breaks the rules of the protocol.
    pub(crate) fn deliver(&self, number: i64, kind: report::Kind) -> Result<(), Status> {
        // Held to the end: reports of an old stream may still be on their way.
        let mut last = self.received.lock();
        let received = *last;
        if matches!(kind, report::Kind::Progress(_) | report::Kind::Output(_)) {
            if number <= received && number > 0 {
                return Ok(()); // sent again after a reconnect
            }
            if number != received + 1 {
                return Err(Status::invalid_argument(format!(
                    "report.number: must be {}, is {number}",
                    received + 1
                )));
            }
        } else if number != received {
            let may_repeat =
                matches!(kind, report::Kind::Checkpoint(_) | report::Kind::KeepAlive(_));
            if may_repeat && number < received {
                return Ok(());
            }
            return Err(Status::invalid_argument(format!(
                "report.number: {received} progress and output reports went before, not {number}"
            )));
        }
        self.mailbox.push(kind).map_err(|Full| {
            Status::resource_exhausted(format!(
                "more than {MAX_REPORTS} reports or {MAX_BYTES} bytes of them are not acknowledged \
                 (welcome.max_unacknowledged, welcome.max_unacknowledged_bytes)"
            ))
        })?;
        *last = received.max(number);
        Ok(())
    }

    /// The worker does not run it (any more).
    pub(crate) fn lose(&self, reason: impl Into<String>) {
        self.lost_reason.lock().get_or_insert_with(|| reason.into());
        self.lost.cancel();
    }

    /// The worker, which lives, does not know the task: its stream may have died with it. When it has
    /// said nothing of it, the attempt costs none.
    pub(crate) fn forgotten(&self, reason: impl Into<String>) {
        if *self.received.lock() == 0 {
            self.never_arrived.store(true, Ordering::SeqCst);
        }
        self.lose(reason);
    }

    pub(crate) fn may_have_begun(&self) -> bool {
        !self.never_arrived.load(Ordering::SeqCst)
    }

    /// Why the worker does not run it any more, if so.
    pub(crate) fn lost_reason(&self) -> Option<String> {
        self.lost_reason.lock().clone()
    }

    /// Returns why, once the worker does not run it any more.
    pub(crate) async fn lost(&self) -> String {
        self.lost.cancelled().await;
        self.lost_reason.lock().clone().unwrap_or_default()
    }

    /// Notes that cancellation was asked for, so that heartbeats repeat it.
    pub(crate) fn note_cancel(&self, reason: String, grace: Duration) -> Cancel {
        let cancel = Cancel {
            uid: self.uid.to_string(),
            attempt: i32::try_from(self.attempt).unwrap_or(i32::MAX),
            reason,
            grace_ms: i64::try_from(grace.as_millis()).unwrap_or(i64::MAX),
        };
        *self.cancel.lock() = Some(cancel.clone());
        cancel
    }

    pub(crate) fn cancel(&self) -> Option<Cancel> {
        self.cancel.lock().clone()
    }

    /// Whether a heartbeat that does not name it means that the worker has lost it, and not only
    /// that the task had not arrived.
    pub(crate) fn should_be_named(&self, heartbeat: Duration) -> bool {
        self.since.elapsed() > heartbeat
    }
}

impl Worker {
    pub(crate) fn new(id: String, actions: Vec<ActionSpec>, grants: Grants, slots: u32) -> Self {
        let actions = actions.into_iter().map(|spec| (spec.name.clone(), Arc::new(spec)));
        Self {
            id,
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
            state.lose_sync_tasks(&self.id);
        }
    }

    /// This stream has ended.
    pub(crate) fn disconnect(&self, number: u64) {
        let mut state = self.state.lock();
        if state.stream.as_ref().is_none_or(|stream| stream.number == number) {
            state.stream = None;
            state.lose_sync_tasks(&self.id);
        }
    }

    /// A sign of life; whether it had fallen silent before.
    pub(crate) fn seen(&self) -> bool {
        let mut state = self.state.lock();
        state.last_seen = Instant::now();
        std::mem::take(&mut state.silent)
    }

    pub(crate) fn silent_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.state.lock().last_seen)
    }

    /// Takes its attempts away; whether it was taken for alive before.
    pub(crate) fn fall_silent(&self, lease: Duration) -> bool {
        let (tasks, first) = {
            let mut state = self.state.lock();
            let first = !std::mem::replace(&mut state.silent, true);
            (std::mem::take(&mut state.tasks), first)
        };
        for task in tasks.values() {
            task.lose(format!(
                "the lease ran out: worker {} was not heard of for {} ms",
                self.id,
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

    /// Whether it can be given tasks of this action and tenant.
    pub(crate) fn offers(&self, action: &str, tenant: &str) -> bool {
        let state = self.state.lock();
        state.stream.is_some()
            && !state.silent
            && state.actions.contains_key(action)
            && state.grants.allow(action, tenant)
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

    /// Which of its declarations holds for this tenant.
    pub(crate) fn key(&self, action: &str, tenant: &str) -> Key {
        let for_all = self.state.lock().grants.tenants(action).is_none();
        Key { action: action.to_owned(), tenant: (!for_all).then(|| tenant.to_owned()) }
    }

    pub(crate) fn declared_at(&self) -> Instant {
        self.state.lock().declared_at
    }

    pub(crate) fn may_run(&self, action: &str, tenant: &str) -> bool {
        self.state.lock().grants.allow(action, tenant)
    }

    pub(crate) fn set_grants(&self, grants: Grants) {
        self.state.lock().grants = grants;
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

    /// From now on it runs this.
    pub(crate) fn assign(&self, task: Arc<RemoteTask>) {
        self.state.lock().tasks.insert(task.uid, task);
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
        state.tasks.get(&uid).filter(|task| task.attempt == attempt).cloned()
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
                    state.lose_sync_tasks(&self.id);
                }
                false
            }
        }
    }
}
