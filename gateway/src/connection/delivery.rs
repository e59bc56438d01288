//! Delivers events to a connection, with a cursor for each subscription.

use std::sync::Arc;

use streamer_core::{ErrorCode, RequestError, Uid};
use streamer_proto::common::v1::Event;
use streamer_rpc::{is_terminal, request_error};
use tonic::{Code, Status};

use super::{Call, Reply, Session};
use crate::{
    protocol::server_message,
    topic::{Next, Segment, Subscriber},
    ws::send_buffer::SendBuffer,
};

/// Maximum number of pending log reads per connection.
const MAX_LOG_READS: usize = 4;

impl Session {
    /// Advances ready subscriptions until the high-water mark is reached. Returns the log reads that
    /// must be started.
    pub(crate) fn deliver(&mut self, out: &mut SendBuffer, high_water: usize) -> Vec<Call> {
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

    /// Advances a subscription. Returns whether it must be advanced again once capacity is available.
    fn deliver_one(
        &mut self,
        uid: Uid,
        out: &mut SendBuffer,
        high_water: usize,
        reads: &mut Vec<Call>,
    ) -> bool {
        let Some(subscription) = self.subscriptions.get_mut(uid) else { return false };
        subscription.subscriber.clear_notification();
        if let Some(rejection) = subscription.subscriber.take_rejection() {
            self.drop_subscription(uid, &request_error(&rejection), out);
            return false;
        }
        if subscription.reading_log {
            return false;
        }
        loop {
            match subscription.topic.next(subscription.cursor) {
                Next::Segment(segment) => {
                    subscription.queue_segment(&segment, out);
                    subscription.record_delivery(&segment, &self.gateway);
                }
                Next::UpToDate => {
                    if subscription.send_held_progress(out) {
                        self.gateway.fanout.defer(subscription.subscriber.clone());
                    }
                    return false;
                }
                Next::Ended => {
                    self.unsubscribe(uid);
                    return false;
                }
                Next::InLog if self.log_reads >= MAX_LOG_READS => return true,
                Next::InLog => {
                    self.log_reads += 1;
                    subscription.reading_log = true;
                    let (fanout, cursor) = (self.gateway.fanout.clone(), subscription.cursor);
                    let authorization = self.handle.authorization();
                    let subscriber = subscription.subscriber.clone();
                    reads.push(Box::pin(async move {
                        let page = fanout.read_log(uid, cursor, authorization).await;
                        Reply::LogPage(subscriber, page)
                    }));
                    return false;
                }
            }
            if out.bytes() >= high_water {
                return true;
            }
        }
    }

    /// Queues a page of the log if the subscription for which it was read still exists.
    pub(crate) fn handle_log_page(
        &mut self,
        subscriber: &Arc<Subscriber>,
        page: Result<Vec<Event>, Status>,
        out: &mut SendBuffer,
    ) {
        self.log_reads -= 1;
        let uid = subscriber.uid;
        let Some(subscription) = self.subscriptions.get_mut(uid) else { return };
        if !Arc::ptr_eq(&subscription.subscriber, subscriber) {
            return;
        }
        subscription.reading_log = false;
        let events = match page {
            Ok(events) => events,
            Err(status) if is_transient(status.code()) => {
                // The read is retried when deferred subscribers are notified.
                tracing::warn!(%uid, %status, "failed to read a log; retrying");
                self.gateway.fanout.defer(subscription.subscriber.clone());
                return;
            }
            Err(status) => {
                self.drop_subscription(uid, &request_error(&status), out);
                return;
            }
        };
        let Some(last) = events.last() else {
            let error = RequestError::new(ErrorCode::NotFound, "request not found (deleted)");
            self.drop_subscription(uid, &error, out);
            return;
        };
        let ended = is_terminal(last);
        let segment = Segment::encode(&events, &subscription.topic.ids);
        subscription.queue_segment(&segment, out);
        subscription.record_delivery(&segment, &self.gateway);
        if ended {
            self.unsubscribe(uid);
        } else {
            self.ready.push(uid);
        }
    }

    fn drop_subscription(&mut self, uid: Uid, error: &RequestError, out: &mut SendBuffer) {
        if let Some(subscription) = self.subscriptions.get(uid) {
            let request_id = subscription.topic.ids.request_id.clone();
            out.push(server_message::error(Some(&request_id), error, self.gateway.clock.now()));
        }
        self.unsubscribe(uid);
    }

    /// Ends a subscription. Returns whether it existed.
    pub(crate) fn unsubscribe(&mut self, uid: Uid) -> bool {
        match self.subscriptions.remove(uid) {
            Some(subscription) => {
                self.gateway.fanout.leave(&subscription.topic, self.handle.id);
                true
            }
            None => false,
        }
    }
}

/// Returns whether a retry may succeed.
fn is_transient(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::ResourceExhausted
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Aborted
            // Returned if the connection breaks during a response.
            | Code::Unknown
    )
}
