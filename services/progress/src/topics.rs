//! The requests whose latest events are in memory.

mod delivery;
mod tail;
mod topic;
mod unannounced;

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
use streamer_core::Uid;
use streamer_proto::common::v1::{Event, Request};
use streamer_rpc::request_to_proto;
use streamer_store::{Store, StoreError};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{Ring, metrics::ProgressMetrics};
pub(crate) use delivery::Position;
pub(crate) use tail::Read;
pub(crate) use topic::{Subscription, Topic};

/// Bytes of all events in memory, beyond which they are cut to half as many: unwatched topics are
/// dropped, and watched ones keep an equal share.
const MAX_TOTAL_BYTES: usize = 64 * 1024 * 1024;
/// Topics beyond which unwatched ones go at once.
const MAX_TOPICS: usize = 32_768;
/// Requests noted as missed in one round at most.
const MAX_MISSED: usize = 65_536;
/// Where every event is stored by this process, which announces it.
const ALONE: Pace = Pace { round: Duration::from_secs(5), unwatched_rounds: 2, compare_rounds: 3 };
/// Where other processes write to the same store: one that dies between storing an event and announcing
/// it, or does not know this one, leaves watchers here without the event. Each comparison is one read of
/// an item.
const SHARED: Pace =
    Pace { round: Duration::from_secs(1), unwatched_rounds: 10, compare_rounds: 4 };
/// Topics that are compared with the store at the same time.
const COMPARED_AT_ONCE: usize = 32;

/// How often topics are maintained.
struct Pace {
    /// Time between two rounds of maintenance.
    round: Duration,
    /// Rounds that an unwatched topic without news survives.
    unwatched_rounds: u32,
    /// Rounds without news after which a watched topic is compared with the store, each time anew.
    compare_rounds: u32,
}

/// Those of this round of maintenance and of the one before: a call that is under way takes less.
#[derive(Default)]
struct Missed {
    now: HashSet<Uid>,
    before: HashSet<Uid>,
}

impl Missed {
    fn note(&mut self, uid: Uid) {
        if self.now.len() >= MAX_MISSED {
            self.turn();
        }
        self.now.insert(uid);
    }

    fn has(&self, uid: Uid) -> bool {
        self.now.contains(&uid) || self.before.contains(&uid)
    }

    fn turn(&mut self) {
        self.before = std::mem::take(&mut self.now);
    }
}

/// All requests in memory.
pub(crate) struct Topics {
    by_uid: Mutex<HashMap<Uid, Arc<Topic>>>,
    /// Requests of which events came lately while they were not in memory. Changed only while
    /// `by_uid` is locked.
    missed: Mutex<Missed>,
    /// How many topics there may be before unwatched ones are looked for.
    prune_at: AtomicUsize,
    /// Bytes of the events of all tails.
    total_bytes: Arc<AtomicUsize>,
    /// Held while tails are cut down.
    shrinking: Mutex<()>,
    store: Arc<dyn Store>,
    metrics: ProgressMetrics,
    ring: Option<Ring>,
    pace: &'static Pace,
    /// Watches end.
    pub(crate) draining: CancellationToken,
}

impl Topics {
    /// `is_shared` if other processes write to the store.
    pub(crate) fn new(
        store: Arc<dyn Store>,
        metrics: ProgressMetrics,
        ring: Option<Ring>,
        is_shared: bool,
    ) -> Self {
        Self {
            pace: if is_shared { &SHARED } else { &ALONE },
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

    /// Returns with the reason once watches here must end, so that they continue at another instance.
    pub(crate) async fn watches_end(&self) -> Status {
        let stops_serving = async {
            match &self.ring {
                Some(ring) => ring.stops_serving().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.draining.cancelled() => {
                Status::unavailable("the progress service is stopping")
            }
            () = stops_serving => crate::not_serving(),
        }
    }

    /// Subscribes to a request, if it is in memory and knows its request.
    pub(crate) fn loaded(&self, uid: Uid) -> Option<Subscription> {
        // Under the lock, so that the topic cannot be dropped between being found and being kept.
        let by_uid = self.by_uid.lock();
        let topic = by_uid.get(&uid)?;
        topic.is_loaded().then(|| Subscription::new(topic))
    }

    /// Subscribes to a request, bringing it into memory when it is not there.
    pub(crate) async fn load(&self, uid: Uid) -> Result<Option<Subscription>, StoreError> {
        // In the map before the store is read: what is published from now on reaches it, and what
        // was published before is in the store.
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
                    // Events came that did not follow those here.
                    self.compare(&subscription.topic).await?;
                }
                Ok(Some(subscription))
            }
            // The entry stays for others who may hold it; unwatched ones are swept.
            Err(error) => error.map_or(Ok(None), Err),
        }
    }

    /// A request begins: its first event is durable. It may have been found in the queue, and run,
    /// before this is told: then what is told here is old, and watchers read the store.
    pub(crate) fn create(&self, uid: Uid, created: &Request, events: &[Event]) {
        let topic = {
            let mut by_uid = self.by_uid.lock();
            if self.missed.lock().has(uid) {
                return;
            }
            self.subscribe_in(&mut by_uid, uid).topic
        };
        self.announced(&topic, events);
        topic.load(created);
        topic.set_loaded();
        self.shrink_if_full();
    }

