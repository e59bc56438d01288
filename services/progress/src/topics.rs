//! The requests whose latest events are in memory.

mod tail;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use parking_lot::Mutex;
use streamer_core::Uid;
use streamer_proto::common::v1::{Event, Request};
use streamer_rpc::request_to_proto;
use streamer_store::{Store, StoreError};
use tokio::{
    sync::{OnceCell, watch},
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{Ring, metrics::ProgressMetrics};
pub(crate) use tail::{Read, Tail};

/// Bytes of all tails together, beyond which unwatched ones go at once.
const MAX_TOTAL_BYTES: usize = 64 * 1024 * 1024;
/// Topics beyond which unwatched ones go at once.
const MAX_TOPICS: usize = 32_768;
/// Requests noted as missed in one round at most.
const MAX_MISSED: usize = 65_536;
const MAINTENANCE: Duration = Duration::from_secs(5);
/// The same where there are several instances: others may have appended what this one should tell.
const RING_MAINTENANCE: Duration = Duration::from_secs(1);
const RING_UNWATCHED_ROUNDS: u32 = 10;
const RING_COMPARE_ROUNDS: u32 = 15;
/// Topics that are compared with the store at the same time.
const COMPARED_AT_ONCE: usize = 32;
/// Rounds of maintenance that an unwatched topic without news survives.
const UNWATCHED_ROUNDS: u32 = 2;
/// Rounds without news after which a watched topic is compared with the store.
const COMPARE_ROUNDS: u32 = 3;

/// One request in memory.
pub(crate) struct Topic {
    pub(crate) uid: Uid,
    tail: Mutex<Tail>,
    /// `last_seq`, for those who wait.
    news: watch::Sender<i64>,
    loaded: OnceCell<()>,
    /// Rounds of maintenance since there was news.
    quiet_rounds: AtomicU32,
}

impl Topic {
    fn new(uid: Uid) -> Self {
        Self {
            uid,
            tail: Mutex::default(),
            news: watch::Sender::new(0),
            loaded: OnceCell::new(),
            quiet_rounds: AtomicU32::new(0),
        }
    }

    /// The request as of the latest event here.
    pub(crate) fn snapshot(&self) -> Option<Request> {
        self.tail.lock().snapshot().cloned()
    }

    /// What comes after `after_seq`.
    pub(crate) fn read(&self, after_seq: i64, max_events: usize, max_bytes: usize) -> Read {
        self.tail.lock().read(after_seq, max_events, max_bytes)
    }

    fn change(&self, change: impl FnOnce(&mut Tail)) {
        let last_seq = {
            let mut tail = self.tail.lock();
            change(&mut tail);
            tail.last_seq()
        };
        self.quiet_rounds.store(0, Ordering::Relaxed);
        self.news.send_if_modified(|known| {
            let newer = last_seq > *known;
            *known = last_seq.max(*known);
            newer
        });
    }

    fn is_watched(&self) -> bool {
        self.news.receiver_count() > 0
    }
}

/// A topic that stays in memory as long as this lives.
pub(crate) struct Subscription {
    pub(crate) topic: Arc<Topic>,
    /// Changes with `last_seq`.
    pub(crate) news: watch::Receiver<i64>,
}

impl Subscription {
    fn new(topic: &Arc<Topic>) -> Self {
        Self { topic: topic.clone(), news: topic.news.subscribe() }
    }
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
    store: Arc<dyn Store>,
    metrics: ProgressMetrics,
    ring: Option<Ring>,
    /// Watches end.
    pub(crate) draining: CancellationToken,
}

impl Topics {
    pub(crate) fn new(store: Arc<dyn Store>, metrics: ProgressMetrics, ring: Option<Ring>) -> Self {
        Self {
            ring,
            draining: CancellationToken::new(),
            by_uid: Mutex::default(),
            missed: Mutex::default(),
            prune_at: AtomicUsize::new(MAX_TOPICS),
            store,
            metrics,
        }
    }

    pub(crate) fn metrics(&self) -> &ProgressMetrics {
        &self.metrics
    }

    /// Subscribes to a request, if it is in memory and knows its request.
    pub(crate) fn loaded(&self, uid: Uid) -> Option<Subscription> {
        // Under the lock, so that the topic cannot be dropped between being found and being kept.
        let by_uid = self.by_uid.lock();
        let topic = by_uid.get(&uid)?;
        topic.loaded.initialized().then(|| Subscription::new(topic))
    }

    /// Subscribes to a request, bringing it into memory when it is not there.
    pub(crate) async fn load(&self, uid: Uid) -> Result<Option<Subscription>, StoreError> {
        // In the map before the store is read: what is published from now on reaches it, and what
        // was published before is in the store.
        let subscription = self.subscribe(uid);
        let topic = subscription.topic.clone();
        let loading = topic.loaded.get_or_try_init(|| async {
            match self.store.get_request(uid).await {
                Ok(Some(record)) => {
                    topic.change(|tail| tail.load(request_to_proto(&record)));
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
    pub(crate) fn create(&self, uid: Uid, created: Request, events: &[Event]) {
        let topic = {
            let mut by_uid = self.by_uid.lock();
            if self.missed.lock().has(uid) {
                return;
            }
            self.subscribe_in(&mut by_uid, uid).topic
        };
        topic.change(|tail| {
            tail.push(events);
            tail.load(created);
        });
        // Fails only when somebody else has loaded it, which is as good.
        drop(topic.loaded.set(()));
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
            topic.change(|tail| tail.push(events));
        }
    }

    fn subscribe(&self, uid: Uid) -> Subscription {
        self.subscribe_in(&mut self.by_uid.lock(), uid)
    }

    fn subscribe_in(&self, by_uid: &mut HashMap<Uid, Arc<Topic>>, uid: Uid) -> Subscription {
        if by_uid.len() >= self.prune_at.load(Ordering::Relaxed) && !by_uid.contains_key(&uid) {
            by_uid.retain(|_, topic| topic.is_watched());
            // Where most are watched, looking each time would find nothing at a high price.
            let prune_at = (by_uid.len() + by_uid.len() / 8).max(MAX_TOPICS);
            self.prune_at.store(prune_at, Ordering::Relaxed);
        }
        Subscription::new(by_uid.entry(uid).or_insert_with(|| Arc::new(Topic::new(uid))))
    }

    /// Drops tails that nobody needs and compares quiet watched ones with the store, in case a
    /// hint was lost.
    pub(crate) async fn maintain(&self, shutdown: CancellationToken) {
        let every = if self.ring.is_some() { RING_MAINTENANCE } else { MAINTENANCE };
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            for some in self.sweep().chunks(COMPARED_AT_ONCE) {
                let compared = some.iter().map(|topic| async move {
                    if let Err(error) = self.compare(topic).await {
                        tracing::warn!(%error, uid = %topic.uid, "could not compare with the store");
                    }
                });
                join_all(compared).await;
            }
        }
    }

    /// Drops what is not needed; returns what should be compared with the store.
    fn sweep(&self) -> Vec<Arc<Topic>> {
        let mut by_uid = self.by_uid.lock();
        self.missed.lock().turn();
        let bytes: usize = by_uid.values().map(|topic| topic.tail.lock().bytes()).sum();
        let unwatched_rounds = match &self.ring {
            _ if bytes > MAX_TOTAL_BYTES => 0,
            Some(_) => RING_UNWATCHED_ROUNDS,
            None => UNWATCHED_ROUNDS,
        };
        let mut compare = Vec::new();
        by_uid.retain(|_, topic| {
            let quiet = topic.quiet_rounds.fetch_add(1, Ordering::Relaxed);
            if !topic.is_watched() {
                return quiet < unwatched_rounds;
            }
            if self.is_to_compare(topic.uid, quiet) && !topic.tail.lock().ended() {
                compare.push(topic.clone());
            }
            true
        });
        self.metrics.topics.set(i64::try_from(by_uid.len()).unwrap_or(i64::MAX));
        compare
    }

    /// Whether a topic without news for so many rounds is compared with the store. One that belongs
    /// to another instance, which could not be reached, hears of news in no other way.
    fn is_to_compare(&self, uid: Uid, quiet: u32) -> bool {
        match &self.ring {
            None => quiet > 0 && quiet.is_multiple_of(COMPARE_ROUNDS),
            Some(ring) if ring.owner(uid).is_some() => quiet > 0,
            Some(_) => quiet.is_power_of_two() || quiet % RING_COMPARE_ROUNDS == 1,
        }
    }

    pub(crate) async fn compare(&self, topic: &Topic) -> Result<(), StoreError> {
        if let Some(record) = self.store.get_request(topic.uid).await? {
            let outdated = {
                let tail = topic.tail.lock();
                record.last_seq > tail.last_seq() || tail.snapshot().is_none()
            };
            if outdated {
                topic.change(|tail| tail.load(request_to_proto(&record)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::Timestamp;
    use streamer_proto::common::v1::{Accepted, Started, event::Kind};
    use streamer_store::{Engine, open};
    use streamer_telemetry::Metrics;

    use super::*;

    fn event(seq: i64, kind: Kind) -> Event {
        Event { seq, attempt: 0, time: None, kind: Some(kind) }
    }

    #[tokio::test]
    async fn a_late_announcement_of_a_request_that_runs_already_is_not_believed() {
        let data = tempfile::tempdir().unwrap();
        let store = open(&Engine::Embedded { data: data.path().to_owned() }).unwrap();
        let topics = Topics::new(store, ProgressMetrics::new(&Metrics::new()), None);
        let accepted = event(1, Kind::Accepted(Accepted::default()));
        let created =
            |uid: Uid| Request { uid: uid.to_string(), last_seq: 1, ..Request::default() };
        let (early, late) = (Uid::new(Timestamp::default()), Uid::new(Timestamp::default()));

        topics.create(early, created(early), std::slice::from_ref(&accepted));
        assert!(topics.loaded(early).is_some());

        topics.push(late, &[event(2, Kind::Started(Started::default()))]);
        topics.create(late, created(late), std::slice::from_ref(&accepted));
        assert!(topics.loaded(late).is_none(), "watchers read the store, which knows more");
    }
}
