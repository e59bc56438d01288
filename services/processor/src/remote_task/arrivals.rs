//! Which reports of a remote attempt have arrived, and which were dropped and must come again.

use std::mem;

use streamer_handler::Reservation;
use streamer_proto::processor::v1::report::Kind;
use tonic::Status;

use crate::mailbox::{
    Full, MAX_BYTES, MAX_REPORTS, MIN_WINDOW_BYTES, Mailbox, compact, held_bytes,
};

/// What became of a report.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// It is in the mailbox.
    Delivered,
    /// There was no room for it: it and all that follow are dropped until they are asked for again.
    Dropped,
    /// It has arrived before, or what went before it was dropped.
    Ignored,
}

#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// Progress and output reports that have arrived.
    received: i64,
    /// How often reports were dropped on this stream.
    resends: i32,
    dropped: Option<Dropped>,
    /// For the dropped reports when they come again.
    reserved: Reservation,
}

/// Reports that were dropped since there was no room for one.
#[derive(Debug)]
struct Dropped {
    /// What must be reserved before they are asked for again; 0 afterwards.
    wanted: usize,
    /// The largest of their numbers.
    last_number: i64,
    /// Progress and output reports among them, and their bytes.
    events: usize,
    bytes: usize,
}

impl Arrivals {
    /// Of an attempt whose first `received` reports have arrived.
    pub(super) fn new(received: i64) -> Self {
        Self { received, ..Self::default() }
    }

    pub(super) fn received(&self) -> i64 {
        self.received
    }

    /// A new stream begins: the worker sends again what is not durable.
    pub(super) fn restart(&mut self) {
        *self = Self::new(self.received);
    }

    /// How many bytes must be reserved before dropped reports are asked for again; `None` while they need not be.
    pub(super) fn wanted(&self) -> Option<usize> {
        self.dropped.as_ref().map(|dropped| dropped.wanted).filter(|wanted| *wanted > 0)
    }

    /// The reports after the first number can be sent again, with the second number; `None` when they need not be.
    pub(super) fn ask_again(&mut self, reserved: Reservation) -> Option<(i64, i32)> {
        let dropped = self.dropped.as_mut().filter(|dropped| dropped.wanted > 0)?;
        dropped.wanted = 0;
        self.reserved = reserved;
        Some((self.received, self.resends))
    }

    /// Takes a report that the worker sent after it had been asked `resends` times.
    ///
    /// # Errors
    /// When it breaks the rules of the protocol.
    pub(super) fn take(
        &mut self,
        mailbox: &Mailbox,
        number: i64,
        resends: i32,
        kind: Kind,
    ) -> Result<Arrival, Status> {
        if resends != self.resends {
            if let Some(dropped) = &mut self.dropped {
                dropped.add(number, &kind)?;
            }
            return Ok(Arrival::Ignored);
        }
        if self.is_repeated(number, &kind)? {
            return Ok(Arrival::Ignored);
        }
        let needed = mailbox.needs_reserved(&kind);
        let Some(reserved) = self.reserve(mailbox, needed) else {
            let mut dropped = Dropped::new(needed);
            dropped.add(number, &kind)?;
            self.dropped = Some(dropped);
            self.resends += 1;
            return Ok(Arrival::Dropped);
        };
        mailbox.push(compact(kind), reserved).map_err(full)?;
        self.received = self.received.max(number);
        if self.dropped.as_ref().is_some_and(|dropped| dropped.last_number <= number) {
            self.dropped = None;
            self.reserved = Reservation::default();
        }
        Ok(Arrival::Delivered)
    }

    /// Whether a report has arrived before.
    fn is_repeated(&self, number: i64, kind: &Kind) -> Result<bool, Status> {
        let received = self.received;
        if is_event(kind) {
            if number <= received && number > 0 {
                return Ok(true); // sent again after a reconnect
            }
            if number != received + 1 {
                return Err(Status::invalid_argument(format!(
                    "report.number: must be {}, is {number}",
                    received + 1
                )));
            }
        } else if number != received {
            if matches!(kind, Kind::Checkpoint(_) | Kind::KeepAlive(_)) && number < received {
                return Ok(true);
            }
            return Err(Status::invalid_argument(format!(
                "report.number: {received} progress and output reports went before, not {number}"
            )));
        }
        Ok(false)
    }

    /// Reserves bytes for a report, of what is reserved for dropped reports first.
    fn reserve(&mut self, mailbox: &Mailbox, bytes: usize) -> Option<Reservation> {
        if self.reserved.bytes() >= bytes {
            return Some(self.reserved.split(bytes));
        }
        // What holds a part while it waits for the whole may wait for others that do the same.
        drop(mem::take(&mut self.reserved));
        mailbox.try_reserve(bytes)
    }
}

impl Dropped {
    fn new(needed: usize) -> Self {
        // Room for a report alone would make each one that follows it be sent again once more.
        Self { wanted: needed.max(MIN_WINDOW_BYTES), last_number: 0, events: 0, bytes: 0 }
    }

    /// Counts a dropped report. A worker has no more of them under way than may be unacknowledged.
    fn add(&mut self, number: i64, kind: &Kind) -> Result<(), Status> {
        self.last_number = self.last_number.max(number);
        if is_event(kind) {
            if self.events >= MAX_REPORTS || self.bytes >= MAX_BYTES {
                return Err(full(Full));
            }
            self.events += 1;
            self.bytes += held_bytes(kind);
        }
        Ok(())
    }
}

