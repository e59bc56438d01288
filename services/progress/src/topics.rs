//! Registry of requests whose latest events are in memory.

mod delivery;
mod pending_announcements;
mod tail;
mod topic;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use streamer_core::{Uid, saturate};
use streamer_proto::common::v1::{Event, Request};
use streamer_rpc::request_to_proto;
use streamer_store::{Store, StoreError};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    metrics::ProgressMetrics,
    ring::{self, Ring},
};
pub(crate) use delivery::Position;
pub(crate) use tail::Read;
pub(crate) use topic::{Subscription, Topic};

/// Maximum total bytes of all events in memory. When it is exceeded, the total is reduced to half: unwatched topics are
/// dropped, and each watched topic keeps an equal share.
const MAX_TOTAL_BYTES: usize = 64 * 1024 * 1024;
/// Number of topics above which unwatched topics are dropped immediately.
const MAX_TOPICS: usize = 32_768;
/// Maximum number of requests recorded as missed in one round.
const MAX_MISSED: usize = 65_536;
/// Schedule for a store to which only this process writes, so that every event is announced.
const EXCLUSIVE_STORE: Maintenance =
    Maintenance { round: Duration::from_secs(5), unwatched_rounds: 2, compare_rounds: 3 };
/// Schedule for a store to which other processes write. A process that crashes between storing an event and announcing
/// it, or that has not discovered this instance, leaves the event unannounced; a comparison with the store finds it.
/// Each comparison reads one item.
const SHARED_STORE: Maintenance =
    Maintenance { round: Duration::from_secs(1), unwatched_rounds: 10, compare_rounds: 4 };
/// Maximum number of concurrent comparisons with the store.
const MAX_CONCURRENT_COMPARISONS: usize = 32;

/// Schedule of topic maintenance.
struct Maintenance {
    /// Interval between rounds of maintenance.
    round: Duration,
    /// Number of rounds after which an unwatched topic without new events is dropped.
    unwatched_rounds: u32,
    /// Number of rounds without new events between comparisons of a watched topic with the store.
    compare_rounds: u32,
}

/// Requests for which events arrived while the requests were not in memory, in the current and the previous round of
/// maintenance. Two rounds last longer than any pending call.
#[derive(Default)]
struct Missed {
    current: HashSet<Uid>,
    previous: HashSet<Uid>,
}

impl Missed {
    fn insert(&mut self, uid: Uid) {
        if self.current.len() >= MAX_MISSED {
            self.rotate();
        }
        self.current.insert(uid);
    }

    fn contains(&self, uid: Uid) -> bool {
        self.current.contains(&uid) || self.previous.contains(&uid)
    }

    fn rotate(&mut self) {
        self.previous = std::mem::take(&mut self.current);
    }
}

/// Registry of all requests in memory.
pub(crate) struct Topics {
    by_uid: Mutex<HashMap<Uid, Arc<Topic>>>,
    /// Requests for which events arrived recently while the requests were not in memory. Modified only while `by_uid`
    /// is locked.
    missed: Mutex<Missed>,
    /// Number of topics at which unwatched topics are dropped.
    prune_at: AtomicUsize,
    /// Total bytes of the events of all tails.
    total_bytes: Arc<AtomicUsize>,
    /// Lock that is held while tails are shrunk.
    shrinking: Mutex<()>,
    store: Arc<dyn Store>,
    metrics: ProgressMetrics,
    ring: Option<Ring>,
    maintenance: &'static Maintenance,
    /// Cancelled when watches must end.
    pub(crate) draining: CancellationToken,
}

impl Topics {
    /// Creates an empty registry; `is_shared` means that other processes write to the store.
    pub(crate) fn new(
        store: Arc<dyn Store>,
        metrics: ProgressMetrics,
        ring: Option<Ring>,
        is_shared: bool,
    ) -> Self {
        Self {
            maintenance: if is_shared { &SHARED_STORE } else { &EXCLUSIVE_STORE },
            ring,
            draining: CancellationToken::new(),
            by_uid: Mutex::default(),
            missed: Mutex::default(),
            prune_at: AtomicUsize::new(MAX_TOPICS),
            total_bytes: Arc::default(),
            shrinking: Mutex::default(),
            store,
            metrics,
        }
    }

    pub(crate) fn metrics(&self) -> &ProgressMetrics {
        &self.metrics
    }

