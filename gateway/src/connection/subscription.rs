//! Subscription of one connection to one request.

use std::sync::Arc;

use bytes::Bytes;
use streamer_core::{Seq, Timestamp, WatchPermit};
use streamer_telemetry::TraceContext;
use tokio::time::Instant;

use crate::{
    fanout::LATEST_INTERVAL,
    gateway::Gateway,
    topic::{Next, Segment, Subscriber, Topic},
    ws::send_buffer::SendBuffer,
};

/// Subscription of one connection to one request.
pub(crate) struct Subscription {
    pub(crate) topic: Arc<Topic>,
    pub(crate) subscriber: Arc<Subscriber>,
    _watch: WatchPermit,
    /// `seq` of the last event that was sent or skipped.
    pub(super) cursor: Seq,
    latest: Option<Latest>,
    /// Whether a page of the log is being read.
    pub(super) reading_log: bool,
    /// Trace context of the submission, if it is traced. The delivery of the outcome is then also traced.
    trace: Option<Box<TraceContext>>,
    /// Time from which the delivery of events is measured. Earlier events are replayed.
    since: Timestamp,
}

/// State of the mode `latest`, which sends only the newest progress event and limits the rate.
#[derive(Default)]
struct Latest {
    sent_at: Option<Instant>,
    held: Option<Bytes>,
}

impl Subscription {
    pub(crate) fn new(
        topic: Arc<Topic>,
        subscriber: Arc<Subscriber>,
        watch: WatchPermit,
        cursor: Seq,
        latest: bool,
        now: Timestamp,
    ) -> Self {
        Self {
            topic,
            subscriber,
            _watch: watch,
            cursor,
            latest: latest.then(Latest::default),
            reading_log: false,
            trace: None,
            since: now,
        }
    }

    /// Attaches the trace context of the submission that created this subscription.
    pub(crate) fn with_trace(self, trace: Option<Box<TraceContext>>) -> Self {
        Self { trace: trace.filter(|trace| trace.is_sampled()), ..self }
    }

    /// Returns whether the terminal event has been sent.
    pub(crate) fn is_complete(&self) -> bool {
        !self.reading_log && matches!(self.topic.next(self.cursor), Next::Ended)
    }

    /// Queues the events of a segment that follow the cursor.
    pub(super) fn queue_segment(&mut self, segment: &Segment, out: &mut SendBuffer) {
        match &mut self.latest {
            None => out.push(segment.after(self.cursor)),
            Some(latest) => {
                for (frame, droppable) in segment.each_after(self.cursor) {
                    if droppable {
                        latest.held = Some(frame);
                    } else {
                        // The held progress event precedes this event and may remain the newest for a long time.
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

    /// Records the time between the last event of a segment and queueing it for the socket.
    pub(super) fn record_delivery(&mut self, segment: &Segment, gateway: &Gateway) {
        // In mode `latest`, progress is delayed or dropped.
        let is_measured = segment.time >= self.since && self.latest.is_none();
        if !is_measured && segment.terminal.is_none() {
            return;
        }
        let now = gateway.clock.now();
        if is_measured {
            let delay = now.since(segment.time);
            gateway.metrics.delivery_seconds.observe_in(delay, self.trace.as_deref());
        }
        let Some(attempt) = segment.terminal else { return };
        let Some(trace) = self.trace.take() else { return };
        let interval = (segment.time.into(), now.into());
        gateway.traces.delivery(self.topic.uid, attempt, &trace, interval);
    }

    /// Queues the held progress event if the interval has ended. Returns whether the event must still wait.
    pub(super) fn send_held_progress(&mut self, out: &mut SendBuffer) -> bool {
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
