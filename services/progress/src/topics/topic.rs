//! One request in memory, and the notification of its watchers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::Uid;
use streamer_proto::common::v1::{Event, Request};
use streamer_rpc::request_to_proto;
use streamer_store::RequestRecord;
use tokio::{
    sync::{OnceCell, watch},
    time::Instant,
};

use super::{
    delivery::{Delivery, Position},
    tail::{Read, Tail},
    unannounced::Unannounced,
};

/// One request in memory.
pub(crate) struct Topic {
    pub(crate) uid: Uid,
    state: Mutex<TopicState>,
    /// `last_seq`; wakes watchers when it changes.
    news: watch::Sender<i64>,
    loaded: OnceCell<()>,
    /// Rounds of maintenance since there was news.
    quiet_rounds: AtomicU32,
    /// Bytes of the events of all tails.
    total_bytes: Arc<AtomicUsize>,
}

#[derive(Default)]
struct TopicState {
    tail: Tail,
    delivery: Delivery,
    unannounced: Unannounced,
}

impl Topic {
    /// A topic whose bytes count towards `total_bytes`.
    pub(super) fn new(uid: Uid, total_bytes: Arc<AtomicUsize>) -> Self {
        Self {
            uid,
            state: Mutex::default(),
            news: watch::Sender::new(0),
            loaded: OnceCell::new(),
            quiet_rounds: AtomicU32::new(0),
            total_bytes,
        }
    }

    /// The request as of the latest event here.
    pub(crate) fn snapshot(&self) -> Option<Request> {
        self.state.lock().tail.snapshot().cloned()
    }

    /// The number of its latest event.
    pub(crate) fn last_seq(&self) -> i64 {
        self.state.lock().tail.last_seq()
    }

    /// What comes after `after_seq`.
    pub(crate) fn read(&self, after_seq: i64, max_events: usize, max_bytes: usize) -> Read {
        self.state.lock().tail.read(after_seq, max_events, max_bytes)
    }

    /// What comes after `after_seq`, for a watcher that has everything up to there.
    pub(crate) fn read_as(
        &self,
        position: &mut Position,
        after_seq: i64,
        max_events: usize,
        max_bytes: usize,
    ) -> Read {
        let mut state = self.state.lock();
        let read = state.tail.read(after_seq, max_events, max_bytes);
        let delivered = match &read {
            Read::Events(events) => events.last().map_or(after_seq, |last| last.seq),
            Read::InStore | Read::UpToDate | Read::Ended => after_seq,
        };
        state.delivery.note_delivered(position, delivered);
        read
    }

    /// A watcher stops reading.
    pub(crate) fn leave(&self, position: Position) {
        self.state.lock().delivery.leave(position);
    }

    /// Adds events that were announced. Returns how many of them had been found in the store before.
    pub(super) fn push(&self, events: &[Event]) -> i64 {
        self.change(|state| {
            self.counted(&mut state.tail, |tail| tail.push(events));
            match (events.first(), events.last()) {
                (Some(first), Some(last)) => state.unannounced.note_announced(first.seq, last.seq),
                _ => 0,
            }
        })
    }

    /// Takes over the request as it is stored.
    pub(super) fn load(&self, request: &Request) {
        self.change(|state| self.counted(&mut state.tail, |tail| tail.load(request)));
    }

    /// Takes over the request as it is stored, if that is newer. Returns how many events it is ahead.
    pub(super) fn catch_up(&self, record: &RequestRecord) -> i64 {
        self.change(|state| self.catch_up_in(state, record))
    }

    /// Takes over the request as it is stored, if that is newer, and expects the announcement of the
    /// events that it is ahead. Returns how many those are.
    pub(super) fn expect_announcement(&self, record: &RequestRecord) -> i64 {
        self.change(|state| {
            let known = state.tail.last_seq();
            match self.catch_up_in(state, record) {
                0 => 0,
                _ => state.unannounced.note_found(known, record.last_seq, Instant::now()),
            }
        })
    }

    fn catch_up_in(&self, state: &mut TopicState, record: &RequestRecord) -> i64 {
        let ahead = record.last_seq - state.tail.last_seq();
        if ahead > 0 || state.tail.snapshot().is_none() {
            self.counted(&mut state.tail, |tail| tail.load(&request_to_proto(record)));
        }
        ahead.max(0)
    }

    /// Returns how many events were found in the store and not announced in time.
    pub(super) fn take_lost_announcements(&self, now: Instant) -> i64 {
        self.state.lock().unannounced.take_lost(now)
    }

    /// Changes the topic, and wakes watchers if it has newer events then.
    fn change<T>(&self, change: impl FnOnce(&mut TopicState) -> T) -> T {
        let (result, last_seq) = {
            let mut state = self.state.lock();
            let result = change(&mut state);
            let last_seq = state.tail.last_seq();
            state.delivery.note_newest(last_seq, Instant::now());
            (result, last_seq)
        };
        let is_newer = self.news.send_if_modified(|known| {
            let is_newer = last_seq > *known;
            *known = last_seq.max(*known);
            is_newer
        });
        if is_newer {
            self.quiet_rounds.store(0, Ordering::Relaxed);
        }
        result
    }

    /// The request was deleted: ends its watches.
    pub(super) fn end(&self) {
        self.state.lock().tail.end();
        self.news.send_modify(|_| {});
    }

    /// Keeps the total of all tails up to date.
    fn counted(&self, tail: &mut Tail, change: impl FnOnce(&mut Tail)) {
        let before = tail.bytes();
        change(tail);
        let after = tail.bytes();
        if after >= before {
            self.total_bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.total_bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// Drops the oldest events until the rest hold at most `bytes`.
    pub(super) fn shrink_to(&self, bytes: usize) {
        self.counted(&mut self.state.lock().tail, |tail| tail.shrink_to(bytes));
    }

    /// For how long the newest event has been waiting for a watcher.
    pub(super) fn undelivered_for(&self, now: Instant) -> Duration {
        self.state.lock().delivery.undelivered_for(now)
    }

    /// Begins a round of maintenance; returns how many went before it since there was news.
    pub(super) fn next_round(&self) -> u32 {
        self.quiet_rounds.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.initialized()
    }

    /// The request has been read from the store, or announced.
    pub(super) fn set_loaded(&self) {
        // Fails only when another call has loaded it, which is as good.
        drop(self.loaded.set(()));
    }

    /// Waits for `load` unless the request has been read before; runs one of several at the same time.
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
        self.news.receiver_count() > 0
    }

    /// Whether it must stay in memory: it is watched, or an announcement is expected.
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

/// A topic that stays in memory as long as this lives.
pub(crate) struct Subscription {
    pub(crate) topic: Arc<Topic>,
    /// Changes with `last_seq`.
    pub(crate) news: watch::Receiver<i64>,
}

impl Subscription {
    pub(super) fn new(topic: &Arc<Topic>) -> Self {
        Self { topic: topic.clone(), news: topic.news.subscribe() }
    }
}
