//! Events on their way to one connection: a cursor for each subscription.

use std::sync::Arc;

use bytes::Bytes;
use streamer_core::{ErrorCode, OpenWatch, RequestError, Uid};
use streamer_proto::common::v1::Event;
use streamer_rpc::{is_terminal, request_error};
use streamer_telemetry::TraceContext;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::{Call, Session, calls::Reply};
use crate::{
    hub::LATEST_INTERVAL,
    messages,
    server::Gateway,
    topic::{Link, Next, Segment, Topic},
    ws::outbox::Outbox,
};

/// Reads of logs that one connection has underway at most.
const MAX_CATCHING_UP: usize = 4;

/// One connection's interest in one request.
pub(crate) struct Subscription {
    pub(crate) topic: Arc<Topic>,
    pub(crate) link: Arc<Link>,
    _watch: OpenWatch,
    /// `seq` of the last event that was sent or passed over.
    cursor: i64,
    latest: Option<Latest>,
    /// A page of the log is being read.
    catching_up: bool,
    /// The submission, if it is traced: then so is the delivery of the outcome.
    trace: Option<Box<TraceContext>>,
}

/// For those who want only the newest progress, not too often.
#[derive(Default)]
struct Latest {
    sent_at: Option<Instant>,
    held: Option<Bytes>,
}

impl Subscription {
    pub(crate) fn new(
        topic: Arc<Topic>,
        link: Arc<Link>,
        watch: OpenWatch,
        cursor: i64,
        latest: bool,
    ) -> Self {
        let latest = latest.then(Latest::default);
        Self { topic, link, _watch: watch, cursor, latest, catching_up: false, trace: None }
    }

    /// The subscription of the connection that made this submission.
    pub(crate) fn traced(self, trace: Option<Box<TraceContext>>) -> Self {
        Self { trace: trace.filter(|trace| trace.is_sampled()), ..self }
    }

    /// Whether the terminal event has been sent.
    pub(crate) fn is_over(&self) -> bool {
        !self.catching_up && matches!(self.topic.next(self.cursor), Next::Ended)
    }

    /// Takes a segment that follows the cursor.
    fn take(&mut self, segment: &Segment, out: &mut Outbox) {
        match &mut self.latest {
            None => out.push(segment.after(self.cursor)),
            Some(latest) => {
                for (frame, droppable) in segment.each_after(self.cursor) {
                    if droppable {
                        latest.held = Some(frame);
                    } else {
                        // What is held comes before this one, and may be the newest for long.
                        if let Some(held) = latest.held.take() {
                            latest.sent_at = Some(Instant::now());
                            out.push(held);
                        }
                        out.push(frame);
                    }
                }
            }
        }
        self.cursor = segment.last_seq();
    }

    /// Records the time from when the outcome was stored until now, when it is queued for the socket.
    fn record_delivery(&mut self, segment: &Segment, gateway: &Gateway) {
        let Some(outcome) = &segment.outcome else { return };
        let Some(trace) = self.trace.take() else { return };
        let (stored, now) = (outcome.time.into(), gateway.clock.now().into());
        gateway.traces.delivery(self.topic.uid, outcome.attempt, &trace, (stored, now));
    }

    /// Sends held progress when its time has come; says whether it has to wait.
    fn release(&mut self, out: &mut Outbox) -> bool {
        let Some(latest) = &mut self.latest else { return false };
        if latest.held.is_none() {
            return false;
        }
        let now = Instant::now();
        if latest.sent_at.is_some_and(|at| now.duration_since(at) < LATEST_INTERVAL) {
            return true;
        }
        if let Some(frame) = latest.held.take() {
            latest.sent_at = Some(now);
            out.push(frame);
        }
        false
    }
}

impl Session {
    /// Moves ready subscriptions on, until there is enough to write. Returns reads of the log that
    /// have to be made.
    pub(crate) fn deliver(&mut self, out: &mut Outbox, high_water: usize) -> Vec<Call> {
        let mut reads = Vec::new();
        let mut waiting = Vec::new();
        for uid in std::mem::take(&mut self.ready) {
            if out.bytes() >= high_water {
                waiting.push(uid);
                continue;
            }
            if self.deliver_one(uid, out, high_water, &mut reads) {
                waiting.push(uid);
            }
        }
        self.ready = waiting;
        reads
    }

