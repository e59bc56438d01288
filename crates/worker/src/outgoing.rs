//! What an attempt has to say and the server has not acknowledged: a pure account of numbers.

use std::collections::VecDeque;

use streamer_handler::Report;
use streamer_proto::{
    common::v1::{Payload, Progress, payload::Body},
    processor::v1::{KeepAlive, report::Kind},
};
use streamer_rpc::json_payload;

/// How much may be unacknowledged, as the server says in `welcome`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) reports: usize,
    pub(crate) bytes: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    entries: VecDeque<Entry>,
    /// How many entries, from the front, went out on the stream that is open.
    sent: usize,
    /// Progress and output reports among the entries, and among those that went out.
    events: Size,
    sent_events: Size,
    /// Number of the last progress or output report.
    last_number: i64,
    keep_alive: bool,
    ended: bool,
}

/// Number and bytes of progress and output reports.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    reports: usize,
    bytes: usize,
}

impl Size {
    fn add(&mut self, entry: &Entry) {
        if entry.is_event() {
            self.reports += 1;
            self.bytes += entry.bytes;
        }
    }

    fn remove(&mut self, entry: &Entry) {
        if entry.is_event() {
            self.reports -= 1;
            self.bytes -= entry.bytes;
        }
    }

    fn fits(self, window: Window) -> bool {
        self.reports < window.reports && self.bytes < window.bytes
    }
}

#[derive(Debug)]
struct Entry {
    number: i64,
    kind: Kind,
    bytes: usize,
}

impl Entry {
    fn is_event(&self) -> bool {
        matches!(self.kind, Kind::Progress(_) | Kind::Output(_))
    }
}

impl Outgoing {
    /// Whether another report may be taken from the handler.
    pub(crate) fn has_room(&self, window: Window) -> bool {
        !self.ended && self.events.fits(window)
    }

    /// Adds what the handler reports.
    pub(crate) fn push(&mut self, report: Report) {
        let (kind, bytes) = match report {
            Report::Progress { percentage, message, metadata } => {
                let bytes = message.len() + metadata.as_ref().map_or(0, bytes::Bytes::len);
                let metadata = metadata.map(json_payload);
                (Kind::Progress(Progress { percentage, message, metadata }), bytes)
            }
            Report::Output { content_type, data } => {
                let bytes = data.len();
                (Kind::Output(Payload { content_type, body: Some(Body::Data(data)) }), bytes)
            }
            Report::Checkpoint(data) => {
                self.drop_superseded_checkpoint();
                (Kind::Checkpoint(data), 0)
            }
            Report::KeepAlive => {
                self.keep_alive = true;
                return;
            }
        };
        let mut entry = Entry { number: self.last_number, kind, bytes };
        if entry.is_event() {
            self.last_number += 1;
            entry.number = self.last_number;
        }
        self.events.add(&entry);
        self.entries.push_back(entry);
    }

    /// Of two checkpoints with nothing between them, the later one counts.
    fn drop_superseded_checkpoint(&mut self) {
        if matches!(self.entries.back(), Some(Entry { kind: Kind::Checkpoint(_), .. })) {
            self.entries.pop_back();
            self.sent = self.sent.min(self.entries.len());
        }
    }