    /// Waits until watches must end; returns the status to end them with. Clients then continue at another instance.
    pub(crate) async fn until_watches_end(&self) -> Status {
        let not_serving = async {
            match &self.ring {
                Some(ring) => ring.until_not_serving().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.draining.cancelled() => {
                Status::unavailable("the progress service is shutting down")
            }
            () = not_serving => ring::not_serving(),
        }
    }

    /// Subscribes to a request if its snapshot is in memory.
    pub(crate) fn subscribe_loaded(&self, uid: Uid) -> Option<Subscription> {
        // The lock prevents the topic from being dropped before the subscription exists.
        let by_uid = self.by_uid.lock();
        let topic = by_uid.get(&uid)?;
        topic.is_loaded().then(|| Subscription::new(topic))
    }

    /// Subscribes to a request and loads it into memory if necessary; `None` if it does not exist.
    pub(crate) async fn load(&self, uid: Uid) -> Result<Option<Subscription>, StoreError> {
        // The topic is in the map before the store is read: later events are pushed to the topic, and earlier events
        // are in the store.
        let subscription = self.subscribe(uid);
        let topic = subscription.topic.clone();
        let loading = topic.load_once(async {
            match self.store.get_request(uid).await {
                Ok(Some(record)) => {
                    topic.load(&request_to_proto(&record));
                    Ok(())
                }
                Ok(None) => Err(None),
                Err(error) => Err(Some(error)),
            }
        });
        match loading.await {
            Ok(_) => {
                if subscription.topic.snapshot().is_none() {
                    // Events arrived after a gap, so that the topic has no snapshot.
                    self.catch_up(&subscription.topic).await?;
                }
                Ok(Some(subscription))
            }
            // The entry remains because other callers may use it; the next sweeps remove unwatched entries.
            Err(error) => error.map_or(Ok(None), Err),
        }
    }

    /// Adds a new request whose first event is durable. A processor may have started the request before this call:
    /// `events` is then stale, and watchers read the store.
    pub(crate) fn create(&self, uid: Uid, created: &Request, events: &[Event]) {
        let topic = {
            let mut by_uid = self.by_uid.lock();
            if self.missed.lock().contains(uid) {
                return;
            }
            self.subscribe_in(&mut by_uid, uid).topic
        };
        self.push_to(&topic, events);
        topic.load(created);
        topic.set_loaded();
        self.shrink_if_full();
    }

    /// Delivers durable events to watchers. Events of a request that is not in memory are dropped, because the store
    /// contains them.
    pub(crate) fn push(&self, uid: Uid, events: &[Event]) {
        let topic = {
            let by_uid = self.by_uid.lock();
            let topic = by_uid.get(&uid).cloned();
            if topic.is_none() {
                self.missed.lock().insert(uid);
            }
            topic
        };
        if let Some(topic) = topic {
            self.push_to(&topic, events);
            self.shrink_if_full();
        }
    }

    fn push_to(&self, topic: &Topic, events: &[Event]) {
        let found_before = topic.push(events);
        if found_before > 0 {
            self.metrics.unannounced.dec_by(found_before);
        }
    }

    /// Shrinks tails if their total exceeds the limit. This visits every topic, at most once per half of the limit that
    /// is pushed.
    fn shrink_if_full(&self) {
        if self.total_bytes.load(Ordering::Relaxed) <= MAX_TOTAL_BYTES {
            return;
        }
        let Some(_shrinking) = self.shrinking.try_lock() else { return };
        let mut by_uid = self.by_uid.lock();
        self.drop_unwatched(&mut by_uid);
        if self.total_bytes.load(Ordering::Relaxed) > MAX_TOTAL_BYTES / 2 {
            let share = MAX_TOTAL_BYTES / 2 / by_uid.len().max(1);
            by_uid.values().for_each(|topic| topic.shrink_to(share));
        }
    }

    /// Drops unwatched topics and records them as missed, because a later announcement of such a request may be older
    /// than the stored state.
    fn drop_unwatched(&self, by_uid: &mut HashMap<Uid, Arc<Topic>>) {
        let mut missed = self.missed.lock();
        by_uid.retain(|uid, topic| {
            let is_needed = topic.is_needed();
            if !is_needed {
                missed.insert(*uid);
            }
            is_needed
        });
    }

    fn subscribe(&self, uid: Uid) -> Subscription {
        self.subscribe_in(&mut self.by_uid.lock(), uid)
    }

    fn subscribe_in(&self, by_uid: &mut HashMap<Uid, Arc<Topic>>, uid: Uid) -> Subscription {
        if by_uid.len() >= self.prune_at.load(Ordering::Relaxed) && !by_uid.contains_key(&uid) {
            self.drop_unwatched(by_uid);
            // If most topics are watched, a scan for each new topic would be expensive and would find nothing.
            let prune_at = (by_uid.len() + by_uid.len() / 8).max(MAX_TOPICS);
            self.prune_at.store(prune_at, Ordering::Relaxed);
        }
        let topic = by_uid
            .entry(uid)
            .or_insert_with(|| Arc::new(Topic::new(uid, self.total_bytes.clone())));
        Subscription::new(topic)
    }

    /// Drops unneeded topics, and compares watched topics without new events with the store in case an announcement was
    /// lost, until `shutdown` is cancelled.
    pub(crate) async fn maintain(&self, shutdown: CancellationToken) {
        let mut ticks = interval(self.maintenance.round);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            stream::iter(self.sweep(Instant::now()))
                .for_each_concurrent(MAX_CONCURRENT_COMPARISONS, |topic| async move {
                    if let Err(error) = self.reconcile(&topic).await {
                        tracing::warn!(%error, uid = %topic.uid, "failed to compare a request with the store");
                    }
                })
                .await;
        }
    }

