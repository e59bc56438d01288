//! Window of the reports of one attempt that the server has not acknowledged. Performs no I/O.

use std::collections::VecDeque;

use streamer_handler::Report;
use streamer_proto::{
    common::v1::{Payload, Progress, payload::Body},
    processor::v1::{KeepAlive, report::Kind},
};
use streamer_rpc::json_payload;

/// Limits on the unacknowledged reports of one attempt, from `welcome`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WindowLimits {
    pub(crate) reports: usize,
    pub(crate) bytes: usize,
}

#[derive(Debug, Default)]
pub(crate) struct SendWindow {
    entries: VecDeque<Entry>,
    /// Number of entries sent on the current stream, counted from the oldest.
    sent: usize,
    /// Totals of the progress and output reports in `entries`.
    events: EventTotals,
    /// Totals of the progress and output reports that were sent on the current stream.
    sent_events: EventTotals,
    /// Number of the latest progress or output report.
    last_number: i64,
    keep_alive: bool,
    ended: bool,
}

/// Number and total bytes of progress and output reports.
#[derive(Clone, Copy, Debug, Default)]
struct EventTotals {
    reports: usize,
    bytes: usize,
}

impl EventTotals {
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

    fn fits(self, limits: WindowLimits) -> bool {
        self.reports < limits.reports && self.bytes < limits.bytes
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

impl SendWindow {
    /// Returns whether the window has capacity for another report from the handler.
    pub(crate) fn has_room(&self, limits: WindowLimits) -> bool {
        !self.ended && self.events.fits(limits)
    }

    /// Adds a report from the handler.
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

    /// Removes the newest entry if it is a checkpoint, because a later checkpoint replaces it.
    fn drop_superseded_checkpoint(&mut self) {
        if matches!(self.entries.back(), Some(Entry { kind: Kind::Checkpoint(_), .. })) {
            self.entries.pop_back();
            self.sent = self.sent.min(self.entries.len());
        }
    }

    /// Adds the last report of the attempt, unless it was added before.
    pub(crate) fn end(&mut self, kind: Kind) {
        if !self.ended {
            self.ended = true;
            self.entries.push_back(Entry { number: self.last_number, kind, bytes: 0 });
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Returns the next report to send on the current stream, with its number. Returns `None` if no report is pending,
    /// or if `limits`, which may be lower than when the report was added, do not allow it.
    pub(crate) fn next(&mut self, limits: WindowLimits) -> Option<(i64, Kind)> {
        if let Some(entry) = self.entries.get(self.sent) {
            if entry.is_event() && !self.sent_events.fits(limits) {
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

    /// Removes reports up to the given number, which are durable.
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

    /// Prepares the window for a new stream: removes reports up to the given number, and marks the remaining ones as
    /// unsent.
    pub(crate) fn resume(&mut self, number: i64) {
        self.acknowledge(number);
        self.sent = 0;
        self.sent_events = EventTotals::default();
    }

    /// Marks the reports after the given number as unsent, because the server has dropped them.
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

    const WINDOW: WindowLimits = WindowLimits { reports: 2, bytes: 10 };

    fn progress(message: &str) -> Report {
        Report::Progress { percentage: None, message: message.into(), metadata: None }
    }

    fn sent(send_window: &mut SendWindow) -> Vec<String> {
        sent_within(send_window, WindowLimits { reports: 100, bytes: 1000 })
    }

    fn sent_within(send_window: &mut SendWindow, limits: WindowLimits) -> Vec<String> {
        std::iter::from_fn(|| send_window.next(limits))
            .map(|(number, kind)| match kind {
                Kind::Progress(progress) => format!("{number}:{}", progress.message),
                Kind::Checkpoint(data) => format!("{number}:[{}]", String::from_utf8_lossy(&data)),
                Kind::Result(_) => format!("{number}:end"),
                other => format!("{number}:{other:?}"),
            })
            .collect()
    }

    #[test]
    fn reports_are_numbered_and_limited_by_the_window() {
        let mut send_window = SendWindow::default();
        assert!(send_window.has_room(WINDOW));
        send_window.push(progress("a"));
        send_window.push(progress("b"));
        assert!(!send_window.has_room(WINDOW), "two are unacknowledged");
        send_window.acknowledge(1);
        assert!(send_window.has_room(WINDOW));
        send_window.push(progress("0123456789"));
        send_window.acknowledge(2);
        assert!(!send_window.has_room(WINDOW), "ten bytes are unacknowledged");
        assert_eq!(sent(&mut send_window), ["3:0123456789"]);
    }

    #[test]
    fn a_new_stream_resends_reports_that_may_not_be_durable() {
        let mut send_window = SendWindow::default();
        for report in [
            progress("a"),
            Report::Checkpoint("1".into()),
            progress("b"),
            Report::Checkpoint("2".into()),
            Report::Checkpoint("3".into()),
            progress("c"),
        ] {
            send_window.push(report);
        }
        send_window.end(Kind::Result(Payload::default()));
        assert_eq!(sent(&mut send_window), ["1:a", "1:[1]", "2:b", "2:[3]", "3:c", "3:end"]);
        send_window.resume(2);
        assert_eq!(sent(&mut send_window), ["2:[3]", "3:c", "3:end"]);
        send_window.resume(3);
        assert_eq!(sent(&mut send_window), ["3:end"]);
        assert!(!send_window.has_room(WINDOW), "the last report was added");
    }

    #[test]
    fn dropped_reports_are_sent_again_in_order() {
        let mut send_window = SendWindow::default();
        for report in [progress("a"), Report::Checkpoint("1".into()), progress("b"), progress("c")]
        {
            send_window.push(report);
        }
        send_window.end(Kind::Result(Payload::default()));
        assert_eq!(sent(&mut send_window), ["1:a", "1:[1]", "2:b", "3:c", "3:end"]);
        send_window.resend(2);
        assert_eq!(sent(&mut send_window), ["3:c", "3:end"]);
        send_window.resend(1);
        assert_eq!(sent(&mut send_window), ["1:[1]", "2:b", "3:c", "3:end"]);
        send_window.acknowledge(2);
        send_window.resend(2);
        assert_eq!(sent(&mut send_window), ["3:c", "3:end"]);
    }

    #[test]
    fn a_smaller_window_applies_until_enough_is_acknowledged() {
        let mut send_window = SendWindow::default();
        let limits = |bytes| WindowLimits { reports: 10, bytes };
        send_window.push(progress("0123"));
        send_window.push(progress("4567"));
        assert!(send_window.has_room(limits(10)) && !send_window.has_room(limits(8)));
        send_window.acknowledge(1);
        assert!(send_window.has_room(limits(8)) && !send_window.has_room(limits(4)));
        send_window.acknowledge(2);
        assert!(send_window.has_room(limits(4)));
    }

    #[test]
    fn a_resend_respects_a_smaller_window() {
        let mut send_window = SendWindow::default();
        for message in ["0123", "4567", "89"] {
            send_window.push(progress(message));
        }
        send_window.end(Kind::Result(Payload::default()));
        let limits = WindowLimits { reports: 10, bytes: 4 };
        assert_eq!(sent(&mut send_window), ["1:0123", "2:4567", "3:89", "3:end"]);
        send_window.resend(1);
        assert_eq!(sent_within(&mut send_window, limits), [""; 0], "the first is not acknowledged");
        send_window.acknowledge(1);
        assert_eq!(sent_within(&mut send_window, limits), ["2:4567"]);
        send_window.resume(2);
        assert_eq!(sent_within(&mut send_window, limits), ["3:89", "3:end"]);
    }

    #[test]
    fn a_later_checkpoint_replaces_one_that_was_sent() {
        let mut send_window = SendWindow::default();
        send_window.push(progress("a"));
        send_window.push(Report::Checkpoint("1".into()));
        assert_eq!(sent(&mut send_window), ["1:a", "1:[1]"]);
        send_window.push(Report::Checkpoint("2".into()));
        assert_eq!(sent(&mut send_window), ["1:[2]"]);
    }

    #[test]
    fn a_keep_alive_is_sent_only_without_other_reports() {
        let mut send_window = SendWindow::default();
        send_window.push(Report::KeepAlive);
        send_window.push(progress("a"));
        assert_eq!(sent(&mut send_window), ["1:a"]);
        send_window.push(Report::KeepAlive);
        send_window.push(Report::KeepAlive);
        assert_eq!(sent(&mut send_window), [format!("1:{:?}", Kind::KeepAlive(KeepAlive {}))]);
    }
}