fn is_event(kind: &Kind) -> bool {
    matches!(kind, Kind::Progress(_) | Kind::Output(_))
}

fn full(Full: Full) -> Status {
    Status::resource_exhausted(format!(
        "more than {MAX_REPORTS} reports or {MAX_BYTES} bytes of them are not acknowledged \
         (welcome.max_unacknowledged, welcome.max_unacknowledged_bytes)"
    ))
}

#[cfg(test)]
mod tests {
    use streamer_handler::OutputBudget;
    use streamer_proto::common::v1::{Payload, Progress, payload::Body};
    use tonic::Code;

    use super::*;

    const BUDGET: usize = 1 << 20;

    fn output(bytes: usize) -> Kind {
        let body = Some(Body::Data(vec![0; bytes].into()));
        Kind::Output(Payload { content_type: String::new(), body })
    }

    fn small() -> Kind {
        Kind::Progress(Progress::default())
    }

    fn checkpoint() -> Kind {
        Kind::Checkpoint(vec![0; 3000].into())
    }

    #[tokio::test]
    async fn a_report_without_room_is_dropped_with_those_after_it_and_asked_for_once_there_is_room()
    {
        let budget = OutputBudget::new(BUDGET);
        let other = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let mailbox = Mailbox::new(budget.clone(), "acme");
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.take(&mailbox, 1, 0, small()).unwrap(), Arrival::Delivered);
        assert_eq!(arrivals.take(&mailbox, 2, 0, output(100_000)).unwrap(), Arrival::Dropped);
        assert_eq!(arrivals.wanted(), Some(100_000));
        for (number, kind) in [(3, small()), (3, checkpoint())] {
            assert_eq!(arrivals.take(&mailbox, number, 0, kind).unwrap(), Arrival::Ignored);
        }
        drop(other);
        let reserved = mailbox.reserve(100_000).await;
        assert_eq!(arrivals.ask_again(reserved), Some((1, 1)));
        assert_eq!(arrivals.wanted(), None);
        assert_eq!(arrivals.take(&mailbox, 4, 0, small()).unwrap(), Arrival::Ignored, "under way");
        for (number, kind) in [(2, output(100_000)), (3, small()), (3, checkpoint())] {
            assert_eq!(arrivals.take(&mailbox, number, 1, kind).unwrap(), Arrival::Delivered);
        }
        assert_eq!(arrivals.take(&mailbox, 4, 1, small()).unwrap(), Arrival::Delivered);
        assert_eq!((arrivals.received(), budget.used()), (4, 103_000));
    }

    #[tokio::test]
    async fn what_is_reserved_for_dropped_reports_serves_those_that_follow_and_is_released_after_them()
     {
        let budget = OutputBudget::new(BUDGET);
        let other = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let mailbox = Mailbox::new(budget.clone(), "acme");
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.take(&mailbox, 1, 0, output(5000)).unwrap(), Arrival::Dropped);
        assert_eq!(arrivals.take(&mailbox, 2, 0, output(5000)).unwrap(), Arrival::Ignored);
        assert_eq!(arrivals.wanted(), Some(MIN_WINDOW_BYTES));
        drop(other);
        let reserved = mailbox.reserve(MIN_WINDOW_BYTES).await;
        assert_eq!(arrivals.ask_again(reserved), Some((0, 1)));
        let _full = budget.try_reserve(&"globex".into(), BUDGET - MIN_WINDOW_BYTES).unwrap();
        for number in [1, 2] {
            assert_eq!(
                arrivals.take(&mailbox, number, 1, output(5000)).unwrap(),
                Arrival::Delivered
            );
        }
        assert_eq!(budget.used(), BUDGET - MIN_WINDOW_BYTES + 10_000);
    }

    #[test]
    fn a_worker_that_sends_on_beyond_its_window_breaks_a_rule() {
        let budget = OutputBudget::new(BUDGET);
        let _all = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let mailbox = Mailbox::new(budget, "acme");
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.take(&mailbox, 1, 0, output(MAX_BYTES - 1)).unwrap(), Arrival::Dropped);
        assert_eq!(arrivals.take(&mailbox, 2, 0, output(5000)).unwrap(), Arrival::Ignored);
        let refused = arrivals.take(&mailbox, 3, 0, output(5000)).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
    }

    #[test]
    fn a_new_stream_begins_without_dropped_reports() {
        let budget = OutputBudget::new(BUDGET);
        let all = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let mailbox = Mailbox::new(budget.clone(), "acme");
        let mut arrivals = Arrivals::new(7);
        assert_eq!(arrivals.take(&mailbox, 8, 0, output(5000)).unwrap(), Arrival::Dropped);
        arrivals.restart();
        assert_eq!(arrivals.ask_again(Reservation::default()), None);
        drop(all);
        assert_eq!(
            arrivals.take(&mailbox, 7, 0, output(5000)).unwrap(),
            Arrival::Ignored,
            "repeated"
        );
        assert_eq!(arrivals.take(&mailbox, 8, 0, output(5000)).unwrap(), Arrival::Delivered);
    }

    #[test]
    fn numbers_have_no_gaps() {
        let mailbox = Mailbox::new(OutputBudget::new(BUDGET), "acme");
        let mut arrivals = Arrivals::new(2);
        for (number, kind) in [(4, small()), (0, small()), (3, checkpoint())] {
            let refused = arrivals.take(&mailbox, number, 0, kind).unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
        }
        assert_eq!(arrivals.take(&mailbox, 1, 0, checkpoint()).unwrap(), Arrival::Ignored);
    }
}
