//! Latest events of one request, kept in memory. Performs no I/O.

use std::collections::VecDeque;

use prost::Message;
use streamer_core::Seq;
use streamer_proto::common::v1::{Event, Request};
use streamer_rpc::{apply_event, compact_event, compact_request, is_terminal};
use streamer_store::{EventNumbers, RequestNumbers};

/// Maximum number of events in a tail.
const MAX_EVENTS: usize = 1024;
/// Maximum bytes of the events in a tail, unless a single event is larger.
const MAX_BYTES: usize = 256 * 1024;

/// Result of a read.
#[derive(Debug, PartialEq)]
pub(crate) enum Read {
    /// The next events.
    Events(Vec<Event>),
    /// The next events are not in memory and must be read from the store.
    InStore,
    /// No newer event exists yet.
    UpToDate,
    /// The log has ended: no event will follow.
    Ended,
}

/// Contiguous sequence of events that ends with the latest known one.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    /// Request as of the latest event; `None` until it is loaded.
    snapshot: Option<Request>,
    events: VecDeque<Event>,
    bytes: usize,
    /// `seq` of the latest event known to be durable, in memory or not.
    last_seq: Seq,
    ended: bool,
}

impl Tail {
    /// Returns the request as of the latest event; `None` if it is not loaded.
    pub(crate) fn snapshot(&self) -> Option<&Request> {
        self.snapshot.as_ref()
    }

    pub(crate) fn last_seq(&self) -> Seq {
        self.last_seq
    }

    /// Returns the total bytes of the events.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Replaces the snapshot with the stored request, which may be older than the events in memory.
    pub(crate) fn load(&mut self, request: &Request) {
        use streamer_core::RequestState;
        let next = self.events.front().map_or(self.last_seq.next(), EventNumbers::seq);
        let stored = request.last_seq();
        if stored.next() < next {
            // Events are missing between the stored request and the events in memory.
            return;
        }
        if stored > self.last_seq {
            // The store is ahead: readers read the missing events from it.
            self.clear();
            self.last_seq = stored;
        }
        let mut request = compact_request(request);
        for event in &self.events {
            apply_event(&mut request, event);
        }
        let state = streamer_rpc::state_from_proto(request.state);
        self.ended = state.is_some_and(RequestState::is_terminal);
        self.snapshot = Some(request);
    }

    /// Adds durable events. Known events are skipped. If a gap precedes an event, all events before the gap are
    /// dropped, and readers read them from the store.
    pub(crate) fn push(&mut self, events: &[Event]) {
        for event in events {
            let seq = event.seq();
            if seq <= self.last_seq {
                continue;
            }
            if seq != self.last_seq.next() {
                self.clear();
                // The missing events may have changed fields that this event does not contain.
                self.snapshot = None;
            }
            let event = compact_event(event);
            if let Some(snapshot) = &mut self.snapshot {
                apply_event(snapshot, &event);
            }
            self.last_seq = seq;
            self.ended |= is_terminal(&event);
            self.bytes += memory_bytes(&event);
            self.events.push_back(event);
        }
        while self.events.len() > 1 && (self.events.len() > MAX_EVENTS || self.bytes > MAX_BYTES) {
            self.drop_oldest();
        }
    }

    /// Drops the oldest events until the remaining ones have at most `bytes` bytes. Readers read dropped events from
    /// the store.
    pub(crate) fn shrink_to(&mut self, bytes: usize) {
        while self.bytes > bytes {
            self.drop_oldest();
        }
        self.events.shrink_to_fit();
    }

    fn drop_oldest(&mut self) {
        match self.events.pop_front() {
            Some(dropped) => self.bytes -= memory_bytes(&dropped),
            None => self.bytes = 0,
        }
    }

    /// Marks the log as ended because the request was deleted.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    /// Reads at most `max_events` events after `after_seq`; the events end once they have `max_bytes` bytes.
    pub(crate) fn read(&self, after_seq: Seq, max_events: usize, max_bytes: usize) -> Read {
        if after_seq >= self.last_seq {
            return if self.ended { Read::Ended } else { Read::UpToDate };
        }
        let Some(first) = self.events.front() else { return Read::InStore };
        let Some(skip) = after_seq.next().index_from(first.seq()) else { return Read::InStore };
        let mut bytes = 0;
        let events = self
            .events
            .iter()
            .skip(skip)
            .take(max_events)
            .take_while(|event| {
                let within = bytes < max_bytes;
                bytes += event.encoded_len();
                within
            })
            .cloned()
            .collect();
        Read::Events(events)
    }

