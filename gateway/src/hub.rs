//! Local fan-out: one upstream watch for each request, however many connections want it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use http::HeaderValue;
use parking_lot::Mutex;
use streamer_core::{RequestState, Uid, retry};
use streamer_proto::{
    common::v1::{Event, Output, Payload, Request, event::Kind, payload::Body},
    progress::v1::{ListEventsRequest, WatchRequest, WatchResponse},
};
use streamer_rpc::{RouteKey, WATCH_COUNTED, state_from_proto, with_authorization};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming, metadata::MetadataValue};

use crate::{
    large_segments::LargeSegments,
    messages::Names,
    metrics::GatewayMetrics,
    peers::Peers,
    topic::{Link, Topic},
};

/// Events that a connection that is behind reads from the log at a time.
const CATCH_UP_PAGE: i32 = 500;
/// Instances that are asked for a request, one after the other, before a subscription fails.
const OPEN_TRIES: u32 = 4;
/// Longest wait before a lost upstream is opened again, drawn with full jitter.
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// A watch that has brought a message of more than this many bytes keeps buffers of that size, at both ends. It is
/// opened again, without them, when nothing more has come for [`RELEASE_AFTER`].
const LARGE_BYTES: usize = 64 * 1024;
/// At least, and twice as long at most: many may have brought the same.
const RELEASE_AFTER: Duration = Duration::from_secs(1);
/// Lost watches are logged as a warning at most once in this time.
const LOST_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Those who asked for the latest get progress of a request at most so often: 10 times a second.
pub(crate) const LATEST_INTERVAL: Duration = Duration::from_millis(100);

pub(crate) struct Hub {
    topics: Mutex<HashMap<Uid, Arc<Topic>>>,
    peers: Arc<Peers>,
    metrics: GatewayMetrics,
    large_segments: LargeSegments,
    /// Who holds back progress until the interval is over.
    deferred: Mutex<Vec<Arc<Link>>>,
    deferring: Notify,
    /// When the loss of an upstream watch was last logged as a warning.
    lost_logged_at: Mutex<Option<Instant>>,
}

/// The beginning of a subscription.
pub(crate) struct Opened {
    pub(crate) uid: Uid,
    pub(crate) snapshot: Request,
    events: Vec<Event>,
    stream: Streaming<WatchResponse>,
    /// The subscription begins after this.
    cursor: i64,
    /// The stream begins after this.
    stream_after: i64,
}

impl Hub {
    pub(crate) fn new(peers: Arc<Peers>, metrics: GatewayMetrics) -> Self {
        Self {
            topics: Mutex::default(),
            peers,
            metrics,
            large_segments: LargeSegments::default(),
            deferred: Mutex::default(),
            deferring: Notify::new(),
            lost_logged_at: Mutex::default(),
        }
    }

    /// Asks the progress service for a request, by either of its names, in the name of whoever
    /// holds this token.
    pub(crate) async fn open(
        &self,
        name: String,
        after_seq: Option<i64>,
        authorization: HeaderValue,
    ) -> Result<Opened, Status> {
        let mut tries = 1;
        let (stream, first) = loop {
            let mut stream = self.watch(name.clone(), after_seq, authorization.clone()).await?;
            match stream.message().await {
                Ok(first) => break (stream, first),
                // The instance failed before its first answer; others may answer.
                Err(status) if is_lost(&status) && tries < OPEN_TRIES => {
                    tries += 1;
                    self.metrics.upstream_lost.inc();
                }
                Err(status) => return Err(status),
            }
        };
        let malformed = || Status::internal("the progress service sent no snapshot");
        let WatchResponse { snapshot, events } = first.ok_or_else(malformed)?;
        let snapshot = snapshot.ok_or_else(malformed)?;
        let uid = snapshot.uid.parse().map_err(|_| malformed())?;
        let from = events.first().map_or(snapshot.last_seq, |event| event.seq - 1);
        let after = after_seq.unwrap_or(from);
        Ok(Opened { uid, events, stream, cursor: after, stream_after: after, snapshot })
    }

    async fn watch(
        &self,
        request_id: String,
        after_seq: Option<i64>,
        authorization: HeaderValue,
    ) -> Result<Streaming<WatchResponse>, Status> {
        let key = request_id.parse().ok();
        let watch = WatchRequest { request_id, after_seq, ..WatchRequest::default() };
        let mut watch = with_authorization(watch, authorization);
        if let Some(uid) = key {
            watch.extensions_mut().insert(RouteKey(uid));
        }
        watch.metadata_mut().insert(WATCH_COUNTED, MetadataValue::from_static("1"));
        Ok(self.peers.progress().watch(watch).await?.into_inner())
    }

