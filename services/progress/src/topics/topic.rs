//! One request in memory, which notifies its watchers of new events.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{Seq, Uid};
use streamer_proto::common::v1::{Event, Request};
use streamer_rpc::request_to_proto;
use streamer_store::{EventNumbers, RequestRecord};
use tokio::{
    sync::{OnceCell, watch},
    time::Instant,
};

use super::{
    delivery::{Delivery, Position},
    pending_announcements::PendingAnnouncements,
    tail::{Read, Tail},
};

/// One request in memory.
pub(crate) struct Topic {
    pub(crate) uid: Uid,
    state: Mutex<TopicState>,
    /// Publishes `last_seq`, which wakes watchers when it changes.
    updates: watch::Sender<Seq>,
    loaded: OnceCell<()>,
    /// Number of rounds of maintenance since the last new event.
    idle_rounds: AtomicU32,
    /// Total bytes of the events of all tails, including this one.
    total_bytes: Arc<AtomicUsize>,
}

#[derive(Default)]
struct TopicState {
    tail: Tail,
    delivery: Delivery,
    unannounced: PendingAnnouncements,
}

impl Topic {
    /// Creates an empty topic, whose bytes count towards `total_bytes`.
    pub(super) fn new(uid: Uid, total_bytes: Arc<AtomicUsize>) -> Self {
        Self {
            uid,
            state: Mutex::default(),
            updates: watch::Sender::new(Seq::NONE),
            loaded: OnceCell::new(),
            idle_rounds: AtomicU32::new(0),
            total_bytes,
        }
    }

    /// Returns the request as of the latest event in memory.
    pub(crate) fn snapshot(&self) -> Option<Request> {
        self.state.lock().tail.snapshot().cloned()
    }

    /// Returns the `seq` of the latest event.
    pub(crate) fn last_seq(&self) -> Seq {
        self.state.lock().tail.last_seq()
    }

    /// Reads the events after `after_seq`.
    pub(crate) fn read(&self, after_seq: Seq, max_events: usize, max_bytes: usize) -> Read {
        self.state.lock().tail.read(after_seq, max_events, max_bytes)
    }

    /// Reads the events after `after_seq` for a watcher that has all events up to `after_seq`.
    pub(crate) fn read_for_watcher(
        &self,
        position: &mut Position,
        after_seq: Seq,
        max_events: usize,
        max_bytes: usize,
    ) -> Read {
        let mut state = self.state.lock();
        let read = state.tail.read(after_seq, max_events, max_bytes);
        let delivered = match &read {
            Read::Events(events) => events.last().map_or(after_seq, EventNumbers::seq),
            Read::InStore | Read::UpToDate | Read::Ended => after_seq,
        };
        state.delivery.record_delivered(position, delivered);
        read
    }

    /// Removes a watcher.
    pub(crate) fn remove_watcher(&self, position: Position) {
        self.state.lock().delivery.remove(position);
    }

    /// Adds announced events. Returns the number of these events that were found in the store before.
    pub(super) fn push(&self, events: &[Event]) -> i64 {
        self.change(|state| {
            self.track_bytes(&mut state.tail, |tail| tail.push(events));
            match (events.first(), events.last()) {
                (Some(first), Some(last)) => {
                    state.unannounced.record_announced(first.seq(), last.seq())
                }
                _ => 0,
            }
        })
    }

    /// Loads the stored request.
    pub(super) fn load(&self, request: &Request) {
        self.change(|state| self.track_bytes(&mut state.tail, |tail| tail.load(request)));
    }

    /// Loads the stored request if it is newer. Returns the number of events by which the store is ahead.
    pub(super) fn catch_up(&self, record: &RequestRecord) -> i64 {
        self.change(|state| self.catch_up_in(state, record))
    }

    /// Loads the stored request if it is newer, and records that the events by which the store is ahead have yet to be
    /// announced. Returns the number of these events.
    pub(super) fn expect_announcement(&self, record: &RequestRecord) -> i64 {
        self.change(|state| {
            let known = state.tail.last_seq();
            match self.catch_up_in(state, record) {
                0 => 0,
                _ => state.unannounced.record_found(known, record.last_seq, Instant::now()),
            }
        })
    }

