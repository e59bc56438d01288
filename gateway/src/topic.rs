//! Topic of a watched request: the most recent events of the request as frames, and its subscribers.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use streamer_core::{AttemptNumber, Seq, Timestamp, Uid};
use streamer_proto::{
    common::v1::{Event, event::Kind},
    millis,
};
use streamer_rpc::is_terminal;
use streamer_store::EventNumbers;
use tokio::task::AbortHandle;
use tonic::Status;

use crate::{
    connection_handle::ConnectionHandle,
    protocol::server_message::{self, RequestIds},
};

/// Maximum number of bytes of frames in memory, unless a single segment is larger. Subscribers further
/// behind read from the log.
const MAX_BYTES: usize = 256 * 1024;

/// Events that arrived together, as consecutive frames. They are encoded once and sent to any number of
/// sockets.
pub(crate) struct Segment {
    first_seq: Seq,
    frames: Bytes,
    index: Vec<FrameEnd>,
    /// Time of the last event.
    pub(crate) time: Timestamp,
    /// Attempt of the last event, if it is terminal.
    pub(crate) terminal: Option<AttemptNumber>,
}

struct FrameEnd {
    end: usize,
    /// Whether the event is progress, of which only the newest is sent in mode `latest`.
    droppable: bool,
}

impl Segment {
    /// Encodes contiguous events. `events` must not be empty.
    pub(crate) fn encode(events: &[Event], ids: &RequestIds) -> Self {
        let mut frames = Vec::with_capacity(events.len());
        let mut index = Vec::with_capacity(events.len());
        let mut end = 0;
        for event in events {
            let frame = server_message::event(event, ids);
            end += frame.len();
            let droppable = matches!(event.kind, Some(Kind::Progress(_)));
            index.push(FrameEnd { end, droppable });
            frames.push(frame);
        }
        let frames = match <[Bytes; 1]>::try_from(frames) {
            Ok([only]) => only,
            Err(several) => {
                let mut joined = BytesMut::with_capacity(end);
                several.iter().for_each(|frame| joined.extend_from_slice(frame));
                joined.freeze()
            }
        };
        let first_seq = events.first().map_or(Seq::NONE, EventNumbers::seq);
        let last = events.last();
        let time = last.and_then(|last| last.time.as_ref()).map_or(0, millis);
        let terminal = last.filter(|last| is_terminal(last)).map(EventNumbers::attempt_number);
        Self { first_seq, frames, index, time: Timestamp::from_millis(time), terminal }
    }

    pub(crate) fn last_seq(&self) -> Seq {
        self.first_seq.plus(self.index.len()).previous()
    }

    /// Returns all frames after `cursor`.
    pub(crate) fn after(&self, cursor: Seq) -> Bytes {
        match cursor.index_from(self.first_seq) {
            None => self.frames.clone(),
            Some(position) => self.frames.slice(self.index[position].end..),
        }
    }

    /// Returns an iterator over the frames after `cursor`, each with a flag that is set if it may be dropped.
    pub(crate) fn each_after(&self, cursor: Seq) -> impl Iterator<Item = (Bytes, bool)> {
        let skip = cursor.next().index_from(self.first_seq).unwrap_or(0);
        (skip..self.index.len()).map(|position| {
            let begin = position.checked_sub(1).map_or(0, |before| self.index[before].end);
            let frame = &self.index[position];
            (self.frames.slice(begin..frame.end), frame.droppable)
        })
    }
}

/// Size and last `seq` of a published segment.
pub(crate) struct Published {
    pub(crate) last_seq: Seq,
    pub(crate) bytes: usize,
}

/// Describes what follows the cursor of a subscriber.
pub(crate) enum Next {
    /// The segment that contains the next event.
    Segment(Arc<Segment>),
    /// The next event is not in memory and must be read from the log.
    InLog,
    /// No newer event exists yet.
    UpToDate,
    /// The topic has ended; no event will follow.
    Ended,
}

/// A connection that is subscribed to a topic.
pub(crate) struct Subscriber {
    pub(crate) uid: Uid,
    pub(crate) handle: Arc<ConnectionHandle>,
    /// Whether the connection has been notified and has not read the events yet.
    notified: AtomicBool,
    /// Status with which the subscription ends, if the connection may no longer receive the events.
    rejection: Mutex<Option<Status>>,
}