    fn clear(&mut self) {
        self.events = VecDeque::new();
        self.bytes = 0;
    }
}

/// Returns the approximate memory of an event that shares no buffers: its fields and the data that they refer to.
fn memory_bytes(event: &Event) -> usize {
    size_of::<Event>() + event.encoded_len()
}

#[cfg(test)]
mod tests {
    use streamer_proto::common::v1::{Progress, Succeeded, event::Kind};

    use super::*;

    fn progress(seq: i64) -> Event {
        Event { seq, attempt: 1, time: None, kind: Some(Kind::Progress(Progress::default())) }
    }

    fn seqs(read: &Read) -> Vec<i64> {
        match read {
            Read::Events(events) => events.iter().map(|event| event.seq).collect(),
            _ => panic!("{read:?}"),
        }
    }

    fn read(tail: &Tail, after_seq: u32, max_events: usize) -> Read {
        tail.read(after_seq.into(), max_events, 1000)
    }

    fn loaded(last_seq: i64) -> Tail {
        let mut tail = Tail::default();
        tail.load(&Request { last_seq, state: 2, ..Request::default() });
        tail
    }

    #[test]
    fn a_read_returns_the_events_after_the_cursor() {
        let mut tail = loaded(2);
        tail.push(&[progress(3), progress(4), progress(5)]);
        assert_eq!(seqs(&read(&tail, 2, 10)), [3, 4, 5]);
        assert_eq!(seqs(&read(&tail, 3, 1)), [4]);
        assert_eq!(read(&tail, 5, 10), Read::UpToDate);
        assert_eq!(read(&tail, 1, 10), Read::InStore);
    }

    #[test]
    fn duplicates_are_skipped_and_gaps_are_read_from_the_store() {
        let mut tail = loaded(0);
        tail.push(&[progress(1), progress(2)]);
        tail.push(&[progress(2), progress(3)]);
        assert_eq!(seqs(&read(&tail, 0, 10)), [1, 2, 3]);
        tail.push(&[progress(6)]);
        assert_eq!(read(&tail, 3, 10), Read::InStore);
        assert_eq!(seqs(&read(&tail, 5, 10)), [6]);
    }

    #[test]
    fn the_oldest_events_are_dropped_beyond_the_limit() {
        let mut tail = loaded(0);
        for seq in 1..=2000 {
            tail.push(&[progress(seq)]);
        }
        assert_eq!(read(&tail, 0, 10), Read::InStore);
        assert_eq!(seqs(&read(&tail, 1999, 10)), [2000]);
    }

    #[test]
    fn events_dropped_by_shrinking_are_read_from_the_store() {
        let mut tail = loaded(0);
        tail.push(&[progress(1), progress(2), progress(3)]);
        tail.shrink_to(memory_bytes(&progress(3)));
        assert_eq!(read(&tail, 1, 10), Read::InStore);
        assert_eq!(seqs(&read(&tail, 2, 10)), [3]);
        tail.shrink_to(0);
        assert_eq!(read(&tail, 2, 10), Read::InStore);
        assert_eq!(read(&tail, 3, 10), Read::UpToDate);
        tail.push(&[progress(4)]);
        assert_eq!(seqs(&read(&tail, 3, 10)), [4]);
    }

    #[test]
    fn events_pushed_before_the_load_are_kept() {
        let mut tail = Tail::default();
        tail.push(&[progress(4), progress(5)]);
        tail.load(&Request { last_seq: 4, state: 2, ..Request::default() });
        assert_eq!(tail.snapshot().unwrap().last_seq, 5);
        assert_eq!(seqs(&read(&tail, 3, 10)), [4, 5]);
        tail.load(&Request { last_seq: 9, state: 2, ..Request::default() });
        assert_eq!(read(&tail, 5, 10), Read::InStore);
        assert_eq!(read(&tail, 9, 10), Read::UpToDate);
    }

    #[test]
    fn a_terminal_event_ends_the_log() {
        let mut tail = loaded(1);
        let kind = Some(Kind::Succeeded(Succeeded::default()));
        tail.push(&[Event { seq: 2, attempt: 1, time: None, kind }]);
        assert_eq!(seqs(&read(&tail, 1, 10)), [2]);
        assert_eq!(read(&tail, 2, 10), Read::Ended);
    }
}
