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
use streamer_proto::common::v1::Request;
use tokio::{
    sync::{OnceCell, watch},
    time::Instant,
};

use super::{
    delivery::{Delivery, Position},
    tail::{Read, Tail},
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

    /// Changes the tail, and wakes watchers if it has newer events then.
    pub(super) fn change(&self, change: impl FnOnce(&mut Tail)) {
        let last_seq = {
            let mut state = self.state.lock();
            self.counted(&mut state.tail, change);
            let last_seq = state.tail.last_seq();
            state.delivery.note_newest(last_seq, Instant::now());
            last_seq
        };
        self.quiet_rounds.store(0, Ordering::Relaxed);
        self.news.send_if_modified(|known| {
            let newer = last_seq > *known;
            *known = last_seq.max(*known);
            newer
        });
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

    /// `seq` of the latest event known here, and whether the request is.
    pub(super) fn last_known(&self) -> (i64, bool) {
        let state = self.state.lock();
        (state.tail.last_seq(), state.tail.snapshot().is_some())
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