impl Subscriber {
    pub(crate) fn new(uid: Uid, handle: Arc<ConnectionHandle>) -> Arc<Self> {
        Arc::new(Self {
            uid,
            handle,
            notified: AtomicBool::new(false),
            rejection: Mutex::default(),
        })
    }

    /// Notifies the connection of new events.
    pub(crate) fn notify(&self) {
        if !self.notified.swap(true, Ordering::AcqRel) {
            self.handle.notify(self.uid);
        }
    }

    pub(crate) fn take_rejection(&self) -> Option<Status> {
        self.rejection.lock().take()
    }

    /// Resets the notification before the connection reads.
    pub(crate) fn clear_notification(&self) {
        self.notified.store(false, Ordering::Release);
    }
}

pub(crate) struct Topic {
    pub(crate) uid: Uid,
    pub(crate) ids: RequestIds,
    state: Mutex<State>,
}

struct State {
    segments: VecDeque<Arc<Segment>>,
    bytes: usize,
    last_seq: Seq,
    ended: bool,
    subscribers: HashMap<Uid, Arc<Subscriber>>,
    upstream: Option<AbortHandle>,
}

impl Topic {
    /// Creates a topic for the events after `last_seq`.
    pub(crate) fn new(uid: Uid, ids: RequestIds, last_seq: Seq) -> Self {
        let state = State {
            segments: VecDeque::new(),
            bytes: 0,
            last_seq,
            ended: false,
            subscribers: HashMap::new(),
            upstream: None,
        };
        Self { uid, ids, state: Mutex::new(state) }
    }

    pub(crate) fn last_seq(&self) -> Seq {
        self.state.lock().last_seq
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state.lock().ended
    }

    pub(crate) fn set_upstream(&self, upstream: AbortHandle) {
        self.state.lock().upstream = Some(upstream);
    }

    /// Appends contiguous events and notifies all subscribers.
    pub(crate) fn publish(&self, events: &[Event]) -> Option<Published> {
        let last = events.last()?;
        let segment = Arc::new(Segment::encode(events, &self.ids));
        let published = Published { last_seq: last.seq(), bytes: segment.frames.len() };
        let mut state = self.state.lock();
        if segment.first_seq != state.last_seq.next() {
            // The missing events are only in the log.
            state.segments.clear();
            state.bytes = 0;
        }
        state.last_seq = last.seq();
        state.ended |= is_terminal(last);
        state.bytes += segment.frames.len();
        state.segments.push_back(segment);
        while state.bytes > MAX_BYTES && state.segments.len() > 1 {
            if let Some(dropped) = state.segments.pop_front() {
                state.bytes -= dropped.frames.len();
            }
        }
        state.subscribers.values().for_each(|subscriber| subscriber.notify());
        Some(published)
    }

    /// Drops segments that end at or before `seq`; subscribers behind them read from the log.
    pub(crate) fn drop_through(&self, seq: Seq) {
        let mut state = self.state.lock();
        while state.segments.front().is_some_and(|first| first.last_seq() <= seq) {
            if let Some(dropped) = state.segments.pop_front() {
                state.bytes -= dropped.frames.len();
            }
        }
    }

