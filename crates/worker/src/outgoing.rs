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
    /// Progress and output reports among the entries.
    events: usize,
    bytes: usize,
    /// Number of the last progress or output report.
    last_number: i64,
    keep_alive: bool,
    ended: bool,
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
        !self.ended && self.events < window.reports && self.bytes < window.bytes
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
        let entry = Entry { number: self.last_number, kind, bytes };
        if entry.is_event() {
            self.last_number += 1;
            self.events += 1;
            self.bytes += bytes;
        }
        self.entries.push_back(Entry { number: self.last_number, ..entry });
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

    /// The next report to be sent on the open stream, with its number.
    pub(crate) fn next(&mut self) -> Option<(i64, Kind)> {
        if let Some(entry) = self.entries.get(self.sent) {
            self.sent += 1;
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
            if first.is_event() {
                self.events -= 1;
                self.bytes -= first.bytes;
            }
            self.entries.pop_front();
            self.sent = self.sent.saturating_sub(1);
        }
    }

    /// A new stream goes on after this number: everything that is left is sent again.
    pub(crate) fn resume(&mut self, number: i64) {
        self.acknowledge(number);
        self.sent = 0;
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
        std::iter::from_fn(|| outgoing.next())
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
