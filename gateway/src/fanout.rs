//! Local fan-out: one upstream watch per request for any number of subscribed connections.

use std::{collections::HashMap, sync::Arc, time::Duration};

use http::HeaderValue;
use parking_lot::Mutex;
use streamer_cluster::RouteKey;
use streamer_core::{RequestState, Seq, Uid, backoff};
use streamer_proto::{
    common::v1::{Event, Output, Payload, Request, event::Kind, payload::Body},
    progress::v1::{ListEventsRequest, WatchRequest, WatchResponse},
};
use streamer_rpc::{Responses, WATCH_COUNTED, state_from_proto, with_authorization};
use streamer_store::{EventNumbers, InvalidNumber, RequestNumbers, check_events};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, metadata::MetadataValue};

use crate::{
    large_segments::LargeSegments,
    metrics::GatewayMetrics,
    protocol::server_message::RequestIds,
    topic::{Subscriber, Topic},
    upstreams::Upstreams,
};

/// Maximum number of events per page that a connection behind its topic reads from the log.
const LOG_PAGE: i32 = 500;
/// Maximum number of attempts to open a watch before a subscription fails.
const MAX_OPEN_ATTEMPTS: u32 = 4;
/// Maximum backoff before a lost upstream watch is reopened, with full jitter.
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// Size above which a message is large, in bytes. A watch that has received a large message keeps buffers of that
/// size at both ends. It is reopened without them if no event arrives for [`RELEASE_AFTER`].
const LARGE_BYTES: usize = 64 * 1024;
/// Minimum idle time after which a watch with large buffers is reopened. Jitter extends it up to twice the value,
/// because many watches may have received the same message.
const RELEASE_AFTER: Duration = Duration::from_secs(1);
/// Minimum interval between warnings about lost watches.
const LOST_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Minimum interval between progress events of a request in mode `latest`: 10 per second.
pub(crate) const LATEST_INTERVAL: Duration = Duration::from_millis(100);

pub(crate) struct Fanout {
    topics: Mutex<HashMap<Uid, Arc<Topic>>>,
    upstreams: Arc<Upstreams>,
    metrics: GatewayMetrics,
    large_segments: LargeSegments,
    /// Subscribers that are notified again at the end of [`LATEST_INTERVAL`].
    deferred: Mutex<Vec<Arc<Subscriber>>>,
    deferred_queued: Notify,
    /// Time at which a lost upstream watch was last logged as a warning.
    lost_logged_at: Mutex<Option<Instant>>,
}

/// A watch that was opened for a subscription.
pub(crate) struct OpenedWatch {
    pub(crate) uid: Uid,
    pub(crate) snapshot: Request,
    events: Vec<Event>,
    stream: Responses<WatchResponse>,
    /// `seq` after which the subscription starts.
    cursor: Seq,
    /// `seq` after which the stream starts.
    stream_after: Seq,
}

impl Fanout {
    pub(crate) fn new(upstreams: Arc<Upstreams>, metrics: GatewayMetrics) -> Self {
        Self {
            topics: Mutex::default(),
            upstreams,
            metrics,
            large_segments: LargeSegments::default(),
            deferred: Mutex::default(),
            deferred_queued: Notify::new(),
            lost_logged_at: Mutex::default(),
        }
    }