    /// Compares a topic with the store and counts unannounced events.
    async fn reconcile(&self, topic: &Arc<Topic>) -> Result<(), StoreError> {
        let Some(record) = self.store.get_request(topic.uid).await? else {
            // The request was deleted, so its watches would never end.
            topic.end();
            return Ok(());
        };
        if self.receives_announcements_of(topic.uid) {
            self.metrics.unannounced.inc_by(topic.expect_announcement(&record));
        } else {
            topic.catch_up(&record);
        }
        Ok(())
    }

    /// Drops unneeded topics; returns the topics that must be compared with the store.
    fn sweep(&self, now: Instant) -> Vec<Arc<Topic>> {
        let mut by_uid = self.by_uid.lock();
        self.missed.lock().rotate();
        let mut undelivered = Duration::ZERO;
        let mut total_lost = 0;
        let mut compare = Vec::new();
        by_uid.retain(|_, topic| {
            let idle_rounds = topic.next_round();
            let lost = topic.take_lost_announcements(now);
            if lost > 0 {
                tracing::debug!(uid = %topic.uid, lost, "events were not announced");
                total_lost += lost;
            }
            if !topic.is_watched() {
                return idle_rounds < self.maintenance.unwatched_rounds || topic.is_needed();
            }
            undelivered = undelivered.max(topic.undelivered_for(now));
            if self.must_compare(topic.uid, idle_rounds) && !topic.has_ended() {
                compare.push(topic.clone());
            }
            true
        });
        if total_lost > 0 {
            tracing::warn!(
                events = total_lost,
                "stored events of watched requests were not announced"
            );
            self.metrics.unannounced.dec_by(total_lost);
            self.metrics.missed.inc_by(total_lost.unsigned_abs());
        }
        self.metrics.topics.set(saturate::to_i64(by_uid.len()));
        let tail_bytes = self.total_bytes.load(Ordering::Relaxed);
        self.metrics.tail_bytes.set(saturate::to_i64(tail_bytes));
        self.metrics.undelivered_seconds.set(undelivered.as_secs_f64());
        compare
    }

    /// Returns whether to compare a topic that has had no new events for `idle_rounds` rounds.
    fn must_compare(&self, uid: Uid, idle_rounds: u32) -> bool {
        idle_rounds > 0
            && (idle_rounds.is_multiple_of(self.maintenance.compare_rounds)
                || !self.receives_announcements_of(uid))
    }

    /// Returns whether the events of the given request are published to this instance. This instance serves a request
    /// of another instance only while that instance is unreachable, and finds its events by comparison with the store.
    fn receives_announcements_of(&self, uid: Uid) -> bool {
        self.ring.as_ref().is_none_or(|ring| ring.owner(uid).is_none())
    }

    /// Updates a topic from the store.
    pub(crate) async fn catch_up(&self, topic: &Topic) -> Result<(), StoreError> {
        if let Some(record) = self.store.get_request(topic.uid).await? {
            topic.catch_up(&record);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