    /// Adds the last report; whatever comes after it does not count.
    pub(crate) fn end(&mut self, kind: Kind) {
        if !self.ended {
            self.ended = true;
            self.entries.push_back(Entry { number: self.last_number, kind, bytes: 0 });
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// The next report to be sent on the open stream, with its number, as far as the window allows: it may be
    /// smaller than it was when the reports were made.
    pub(crate) fn next(&mut self, window: Window) -> Option<(i64, Kind)> {
        if let Some(entry) = self.entries.get(self.sent) {
            if entry.is_event() && !self.sent_events.fits(window) {
                return None;
            }
            self.sent += 1;
            self.sent_events.add(entry);
            self.keep_alive = false;
            return Some((entry.number, entry.kind.clone()));
        }
        std::mem::take(&mut self.keep_alive)
            .then(|| (self.last_number, Kind::KeepAlive(KeepAlive {})))
    }

    /// Reports up to this number are durable.
    pub(crate) fn acknowledge(&mut self, number: i64) {
        while let Some(first) = self.entries.front() {
            // A checkpoint that follows the last durable report may not be durable itself.
            let durable = match first.kind {
                Kind::Progress(_) | Kind::Output(_) => first.number <= number,
                Kind::Checkpoint(_) => first.number < number,
                Kind::Result(_) | Kind::Error(_) | Kind::Release(_) | Kind::KeepAlive(_) => false,
            };
            if !durable {
                return;
            }
            self.events.remove(first);
            if self.sent > 0 {
                self.sent_events.remove(first);
                self.sent -= 1;
            }
            self.entries.pop_front();
        }
    }

    /// A new stream goes on after this number: everything that is left is sent again.
    pub(crate) fn resume(&mut self, number: i64) {
        self.acknowledge(number);
        self.sent = 0;
        self.sent_events = Size::default();
    }

    /// The server has dropped the reports after this number: they are sent again.
    pub(crate) fn resend(&mut self, number: i64) {
        let has_arrived = |entry: &Entry| {
            if entry.is_event() { entry.number <= number } else { entry.number < number }
        };
        let arrived = self.entries.iter().take_while(|entry| has_arrived(entry)).count();
        for dropped in self.entries.range(arrived.min(self.sent)..self.sent) {
            self.sent_events.remove(dropped);
        }
        self.sent = self.sent.min(arrived);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Window = Window { reports: 2, bytes: 10 };

    fn progress(message: &str) -> Report {
        Report::Progress { percentage: None, message: message.into(), metadata: None }
    }

    fn told(outgoing: &mut Outgoing) -> Vec<String> {
        told_within(outgoing, Window { reports: 100, bytes: 1000 })
    }

    fn told_within(outgoing: &mut Outgoing, window: Window) -> Vec<String> {
        std::iter::from_fn(|| outgoing.next(window))
            .map(|(number, kind)| match kind {
                Kind::Progress(progress) => format!("{number}:{}", progress.message),
                Kind::Checkpoint(data) => format!("{number}:[{}]", String::from_utf8_lossy(&data)),
                Kind::Result(_) => format!("{number}:end"),
                other => format!("{number}:{other:?}"),
            })
            .collect()
    }

    #[test]
    fn reports_are_numbered_and_the_window_holds() {
        let mut outgoing = Outgoing::default();
        assert!(outgoing.has_room(WINDOW));
        outgoing.push(progress("a"));
        outgoing.push(progress("b"));
        assert!(!outgoing.has_room(WINDOW), "two are unacknowledged");
        outgoing.acknowledge(1);
        assert!(outgoing.has_room(WINDOW));
        outgoing.push(progress("0123456789"));
        outgoing.acknowledge(2);
        assert!(!outgoing.has_room(WINDOW), "ten bytes are unacknowledged");
        assert_eq!(told(&mut outgoing), ["3:0123456789"]);
    }

    #[test]
    fn a_new_stream_gets_what_is_not_durable_with_the_checkpoint_that_may_not_be() {
        let mut outgoing = Outgoing::default();
        for report in [
            progress("a"),
            Report::Checkpoint("1".into()),
            progress("b"),
            Report::Checkpoint("2".into()),
            Report::Checkpoint("3".into()),
            progress("c"),
        ] {
            outgoing.push(report);
        }
        outgoing.end(Kind::Result(Payload::default()));
        assert_eq!(told(&mut outgoing), ["1:a", "1:[1]", "2:b", "2:[3]", "3:c", "3:end"]);
        outgoing.resume(2);
        assert_eq!(told(&mut outgoing), ["2:[3]", "3:c", "3:end"]);
        outgoing.resume(3);
        assert_eq!(told(&mut outgoing), ["3:end"]);
        assert!(!outgoing.has_room(WINDOW), "it has ended");
    }

    #[test]
    fn dropped_reports_are_sent_again_from_the_first_one() {
        let mut outgoing = Outgoing::default();
        for report in [progress("a"), Report::Checkpoint("1".into()), progress("b"), progress("c")]
        {
            outgoing.push(report);
        }
        outgoing.end(Kind::Result(Payload::default()));
        assert_eq!(told(&mut outgoing), ["1:a", "1:[1]", "2:b", "3:c", "3:end"]);
        outgoing.resend(2);
        assert_eq!(told(&mut outgoing), ["3:c", "3:end"]);
        outgoing.resend(1);
        assert_eq!(told(&mut outgoing), ["1:[1]", "2:b", "3:c", "3:end"]);
        outgoing.acknowledge(2);
        outgoing.resend(2);
        assert_eq!(told(&mut outgoing), ["3:c", "3:end"]);
    }

    #[test]
    fn a_window_that_shrinks_holds_until_enough_is_acknowledged() {
        let mut outgoing = Outgoing::default();
        let window = |bytes| Window { reports: 10, bytes };
        outgoing.push(progress("0123"));
        outgoing.push(progress("4567"));
        assert!(outgoing.has_room(window(10)) && !outgoing.has_room(window(8)));
        outgoing.acknowledge(1);
        assert!(outgoing.has_room(window(8)) && !outgoing.has_room(window(4)));
        outgoing.acknowledge(2);
        assert!(outgoing.has_room(window(4)));
    }

    #[test]
    fn no_more_is_sent_again_than_a_smaller_window_allows() {
        let mut outgoing = Outgoing::default();
        for message in ["0123", "4567", "89"] {
            outgoing.push(progress(message));
        }
        outgoing.end(Kind::Result(Payload::default()));
        let window = Window { reports: 10, bytes: 4 };
        assert_eq!(told(&mut outgoing), ["1:0123", "2:4567", "3:89", "3:end"]);
        outgoing.resend(1);
        assert_eq!(told_within(&mut outgoing, window), [""; 0], "the first is not acknowledged");
        outgoing.acknowledge(1);
        assert_eq!(told_within(&mut outgoing, window), ["2:4567"]);
        outgoing.resume(2);
        assert_eq!(told_within(&mut outgoing, window), ["3:89", "3:end"]);
    }

    #[test]
    fn a_later_checkpoint_takes_the_place_of_one_that_went_out() {
        let mut outgoing = Outgoing::default();
        outgoing.push(progress("a"));
        outgoing.push(Report::Checkpoint("1".into()));
        assert_eq!(told(&mut outgoing), ["1:a", "1:[1]"]);
        outgoing.push(Report::Checkpoint("2".into()));
        assert_eq!(told(&mut outgoing), ["1:[2]"]);
    }

    #[test]
    fn a_sign_of_life_goes_out_only_when_nothing_else_does() {
        let mut outgoing = Outgoing::default();
        outgoing.push(Report::KeepAlive);
        outgoing.push(progress("a"));
        assert_eq!(told(&mut outgoing), ["1:a"]);
        outgoing.push(Report::KeepAlive);
        outgoing.push(Report::KeepAlive);
        assert_eq!(told(&mut outgoing), [format!("1:{:?}", Kind::KeepAlive(KeepAlive {}))]);
    }
}