    /// Opens a watch of the request with the given `request_id` or uid, authenticated with the caller's token.
    pub(crate) async fn open(
        &self,
        request_id: String,
        after_seq: Option<Seq>,
        authorization: HeaderValue,
    ) -> Result<OpenedWatch, Status> {
        let mut attempts = 1;
        let (stream, first) = loop {
            let mut stream =
                self.watch(request_id.clone(), after_seq, authorization.clone()).await?;
            match stream.message().await {
                Ok(first) => break (stream, first),
                // The instance failed before its first response; a different instance may succeed.
                Err(status) if is_lost(&status) && attempts < MAX_OPEN_ATTEMPTS => {
                    attempts += 1;
                    self.metrics.upstream_lost.inc();
                }
                Err(status) => return Err(status),
            }
        };
        let malformed = || Status::internal("the progress service sent no snapshot");
        let WatchResponse { snapshot, events } = first.ok_or_else(malformed)?;
        let snapshot = snapshot.ok_or_else(malformed)?;
        let uid = snapshot.uid.parse().map_err(|_| malformed())?;
        snapshot.check_numbers().map_err(|error| invalid(&error))?;
        check_events(&events).map_err(|error| invalid(&error))?;
        let from = events.first().map_or(snapshot.last_seq(), |event| event.seq().previous());
        let after = after_seq.unwrap_or(from);
        Ok(OpenedWatch { uid, events, stream, cursor: after, stream_after: after, snapshot })
    }

    async fn watch(
        &self,
        request_id: String,
        after_seq: Option<Seq>,
        authorization: HeaderValue,
    ) -> Result<Responses<WatchResponse>, Status> {
        let key = request_id.parse().ok();
        let after_seq = after_seq.map(Seq::as_i64);
        let watch = WatchRequest { request_id, after_seq, ..WatchRequest::default() };
        let mut watch = with_authorization(watch, authorization);
        if let Some(uid) = key {
            watch.extensions_mut().insert(RouteKey(uid));
        }
        watch.metadata_mut().insert(WATCH_COUNTED, MetadataValue::from_static("1"));
        Ok(self.upstreams.progress().watch(watch).await?.into_inner())
    }

    /// Subscribes to the topic of an opened watch. If the topic is new, the stream of the watch becomes its upstream.
    /// Returns the topic and the `seq` after which the subscription starts.
    pub(crate) fn join(
        self: &Arc<Self>,
        opened: OpenedWatch,
        subscriber: Arc<Subscriber>,
    ) -> (Arc<Topic>, Seq) {
        let OpenedWatch { uid, snapshot, events, stream, cursor, stream_after } = opened;
        let mut topics = self.topics.lock();
        if let Some(topic) = topics.get(&uid) {
            topic.subscribe(subscriber);
            return (topic.clone(), cursor);
        }
        let last_seq = snapshot.last_seq();
        let ids = RequestIds { request_id: snapshot.request_id, uid: snapshot.uid };
        // A client may send an `after_seq` that does not exist yet. The topic also serves other
        // subscribers, so it must not start after the last event.
        let upstream = UpstreamWatch { stream, is_large: has_large_output(&events) };
        let (begin, upstream) = if stream_after <= last_seq {
            (stream_after, Some(upstream))
        } else {
            (last_seq, None)
        };
        let topic = Arc::new(Topic::new(uid, ids, begin));
        topic.subscribe(subscriber);
        self.publish(&topic, &events);
        topics.insert(uid, topic.clone());
        if has_ended(snapshot.state) && topic.last_seq() >= last_seq {
            topic.end();
        } else {
            self.follow(&topic, upstream);
        }
        (topic, cursor)
    }

    /// Subscribes to a request that this gateway has just submitted and whose events are known up to `last_seq`.
    pub(crate) fn join_submitted(
        self: &Arc<Self>,
        uid: Uid,
        ids: RequestIds,
        last_seq: Seq,
        subscriber: Arc<Subscriber>,
    ) -> Arc<Topic> {
        let mut topics = self.topics.lock();
        if let Some(topic) = topics.get(&uid) {
            topic.subscribe(subscriber);
            return topic.clone();
        }
        let topic = Arc::new(Topic::new(uid, ids, last_seq));
        topic.subscribe(subscriber);
        topics.insert(uid, topic.clone());
        self.follow(&topic, None);
        topic
    }