    fn catch_up_in(&self, state: &mut TopicState, record: &RequestRecord) -> i64 {
        let ahead = record.last_seq.events_since(state.tail.last_seq());
        if ahead > 0 || state.tail.snapshot().is_none() {
            self.track_bytes(&mut state.tail, |tail| tail.load(&request_to_proto(record)));
        }
        ahead.max(0)
    }

    /// Returns and resets the number of events that were found in the store and not announced in time.
    pub(super) fn take_lost_announcements(&self, now: Instant) -> i64 {
        self.state.lock().unannounced.take_lost(now)
    }

    /// Changes the topic, and wakes watchers if the change adds newer events.
    fn change<T>(&self, change: impl FnOnce(&mut TopicState) -> T) -> T {
        let (result, last_seq) = {
            let mut state = self.state.lock();
            let result = change(&mut state);
            let last_seq = state.tail.last_seq();
            state.delivery.record_newest(last_seq, Instant::now());
            (result, last_seq)
        };
        let is_newer = self.updates.send_if_modified(|known| {
            let is_newer = last_seq > *known;
            *known = last_seq.max(*known);
            is_newer
        });
        if is_newer {
            self.idle_rounds.store(0, Ordering::Relaxed);
        }
        result
    }

    /// Ends the watches of the request because it was deleted.
    pub(super) fn end(&self) {
        self.state.lock().tail.end();
        self.updates.send_modify(|_| {});
    }

    /// Changes a tail and adjusts the total of all tails.
    fn track_bytes(&self, tail: &mut Tail, change: impl FnOnce(&mut Tail)) {
        let before = tail.bytes();
        change(tail);
        let after = tail.bytes();
        if after >= before {
            self.total_bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.total_bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// Drops the oldest events until the remaining ones have at most `bytes` bytes.
    pub(super) fn shrink_to(&self, bytes: usize) {
        self.track_bytes(&mut self.state.lock().tail, |tail| tail.shrink_to(bytes));
    }

    /// Returns the time for which the newest event has not reached every watcher.
    pub(super) fn undelivered_for(&self, now: Instant) -> Duration {
        self.state.lock().delivery.undelivered_for(now)
    }

    /// Starts a round of maintenance. Returns the number of previous rounds since the last new event.
    pub(super) fn next_round(&self) -> u32 {
        self.idle_rounds.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.initialized()
    }

    /// Marks the request as loaded: it has been read from the store, or announced.
    pub(super) fn set_loaded(&self) {
        // Fails only if the request is already marked as loaded.
        drop(self.loaded.set(()));
    }

    /// Runs `load` unless the request is loaded. Concurrent calls wait for the one that runs `load`.
    pub(super) async fn load_once<E>(
        &self,
        load: impl Future<Output = Result<(), E>>,
    ) -> Result<(), E> {
        self.loaded.get_or_try_init(|| load).await.copied()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state.lock().tail.ended()
    }

    pub(super) fn is_watched(&self) -> bool {
        self.updates.receiver_count() > 0
    }

    /// Returns whether the topic must stay in memory: it is watched, or an announcement is pending.
    pub(super) fn is_needed(&self) -> bool {
        self.is_watched() || self.state.lock().unannounced.is_pending()
    }
}

impl Drop for Topic {
    fn drop(&mut self) {
        let bytes = self.state.get_mut().tail.bytes();
        self.total_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Subscription to a topic, which keeps the topic in memory.
pub(crate) struct Subscription {
    pub(crate) topic: Arc<Topic>,
    /// Receiver for the `last_seq` of the topic.
    pub(crate) updates: watch::Receiver<Seq>,
}

impl Subscription {
    pub(super) fn new(topic: &Arc<Topic>) -> Self {
        Self { topic: topic.clone(), updates: topic.updates.subscribe() }
    }
}