    /// Ends the topic and notifies all subscribers.
    pub(crate) fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        state.subscribers.values().for_each(|subscriber| subscriber.notify());
    }

    /// Returns what follows `cursor`.
    pub(crate) fn next(&self, cursor: Seq) -> Next {
        let state = self.state.lock();
        if cursor >= state.last_seq {
            return if state.ended { Next::Ended } else { Next::UpToDate };
        }
        let found = state.segments.partition_point(|segment| segment.last_seq() <= cursor);
        match state.segments.get(found) {
            Some(segment) if segment.first_seq <= cursor.next() => Next::Segment(segment.clone()),
            _ => Next::InLog,
        }
    }

    pub(crate) fn subscribe(&self, subscriber: Arc<Subscriber>) {
        self.state.lock().subscribers.insert(subscriber.handle.id, subscriber);
    }

    /// Removes a subscriber. Returns whether no subscribers remain.
    pub(crate) fn unsubscribe(&self, connection: Uid) -> bool {
        let mut state = self.state.lock();
        state.subscribers.remove(&connection);
        let is_unused = state.subscribers.is_empty();
        if is_unused && let Some(upstream) = state.upstream.take() {
            upstream.abort();
        }
        is_unused
    }

    /// Returns any current subscriber, whose token can open the upstream watch.
    pub(crate) fn any_subscriber(&self) -> Option<Arc<Subscriber>> {
        self.state.lock().subscribers.values().next().cloned()
    }

    /// Removes a subscriber that may no longer receive the events, and notifies it.
    pub(crate) fn reject(&self, subscriber: &Arc<Subscriber>, rejection: Status) {
        {
            let mut state = self.state.lock();
            let id = subscriber.handle.id;
            if state.subscribers.get(&id).is_some_and(|known| Arc::ptr_eq(known, subscriber)) {
                state.subscribers.remove(&id);
            }
        }
        *subscriber.rejection.lock() = Some(rejection);
        subscriber.notify();
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::Timestamp;
    use streamer_proto::common::v1::{Output, Progress, Succeeded};

    use super::*;

    fn event(seq: i64, kind: Kind) -> Event {
        Event { seq, attempt: 1, time: None, kind: Some(kind) }
    }

    fn topic() -> Topic {
        let uid = Uid::new(Timestamp::default());
        Topic::new(uid, RequestIds { request_id: "r".into(), uid: uid.to_string() }, Seq::FIRST)
    }

    fn next(topic: &Topic, cursor: u32) -> Next {
        topic.next(cursor.into())
    }

    fn progress(seq: i64) -> Event {
        event(seq, Kind::Progress(Progress::default()))
    }

    #[test]
    fn a_segment_returns_the_frames_after_the_cursor() {
        let ids = RequestIds { request_id: "r".into(), uid: "u".into() };
        let events = [progress(2), event(3, Kind::Output(Output::default())), progress(4)];
        let segment = Segment::encode(&events, &ids);
        let each: Vec<_> = segment.each_after(Seq::from(1)).collect();
        assert_eq!(
            each.iter().map(|(_, droppable)| *droppable).collect::<Vec<_>>(),
            [true, false, true]
        );
        let joined =
            |from: usize| each[from..].iter().flat_map(|(f, _)| f.to_vec()).collect::<Vec<_>>();
        assert_eq!(segment.after(Seq::from(1)), joined(0));
        assert_eq!(segment.after(Seq::from(2)), joined(1));
        assert_eq!(segment.after(Seq::from(4)), joined(3));
        assert_eq!(segment.each_after(Seq::from(3)).next().unwrap().0, each[2].0);
        assert_eq!(segment.last_seq(), Seq::from(4));
    }

    #[test]
    fn a_cursor_moves_through_segments_to_the_end() {
        let topic = topic();
        topic.publish(&[progress(2), progress(3)]);
        topic.publish(&[progress(4)]);
        assert!(matches!(next(&topic, 0), Next::InLog));
        for (cursor, last) in [(1, 3), (2, 3), (3, 4)] {
            let Next::Segment(segment) = next(&topic, cursor) else {
                panic!("nothing after {cursor}")
            };
            assert_eq!(segment.last_seq(), Seq::from(last));
        }
        assert!(matches!(next(&topic, 4), Next::UpToDate));
        topic.publish(&[event(5, Kind::Succeeded(Succeeded::default()))]);
        assert!(matches!(next(&topic, 4), Next::Segment(_)));
        assert!(matches!(next(&topic, 5), Next::Ended));
    }

    #[test]
    fn a_subscriber_far_behind_reads_from_the_log() {
        let topic = topic();
        let large = "x".repeat(MAX_BYTES / 2);
        for seq in 2..6 {
            let progress = Progress { message: large.clone(), ..Progress::default() };
            topic.publish(&[event(seq, Kind::Progress(progress))]);
        }
        assert!(matches!(next(&topic, 1), Next::InLog));
        assert!(matches!(next(&topic, 4), Next::Segment(_)));
    }
}