    /// Unsubscribes a connection. The upstream watch is closed with the last subscription.
    pub(crate) fn leave(&self, topic: &Topic, connection: Uid) {
        let mut topics = self.topics.lock();
        if topic.unsubscribe(connection) && is_registered(&topics, topic) {
            topics.remove(&topic.uid);
        }
    }

    /// Removes the topic if it has no subscribers. Returns whether it has none.
    fn remove_if_unused(&self, topic: &Topic) -> bool {
        let mut topics = self.topics.lock();
        // A later subscriber creates a new topic.
        let is_unused = topic.any_subscriber().is_none();
        if is_unused && is_registered(&topics, topic) {
            topics.remove(&topic.uid);
        }
        is_unused
    }

    /// Reads a page of the log for a connection that is behind the events in memory.
    pub(crate) async fn read_log(
        &self,
        uid: Uid,
        after_seq: Seq,
        authorization: HeaderValue,
    ) -> Result<Vec<Event>, Status> {
        self.metrics.log_reads.inc();
        let list = ListEventsRequest {
            request_id: uid.to_string(),
            after_seq: after_seq.as_i64(),
            page_size: LOG_PAGE,
            ..ListEventsRequest::default()
        };
        let list = with_authorization(list, authorization);
        let events = self.upstreams.progress().list_events(list).await?.into_inner().events;
        check_events(&events).map_err(|error| invalid(&error))?;
        Ok(events)
    }

    /// Notifies the subscriber again after [`LATEST_INTERVAL`].
    pub(crate) fn defer(&self, subscriber: Arc<Subscriber>) {
        self.deferred.lock().push(subscriber);
        self.deferred_queued.notify_one();
    }

    /// Notifies deferred subscribers until `shutdown` is cancelled, with one timer for all of them.
    pub(crate) async fn run(&self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.deferred_queued.notified() => {}
            }
            sleep(LATEST_INTERVAL).await;
            let deferred = std::mem::take(&mut *self.deferred.lock());
            deferred.iter().for_each(|subscriber| subscriber.notify());
        }
    }

    fn follow(self: &Arc<Self>, topic: &Arc<Topic>, upstream: Option<UpstreamWatch>) {
        let (fanout, followed) = (self.clone(), topic.clone());
        let task =
            tokio::spawn(async move { fanout.follow_until_terminal(&followed, upstream).await });
        topic.set_upstream(task.abort_handle());
    }

    /// Publishes upstream events to the topic up to the terminal event. Reopens a lost stream after
    /// the last received event, with the token of any current subscriber.
    async fn follow_until_terminal(&self, topic: &Arc<Topic>, mut upstream: Option<UpstreamWatch>) {
        while !topic.has_ended() {
            let outcome = match upstream.take() {
                Some(upstream) => self.receive(topic, upstream).await,
                None => {
                    let Some(subscriber) = topic.any_subscriber() else {
                        if self.remove_if_unused(topic) {
                            return;
                        }
                        continue;
                    };
                    match self.reopen(topic, &subscriber).await {
                        Ok(stream) => {
                            upstream = Some(UpstreamWatch { stream, is_large: false });
                            continue;
                        }
                        Err(status) if concerns_caller(&status) => {
                            topic.reject(&subscriber, status);
                            continue;
                        }
                        Err(status) => Err(status),
                    }
                }
            };
            match outcome {
                Ok(WatchEnd::Idle) => continue,
                // The token that opened the watch has expired; another subscriber may have a valid token.
                Err(status) if status.code() == Code::Unauthenticated => continue,
                Err(status) => self.log_lost_watch(topic.uid, &status),
                Ok(WatchEnd::Ended) => {}
            }
            if !topic.has_ended() {
                sleep(backoff::jitter(MAX_BACKOFF)).await;
            }
        }
    }

    fn publish(&self, topic: &Arc<Topic>, events: &[Event]) {
        if let Some(published) = topic.publish(events) {
            self.large_segments.record(topic, published, std::time::Instant::now());
        }
    }

    /// Counts and logs a lost watch. The failure of one progress service can end thousands of watches, so
    /// the warning is rate-limited.
    fn log_lost_watch(&self, uid: Uid, status: &Status) {
        self.metrics.upstream_lost.inc();
        let now = Instant::now();
        let logged_recently = {
            let mut logged_at = self.lost_logged_at.lock();
            let logged_recently = logged_at.is_some_and(|at| now - at < LOST_LOG_INTERVAL);
            if !logged_recently {
                *logged_at = Some(now);
            }
            logged_recently
        };
        if logged_recently {
            tracing::debug!(%uid, %status, "upstream watch lost; reopening");
        } else {
            tracing::warn!(%uid, %status, "upstream watches lost; reopening");
        }
    }

    async fn reopen(
        &self,
        topic: &Topic,
        subscriber: &Subscriber,
    ) -> Result<Responses<WatchResponse>, Status> {
        let after_seq = Some(topic.last_seq());
        self.watch(topic.uid.to_string(), after_seq, subscriber.handle.authorization()).await
    }

    async fn receive(
        &self,
        topic: &Arc<Topic>,
        upstream: UpstreamWatch,
    ) -> Result<WatchEnd, Status> {
        let UpstreamWatch { mut stream, mut is_large } = upstream;
        loop {
            let next = if is_large {
                let release_after = RELEASE_AFTER + backoff::jitter(RELEASE_AFTER);
                match timeout(release_after, stream.message()).await {
                    Ok(next) => next?,
                    Err(_) => return Ok(WatchEnd::Idle),
                }
            } else {
                stream.message().await?
            };
            let Some(response) = next else { return Ok(WatchEnd::Ended) };
            check_events(&response.events).map_err(|error| invalid(&error))?;
            is_large |= has_large_output(&response.events);
            self.metrics.upstream_events.inc_by(response.events.len() as u64);
            self.publish(topic, &response.events);
            if let Some(snapshot) = &response.snapshot {
                snapshot.check_numbers().map_err(|error| invalid(&error))?;
                if has_ended(snapshot.state) && snapshot.last_seq() <= topic.last_seq() {
                    topic.end();
                }
            }
        }
    }
}

