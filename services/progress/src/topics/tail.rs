//! The latest events of one request, in memory: a pure data structure.

use std::collections::VecDeque;

use prost::Message;
use streamer_proto::common::v1::{Event, Request};
use streamer_rpc::{apply_event, compact_event, compact_request, is_terminal};

/// Events kept at most.
const MAX_EVENTS: usize = 1024;
/// Bytes kept at most, unless a single event is larger.
const MAX_BYTES: usize = 256 * 1024;

/// What a reader finds.
#[derive(Debug, PartialEq)]
pub(crate) enum Read {
    /// These come next.
    Events(Vec<Event>),
    /// What comes next is not in memory (any more): read it from the store.
    InStore,
    /// Nothing is newer yet.
    UpToDate,
    /// Nothing will follow.
    Ended,
}

/// A contiguous run of events that ends with the latest known one.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    /// The request as of the latest event; `None` until it is read from the store.
    snapshot: Option<Request>,
    events: VecDeque<Event>,
    bytes: usize,
    /// `seq` of the latest event known to be durable, in memory or not.
    last_seq: i64,
    ended: bool,
}

impl Tail {
    /// The request as of the latest event.
    pub(crate) fn snapshot(&self) -> Option<&Request> {
        self.snapshot.as_ref()
    }

    pub(crate) fn last_seq(&self) -> i64 {
        self.last_seq
    }

    /// What the events hold, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Replaces the snapshot by the request as it is stored. It may be older than the events here.
    pub(crate) fn load(&mut self, request: &Request) {
        use streamer_core::RequestState;
        let next = self.events.front().map_or(self.last_seq + 1, |first| first.seq);
        if request.last_seq + 1 < next {
            // It is older than what came before the events here.
            return;
        }
        if request.last_seq > self.last_seq {
            // The store is ahead: what lies between is read from there.
            self.clear();
            self.last_seq = request.last_seq;
        }
        let mut request = compact_request(request);
        for event in &self.events {
            apply_event(&mut request, event);
        }
        let state = streamer_rpc::state_from_proto(request.state);
        self.ended = state.is_some_and(RequestState::is_terminal);
        self.snapshot = Some(request);
    }

    /// Adds events that are durable. What is here already is passed over; after a gap, what came
    /// before it is dropped, and readers find it in the store.
    pub(crate) fn push(&mut self, events: &[Event]) {
        for event in events {
            if event.seq <= self.last_seq {
                continue;
            }
            if event.seq != self.last_seq + 1 {
                self.clear();
                // What was missed may have changed more than this event tells.
                self.snapshot = None;
            }
            let event = compact_event(event);
            if let Some(snapshot) = &mut self.snapshot {
                apply_event(snapshot, &event);
            }
            self.last_seq = event.seq;
            self.ended |= is_terminal(&event);
            self.bytes += held_bytes(&event);
            self.events.push_back(event);
        }
        while self.events.len() > 1 && (self.events.len() > MAX_EVENTS || self.bytes > MAX_BYTES) {
            self.drop_oldest();
        }
    }

    /// Drops the oldest events until those that are left hold at most `bytes`. Readers find dropped
    /// events in the store.
    pub(crate) fn shrink_to(&mut self, bytes: usize) {
        while self.bytes > bytes {
            self.drop_oldest();
        }
        self.events.shrink_to_fit();
    }

    fn drop_oldest(&mut self) {
        match self.events.pop_front() {
            Some(dropped) => self.bytes -= held_bytes(&dropped),
            None => self.bytes = 0,
        }
    }

    /// The request was deleted: nothing will follow.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    /// What comes after `after_seq`: at most `max_events`, ending once `max_bytes` are reached.
    pub(crate) fn read(&self, after_seq: i64, max_events: usize, max_bytes: usize) -> Read {
        if after_seq >= self.last_seq {
            return if self.ended { Read::Ended } else { Read::UpToDate };
        }
        let Some(first) = self.events.front() else { return Read::InStore };
        let Ok(skip) = usize::try_from(after_seq + 1 - first.seq) else { return Read::InStore };
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

/// Memory of an event that shares none: its fields, and what they point to.
fn held_bytes(event: &Event) -> usize {
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

    fn loaded(last_seq: i64) -> Tail {
        let mut tail = Tail::default();
        tail.load(&Request { last_seq, state: 2, ..Request::default() });
        tail
    }

    #[test]
    fn a_reader_gets_what_comes_after_its_cursor() {
        let mut tail = loaded(2);
        tail.push(&[progress(3), progress(4), progress(5)]);
        assert_eq!(seqs(&tail.read(2, 10, 1000)), [3, 4, 5]);
        assert_eq!(seqs(&tail.read(3, 1, 1000)), [4]);
        assert_eq!(tail.read(5, 10, 1000), Read::UpToDate);
        assert_eq!(tail.read(1, 10, 1000), Read::InStore);
    }

    #[test]
    fn repeats_are_passed_over_and_gaps_send_readers_to_the_store() {
        let mut tail = loaded(0);
        tail.push(&[progress(1), progress(2)]);
        tail.push(&[progress(2), progress(3)]);
        assert_eq!(seqs(&tail.read(0, 10, 1000)), [1, 2, 3]);
        tail.push(&[progress(6)]);
        assert_eq!(tail.read(3, 10, 1000), Read::InStore);
        assert_eq!(seqs(&tail.read(5, 10, 1000)), [6]);
    }

    #[test]
    fn old_events_are_dropped_beyond_the_bound() {
        let mut tail = loaded(0);
        for seq in 1..=2000 {
            tail.push(&[progress(seq)]);
        }
        assert_eq!(tail.read(0, 10, 1000), Read::InStore);
        assert_eq!(seqs(&tail.read(1999, 10, 1000)), [2000]);
    }

    #[test]
    fn a_tail_that_is_shrunk_sends_readers_to_the_store() {
        let mut tail = loaded(0);
        tail.push(&[progress(1), progress(2), progress(3)]);
        tail.shrink_to(held_bytes(&progress(3)));
        assert_eq!(tail.read(1, 10, 1000), Read::InStore);
        assert_eq!(seqs(&tail.read(2, 10, 1000)), [3]);
        tail.shrink_to(0);
        assert_eq!(tail.read(2, 10, 1000), Read::InStore);
        assert_eq!(tail.read(3, 10, 1000), Read::UpToDate);
        tail.push(&[progress(4)]);
        assert_eq!(seqs(&tail.read(3, 10, 1000)), [4]);
    }

    #[test]
    fn events_that_came_before_the_store_was_read_are_kept() {
        let mut tail = Tail::default();
        tail.push(&[progress(4), progress(5)]);
        tail.load(&Request { last_seq: 4, state: 2, ..Request::default() });
        assert_eq!(tail.snapshot().unwrap().last_seq, 5);
        assert_eq!(seqs(&tail.read(3, 10, 1000)), [4, 5]);
        tail.load(&Request { last_seq: 9, state: 2, ..Request::default() });
        assert_eq!(tail.read(5, 10, 1000), Read::InStore);
        assert_eq!(tail.read(9, 10, 1000), Read::UpToDate);
    }

    #[test]
    fn a_terminal_event_ends_it() {
        let mut tail = loaded(1);
        let kind = Some(Kind::Succeeded(Succeeded::default()));
        tail.push(&[Event { seq: 2, attempt: 1, time: None, kind }]);
        assert_eq!(seqs(&tail.read(1, 10, 1000)), [2]);
        assert_eq!(tail.read(2, 10, 1000), Read::Ended);
    }
}