    /// Joins a request that was opened: its stream becomes the upstream if there is none yet.
    /// Returns the topic and the `seq` after which the subscription begins.
    pub(crate) fn join(self: &Arc<Self>, opened: Opened, link: Arc<Link>) -> (Arc<Topic>, i64) {
        let Opened { uid, snapshot, events, stream, cursor, stream_after } = opened;
        let mut topics = self.topics.lock();
        if let Some(topic) = topics.get(&uid) {
            topic.subscribe(link);
            return (topic.clone(), cursor);
        }
        let last_seq = snapshot.last_seq;
        let names = Names { request_id: snapshot.request_id, uid: snapshot.uid };
        // A client may ask for what comes after an event that is not there yet. The topic serves
        // others too, so it must not begin beyond what there is.
        let upstream = Upstream { stream, is_large: is_large(&events) };
        let (begin, upstream) = if stream_after <= last_seq {
            (stream_after, Some(upstream))
        } else {
            (last_seq, None)
        };
        let topic = Arc::new(Topic::new(uid, names, begin));
        topic.subscribe(link);
        self.publish(&topic, &events);
        topics.insert(uid, topic.clone());
        if has_ended(snapshot.state) && topic.last_seq() >= last_seq {
            topic.end();
        } else {
            self.follow(&topic, upstream);
        }
        (topic, cursor)
    }

    /// Joins a request that this gateway has just submitted, whose log is known up to `last_seq`.
    pub(crate) fn join_submitted(
        self: &Arc<Self>,
        uid: Uid,
        names: Names,
        last_seq: i64,
        link: Arc<Link>,
    ) -> Arc<Topic> {
        let mut topics = self.topics.lock();
        if let Some(topic) = topics.get(&uid) {
            topic.subscribe(link);
            return topic.clone();
        }
        let topic = Arc::new(Topic::new(uid, names, last_seq));
        topic.subscribe(link);
        topics.insert(uid, topic.clone());
        self.follow(&topic, None);
        topic
    }

    /// Ends a connection's interest; the last one ends the upstream.
    pub(crate) fn leave(&self, topic: &Topic, connection: Uid) {
        let mut topics = self.topics.lock();
        if topic.unsubscribe(connection) && is_at(&topics, topic) {
            topics.remove(&topic.uid);
        }
    }

    /// Forgets a topic that nobody wants; says whether nobody does.
    fn forget_unwanted(&self, topic: &Topic) -> bool {
        let mut topics = self.topics.lock();
        // Who comes from now on makes a new one.
        let unwanted = topic.any_subscriber().is_none();
        if unwanted && is_at(&topics, topic) {
            topics.remove(&topic.uid);
        }
        unwanted
    }

    /// A page of the log, for a connection that is behind what is in memory.
    pub(crate) async fn catch_up(
        &self,
        uid: Uid,
        after_seq: i64,
        authorization: HeaderValue,
    ) -> Result<Vec<Event>, Status> {
        self.metrics.catch_ups.inc();
        let list = ListEventsRequest {
            request_id: uid.to_string(),
            after_seq,
            page_size: CATCH_UP_PAGE,
            ..ListEventsRequest::default()
        };
        let list = with_authorization(list, authorization);
        Ok(self.peers.progress().list_events(list).await?.into_inner().events)
    }

    /// Will tell this connection again when the interval is over.
    pub(crate) fn defer(&self, link: Arc<Link>) {
        self.deferred.lock().push(link);
        self.deferring.notify_one();
    }