/// Stream of an upstream watch, and whether the watch has large buffers.
struct UpstreamWatch {
    stream: Responses<WatchResponse>,
    is_large: bool,
}

/// Returns whether the output of the given events exceeds [`LARGE_BYTES`]. Of the other events, only a result can be
/// as large, and it ends the watch.
fn has_large_output(events: &[Event]) -> bool {
    let bytes = events.iter().map(|event| match &event.kind {
        Some(Kind::Output(Output {
            data: Some(Payload { body: Some(Body::Data(data)), .. }),
            ..
        })) => data.len(),
        _ => 0,
    });
    bytes.sum::<usize>() > LARGE_BYTES
}

/// Reason why receiving from a watch stopped.
enum WatchEnd {
    /// The request has ended, or the service closed the watch.
    Ended,
    /// The watch has large buffers and has received no events for some time.
    Idle,
}

fn is_registered(topics: &HashMap<Uid, Arc<Topic>>, topic: &Topic) -> bool {
    topics.get(&topic.uid).is_some_and(|known| std::ptr::eq(Arc::as_ptr(known), topic))
}

fn invalid(error: &InvalidNumber) -> Status {
    Status::internal(format!("the progress service sent an invalid message: {error}"))
}

fn has_ended(state: i32) -> bool {
    state_from_proto(state).is_some_and(RequestState::is_terminal)
}

/// Returns whether the progress service failed. An instance that stops ends its watches with UNAVAILABLE; a
/// broken connection ends them with UNKNOWN.
fn is_lost(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown)
}

/// Returns whether the error is specific to the caller, so that a different caller may succeed.
fn concerns_caller(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::PermissionDenied | Code::Unauthenticated)
}