    /// Delivers durable events to whoever watches; when nobody does, the store has them.
    pub(crate) fn push(&self, uid: Uid, events: &[Event]) {
        let topic = {
            let by_uid = self.by_uid.lock();
            let topic = by_uid.get(&uid).cloned();
            if topic.is_none() {
                self.missed.lock().note(uid);
            }
            topic
        };
        if let Some(topic) = topic {
            self.announced(&topic, events);
            self.shrink_if_full();
        }
    }

    fn announced(&self, topic: &Topic, events: &[Event]) {
        let found_before = topic.push(events);
        if found_before > 0 {
            self.metrics.unannounced.dec_by(found_before);
        }
    }

    /// Cuts tails down once all of them together hold too much. It costs a look at every topic, which
    /// comes once for each half of the limit that was pushed.
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

    /// An announcement of such a request may still come, and is then older than what is stored.
    fn drop_unwatched(&self, by_uid: &mut HashMap<Uid, Arc<Topic>>) {
        let mut missed = self.missed.lock();
        by_uid.retain(|uid, topic| {
            let is_needed = topic.is_needed();
            if !is_needed {
                missed.note(*uid);
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
            // Where most are watched, looking each time would find nothing at a high price.
            let prune_at = (by_uid.len() + by_uid.len() / 8).max(MAX_TOPICS);
            self.prune_at.store(prune_at, Ordering::Relaxed);
        }
        let topic = by_uid
            .entry(uid)
            .or_insert_with(|| Arc::new(Topic::new(uid, self.total_bytes.clone())));
        Subscription::new(topic)
    }

    /// Drops tails that are not needed and compares quiet watched ones with the store, in case a
    /// hint was lost.
    pub(crate) async fn maintain(&self, shutdown: CancellationToken) {
        let mut ticks = interval(self.pace.round);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            stream::iter(self.sweep(Instant::now()))
                .for_each_concurrent(COMPARED_AT_ONCE, |topic| async move {
                    if let Err(error) = self.check(&topic).await {
                        tracing::warn!(%error, uid = %topic.uid, "could not compare with the store");
                    }
                })
                .await;
        }
    }

    /// Compares a topic with the store.
    async fn check(&self, topic: &Arc<Topic>) -> Result<(), StoreError> {
        let Some(record) = self.store.get_request(topic.uid).await? else {
            // Deleted: a watcher would wait for ever.
            topic.end();
            return Ok(());
        };
        if self.is_notified_of(topic.uid) {
            self.metrics.unannounced.inc_by(topic.expect_announcement(&record));
        } else {
            topic.catch_up(&record);
        }
        Ok(())
    }

    /// Drops what is not needed; returns what should be compared with the store.
    fn sweep(&self, now: Instant) -> Vec<Arc<Topic>> {
        let mut by_uid = self.by_uid.lock();
        self.missed.lock().turn();
        let mut undelivered = Duration::ZERO;
        let mut all_lost = 0;
        let mut compare = Vec::new();
        by_uid.retain(|_, topic| {
            let quiet = topic.next_round();
            let lost = topic.take_lost_announcements(now);
            if lost > 0 {
                tracing::debug!(uid = %topic.uid, lost, "events were not announced");
                all_lost += lost;
            }
            if !topic.is_watched() {
                return quiet < self.pace.unwatched_rounds || topic.is_needed();
            }
            undelivered = undelivered.max(topic.undelivered_for(now));
            if self.is_to_compare(topic.uid, quiet) && !topic.has_ended() {
                compare.push(topic.clone());
            }
            true
        });
        if all_lost > 0 {
            tracing::warn!(
                events = all_lost,
                "stored events of watched requests were not announced"
            );
            self.metrics.unannounced.dec_by(all_lost);
            self.metrics.missed.inc_by(all_lost.unsigned_abs());
        }
        self.metrics.topics.set(count(by_uid.len()));
        self.metrics.tail_bytes.set(count(self.total_bytes.load(Ordering::Relaxed)));
        self.metrics.undelivered_seconds.set(undelivered.as_secs_f64());
        compare
    }

    /// Whether a topic without news for so many rounds is compared with the store.
    fn is_to_compare(&self, uid: Uid, quiet: u32) -> bool {
        quiet > 0 && (quiet.is_multiple_of(self.pace.compare_rounds) || !self.is_notified_of(uid))
    }

    /// Whether events of this request are published here. A request that belongs to another instance is
    /// served here only while that one cannot be reached, and its events are found by comparing.
    fn is_notified_of(&self, uid: Uid) -> bool {
        self.ring.as_ref().is_none_or(|ring| ring.owner(uid).is_none())
    }

    /// Brings a topic up to date with the store.
    pub(crate) async fn compare(&self, topic: &Topic) -> Result<(), StoreError> {
        if let Some(record) = self.store.get_request(topic.uid).await? {
            topic.catch_up(&record);
        }
        Ok(())
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