    /// Tells deferred connections, until `shutdown`: one timer for all of them.
    pub(crate) async fn run(&self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.deferring.notified() => {}
            }
            sleep(LATEST_INTERVAL).await;
            let deferred = std::mem::take(&mut *self.deferred.lock());
            deferred.iter().for_each(|link| link.tell());
        }
    }

    fn follow(self: &Arc<Self>, topic: &Arc<Topic>, upstream: Option<Upstream>) {
        let (hub, followed) = (self.clone(), topic.clone());
        let task = tokio::spawn(async move { hub.follow_to_the_end(&followed, upstream).await });
        topic.set_upstream(task.abort_handle());
    }

    /// Brings events from upstream into the topic until the terminal one; a lost stream is opened
    /// again after the last event that came, in the name of whoever is subscribed then.
    async fn follow_to_the_end(&self, topic: &Arc<Topic>, mut upstream: Option<Upstream>) {
        while !topic.has_ended() {
            let outcome = match upstream.take() {
                Some(upstream) => self.drain(topic, upstream).await,
                None => {
                    let Some(link) = topic.any_subscriber() else {
                        if self.forget_unwanted(topic) {
                            return;
                        }
                        continue;
                    };
                    match self.reopen(topic, &link).await {
                        Ok(stream) => {
                            upstream = Some(Upstream { stream, is_large: false });
                            continue;
                        }
                        Err(status) if concerns_caller(&status) => {
                            topic.refuse(&link, status);
                            continue;
                        }
                        Err(status) => Err(status),
                    }
                }
            };
            match outcome {
                Ok(Drained::Idle) => continue,
                // The token of the caller in whose name it was opened has expired; others may have one.
                Err(status) if status.code() == Code::Unauthenticated => continue,
                Err(status) => self.note_lost(topic.uid, &status),
                Ok(Drained::Ended) => {}
            }
            if !topic.has_ended() {
                sleep(MAX_BACKOFF.mul_f64(retry::random_fraction())).await;
            }
        }
    }

    fn publish(&self, topic: &Arc<Topic>, events: &[Event]) {
        if let Some(published) = topic.publish(events) {
            self.large_segments.note(topic, published, std::time::Instant::now());
        }
    }

    /// One progress service that fails may take thousands of watches with it: one line stands for all.
    fn note_lost(&self, uid: Uid, status: &Status) {
        self.metrics.upstream_lost.inc();
        let now = Instant::now();
        let is_logged = {
            let mut logged_at = self.lost_logged_at.lock();
            let is_logged = logged_at.is_some_and(|at| now - at < LOST_LOG_INTERVAL);
            if !is_logged {
                *logged_at = Some(now);
            }
            is_logged
        };
        if is_logged {
            tracing::debug!(%uid, %status, "lost an upstream watch, will reopen it");
        } else {
            tracing::warn!(%uid, %status, "lost upstream watches, will reopen them");
        }
    }

    async fn reopen(&self, topic: &Topic, link: &Link) -> Result<Streaming<WatchResponse>, Status> {
        let after_seq = Some(topic.last_seq());
        self.watch(topic.uid.to_string(), after_seq, link.handle.authorization()).await
    }

    async fn drain(&self, topic: &Arc<Topic>, upstream: Upstream) -> Result<Drained, Status> {
        let Upstream { mut stream, mut is_large } = upstream;
        loop {
            let next = if is_large {
                let release_after = RELEASE_AFTER.mul_f64(1.0 + retry::random_fraction());
                match timeout(release_after, stream.message()).await {
                    Ok(next) => next?,
                    Err(_) => return Ok(Drained::Idle),
                }
            } else {
                stream.message().await?
            };
            let Some(response) = next else { return Ok(Drained::Ended) };
            is_large |= self::is_large(&response.events);
            self.metrics.upstream_events.inc_by(response.events.len() as u64);
            self.publish(topic, &response.events);
            let ended = |snapshot: &Request| {
                has_ended(snapshot.state) && snapshot.last_seq <= topic.last_seq()
            };
            if response.snapshot.as_ref().is_some_and(ended) {
                topic.end();
            }
        }
    }
}

/// A watch, and whether it has large buffers.
struct Upstream {
    stream: Streaming<WatchResponse>,
    is_large: bool,
}

/// Whether the output of these events is more than a small message. Nothing else in a log is as large, but for a
/// result, which ends the watch.
fn is_large(events: &[Event]) -> bool {
    let bytes = events.iter().map(|event| match &event.kind {
        Some(Kind::Output(Output {
            data: Some(Payload { body: Some(Body::Data(data)), .. }),
            ..
        })) => data.len(),
        _ => 0,
    });
    bytes.sum::<usize>() > LARGE_BYTES
}

/// Why a watch brings no more.
enum Drained {
    /// The request has ended, or the service ended the watch.
    Ended,
    /// It has large buffers, and nothing to do.
    Idle,
}

fn is_at(topics: &HashMap<Uid, Arc<Topic>>, topic: &Topic) -> bool {
    topics.get(&topic.uid).is_some_and(|known| std::ptr::eq(Arc::as_ptr(known), topic))
}

fn has_ended(state: i32) -> bool {
    state_from_proto(state).is_some_and(RequestState::is_terminal)
}

/// Whether the instance that was asked is gone: it ends watches with UNAVAILABLE, and a connection that
/// breaks ends them with UNKNOWN.
fn is_lost(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown)
}

/// Whether somebody else might be answered.
fn concerns_caller(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::PermissionDenied | Code::Unauthenticated)
}