    /// Says whether there is more that has to wait for room.
    fn deliver_one(
        &mut self,
        uid: Uid,
        out: &mut Outbox,
        high_water: usize,
        reads: &mut Vec<Call>,
    ) -> bool {
        let Some(subscription) = self.subscriptions.get_mut(uid) else { return false };
        subscription.link.looked();
        if let Some(refusal) = subscription.link.take_refusal() {
            self.drop_subscription(uid, &request_error(&refusal), out);
            return false;
        }
        if subscription.catching_up {
            return false;
        }
        loop {
            match subscription.topic.next(subscription.cursor) {
                Next::Segment(segment) => {
                    subscription.take(&segment, out);
                    subscription.record_delivery(&segment, &self.gateway);
                }
                Next::UpToDate => {
                    if subscription.release(out) {
                        self.gateway.hub.defer(subscription.link.clone());
                    }
                    return false;
                }
                Next::Ended => {
                    self.unsubscribe(uid);
                    return false;
                }
                Next::InLog if self.catching_up >= MAX_CATCHING_UP => return true,
                Next::InLog => {
                    self.catching_up += 1;
                    subscription.catching_up = true;
                    let (hub, cursor) = (self.gateway.hub.clone(), subscription.cursor);
                    let authorization = self.handle.authorization();
                    let link = subscription.link.clone();
                    reads.push(Box::pin(async move {
                        let page = hub.catch_up(uid, cursor, authorization).await;
                        Reply::CaughtUp(link, page)
                    }));
                    return false;
                }
            }
            if out.bytes() >= high_water {
                return true;
            }
        }
    }

    /// Takes in a page of the log, if the subscription that it was read for is still there.
    pub(crate) fn caught_up(
        &mut self,
        link: &Arc<Link>,
        page: Result<Vec<Event>, Status>,
        out: &mut Outbox,
    ) {
        self.catching_up -= 1;
        let uid = link.uid;
        let Some(subscription) = self.subscriptions.get_mut(uid) else { return };
        if !Arc::ptr_eq(&subscription.link, link) {
            return;
        }
        subscription.catching_up = false;
        let events = match page {
            Ok(events) => events,
            Err(status) if is_transient(status.code()) => {
                // The sweep of deferred connections brings us back here.
                tracing::warn!(%uid, %status, "could not read a log, will try again");
                self.gateway.hub.defer(subscription.link.clone());
                return;
            }
            Err(status) => {
                self.drop_subscription(uid, &request_error(&status), out);
                return;
            }
        };
        let Some(last) = events.last() else {
            let gone = RequestError::new(ErrorCode::NotFound, "the request is not there any more");
            self.drop_subscription(uid, &gone, out);
            return;
        };
        let ended = is_terminal(last);
        let segment = Segment::encode(&events, &subscription.topic.names);
        subscription.take(&segment, out);
        subscription.record_delivery(&segment, &self.gateway);
        if ended {
            self.unsubscribe(uid);
        } else {
            self.ready.push(uid);
        }
    }

    fn drop_subscription(&mut self, uid: Uid, error: &RequestError, out: &mut Outbox) {
        if let Some(subscription) = self.subscriptions.get(uid) {
            let request_id = subscription.topic.names.request_id.clone();
            out.push(messages::error(Some(&request_id), error, self.gateway.clock.now()));
        }
        self.unsubscribe(uid);
    }

    /// Ends a subscription; says whether there was one.
    pub(crate) fn unsubscribe(&mut self, uid: Uid) -> bool {
        match self.subscriptions.remove(uid) {
            Some(subscription) => {
                self.gateway.hub.leave(&subscription.topic, self.handle.id);
                true
            }
            None => false,
        }
    }
}

/// Whether the same call may succeed a little later.
fn is_transient(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::ResourceExhausted
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Aborted
            // What a connection that breaks off in the middle of an answer comes out as.
            | Code::Unknown
    )
}
