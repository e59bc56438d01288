//! Tracks which reports of a remote attempt have arrived, and which were dropped and must be resent.

use std::mem;

use streamer_core::saturate;
use streamer_handler::Reservation;
use streamer_proto::processor::v1::report::Kind;
use tonic::Status;

use crate::workers::report_buffer::{
    Full, MAX_BYTES, MAX_REPORTS, MIN_WINDOW_BYTES, ReportBuffer, compact, payload_size,
};

/// Result of the arrival of a report.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// The report was added to the buffer.
    Delivered,
    /// The buffer lacks capacity: the report and all later ones are dropped until they are requested again.
    Dropped,
    /// The report is a duplicate, or follows a dropped one.
    Ignored,
}

#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// Whether any report has arrived, including dropped ones.
    has_any: bool,
    /// Number of progress and output reports that have arrived.
    received: i64,
    /// Number of times that reports were dropped on the current stream.
    resends: i32,
    dropped: Option<Dropped>,
    /// Reservation for the dropped reports.
    reserved: Reservation,
}

/// Dropped reports, starting with the first one for which the buffer lacked capacity.
#[derive(Debug)]
struct Dropped {
    /// Bytes to reserve before the reports are requested again; 0 once they were requested.
    to_reserve: usize,
    /// Bytes that were reserved for the reports; 0 before they were requested, and once one of them has arrived.
    requested: usize,
    /// Highest number of the dropped reports.
    last_number: i64,
    /// Number of progress and output reports among the dropped ones.
    events: usize,
    /// Total bytes of these progress and output reports.
    bytes: usize,
}

impl Arrivals {
    /// Creates the state of an attempt whose first `received` reports have arrived.
    pub(super) fn new(received: i64) -> Self {
        Self { received, ..Self::default() }
    }

    /// Returns whether the worker has sent any report.
    pub(super) fn has_any(&self) -> bool {
        self.has_any || self.received > 0
    }

    /// Resets the state for a new stream, on which the worker resends the reports that are not durable.
    pub(super) fn restart(&mut self) {
        *self = Self { has_any: self.has_any, ..Self::new(self.received) };
    }

    /// Returns the bytes to reserve before dropped reports are requested again; `None` if none are
    /// pending.
    pub(super) fn bytes_to_reserve(&self) -> Option<usize> {
        self.dropped.as_ref().map(|dropped| dropped.to_reserve).filter(|bytes| *bytes > 0)
    }

    /// Requests dropped reports again, with a reservation for them. Returns the number of the last report that has
    /// arrived, and the number of resends; `None` if no dropped reports are pending.
    pub(super) fn request_resend(&mut self, reserved: Reservation) -> Option<(i64, i32)> {
        let dropped = self.dropped.as_mut().filter(|dropped| dropped.to_reserve > 0)?;
        dropped.requested = mem::take(&mut dropped.to_reserve);
        self.reserved = reserved;
        Some((self.received, self.resends))
    }

    /// Accepts a report that the worker sent after it received `resends` requests to resend.
    ///
    /// # Errors
    /// Fails if the report violates the protocol.
    pub(super) fn accept(
        &mut self,
        buffer: &ReportBuffer,
        number: i64,
        resends: i32,
        kind: Kind,
    ) -> Result<Arrival, Status> {
        self.has_any = true;
        if resends != self.resends {
            return self.ignore(number, resends, &kind);
        }
        if self.is_repeat(number, &kind)? {
            return Ok(Arrival::Ignored);
        }
        let needed = buffer.bytes_to_reserve(&kind);
        let Some(reserved) = self.reserve(buffer, needed) else {
            // Reports before the first dropped one can be sent again too: without capacity for both, an attempt could
            // lose its reservation to the former each time.
            let before = self.dropped.as_ref().map_or(0, |dropped| dropped.requested);
            let mut dropped = Dropped::new(needed + before.min(MAX_BYTES));
            dropped.add(number, &kind)?;
            self.dropped = Some(dropped);
            self.resends += 1;
            return Ok(Arrival::Dropped);
        };
        let is_new_event = is_event(&kind);
        buffer.push(compact(kind), reserved).map_err(full)?;
        self.received = self.received.max(number);
        if let Some(dropped) = self.dropped.as_mut().filter(|_| is_new_event) {
            dropped.requested = 0;
        }
        if self.dropped.as_ref().is_some_and(|dropped| dropped.last_number <= number) {
            self.dropped = None;
            self.reserved = Reservation::default();
        }
        Ok(Arrival::Delivered)
    }

    /// Ignores a report that the worker sent before it received the latest request to resend.
    fn ignore(&mut self, number: i64, resends: i32, kind: &Kind) -> Result<Arrival, Status> {
        let (received, current) = (self.received, self.resends);
        let in_flight = received.saturating_add(saturate::to_i64(MAX_REPORTS));
        match &mut self.dropped {
            Some(dropped) if resends < current && (0..=in_flight).contains(&number) => {
                dropped.add(number, kind)?;
                Ok(Arrival::Ignored)
            }
            _ => Err(Status::invalid_argument(format!(
                "report.resends: must be {current}, is {resends}, with report.number {number} after {received}"
            ))),
        }
    }

    /// Returns whether a report has already arrived. Fails if its number is out of order.
    fn is_repeat(&self, number: i64, kind: &Kind) -> Result<bool, Status> {
        let received = self.received;
        if is_event(kind) {
            if number <= received && number > 0 {
                return Ok(true); // resent after a reconnect
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
                "report.number: must be {received}, as in the last progress or output report, is {number}"
            )));
        }
        Ok(false)
    }

    /// Reserves bytes for a report, preferably from the reservation for dropped reports.
    fn reserve(&mut self, buffer: &ReportBuffer, bytes: usize) -> Option<Reservation> {
        if self.reserved.bytes() >= bytes {
            return Some(self.reserved.split(bytes));
        }
        // Attempts that keep part of a reservation while they wait for the rest could deadlock.
        drop(mem::take(&mut self.reserved));
        buffer.try_reserve(bytes)
    }
}

impl Dropped {
    fn new(needed: usize) -> Self {
        // With capacity for this report alone, each later report would be dropped again.
        let to_reserve = needed.max(MIN_WINDOW_BYTES);
        Self { to_reserve, requested: 0, last_number: 0, events: 0, bytes: 0 }
    }

    /// Counts a dropped report. Fails if the worker exceeds the limits on unacknowledged reports.
    fn add(&mut self, number: i64, kind: &Kind) -> Result<(), Status> {
        self.last_number = self.last_number.max(number);
        if is_event(kind) {
            if self.events >= MAX_REPORTS || self.bytes >= MAX_BYTES {
                return Err(full(Full));
            }
            self.events += 1;
            self.bytes += payload_size(kind);
        }
        Ok(())
    }
}

fn is_event(kind: &Kind) -> bool {
    matches!(kind, Kind::Progress(_) | Kind::Output(_))
}

fn full(Full: Full) -> Status {
    Status::resource_exhausted(format!(
        "more than {MAX_REPORTS} reports, or {MAX_BYTES} bytes of reports, are unacknowledged \
         (welcome.max_unacknowledged, welcome.max_unacknowledged_bytes)"
    ))
}

#[cfg(test)]
mod tests {
    use streamer_handler::MemoryBudget;
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
    async fn a_report_without_room_is_dropped_with_later_ones_and_resent_once_there_is_room() {
        let budget = MemoryBudget::new(BUDGET);
        let other = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let buffer = ReportBuffer::new(budget.clone(), "acme");
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.accept(&buffer, 1, 0, small()).unwrap(), Arrival::Delivered);
        assert_eq!(arrivals.accept(&buffer, 2, 0, output(100_000)).unwrap(), Arrival::Dropped);
        assert_eq!(arrivals.bytes_to_reserve(), Some(100_000));
        for (number, kind) in [(3, small()), (3, checkpoint())] {
            assert_eq!(arrivals.accept(&buffer, number, 0, kind).unwrap(), Arrival::Ignored);
        }
        drop(other);
        let reserved = buffer.reserve(100_000).await;
        assert_eq!(arrivals.request_resend(reserved), Some((1, 1)));
        assert_eq!(arrivals.bytes_to_reserve(), None);
        assert_eq!(
            arrivals.accept(&buffer, 4, 0, small()).unwrap(),
            Arrival::Ignored,
            "in transit"
        );
        for (number, kind) in [(2, output(100_000)), (3, small()), (3, checkpoint())] {
            assert_eq!(arrivals.accept(&buffer, number, 1, kind).unwrap(), Arrival::Delivered);
        }
        assert_eq!(arrivals.accept(&buffer, 4, 1, small()).unwrap(), Arrival::Delivered);
        assert_eq!((arrivals.received, budget.used()), (4, 103_000));
    }

    #[tokio::test]
    async fn a_resend_reservation_covers_all_dropped_reports_and_is_released_after_them() {
        let budget = MemoryBudget::new(BUDGET);
        let other = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let buffer = ReportBuffer::new(budget.clone(), "acme");
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.accept(&buffer, 1, 0, output(5000)).unwrap(), Arrival::Dropped);
        assert_eq!(arrivals.accept(&buffer, 2, 0, output(5000)).unwrap(), Arrival::Ignored);
        assert_eq!(arrivals.bytes_to_reserve(), Some(MIN_WINDOW_BYTES));
        drop(other);
        let reserved = buffer.reserve(MIN_WINDOW_BYTES).await;
        assert_eq!(arrivals.request_resend(reserved), Some((0, 1)));
        let _full = budget.try_reserve(&"globex".into(), BUDGET - MIN_WINDOW_BYTES).unwrap();
        for number in [1, 2] {
            assert_eq!(
                arrivals.accept(&buffer, number, 1, output(5000)).unwrap(),
                Arrival::Delivered
            );
        }
        assert_eq!(budget.used(), BUDGET - MIN_WINDOW_BYTES + 10_000);
    }

    #[tokio::test]
    async fn a_checkpoint_that_is_sent_again_does_not_take_the_reservation_each_time() {
        let budget = MemoryBudget::new(BUDGET);
        let buffer = ReportBuffer::new(budget.clone(), "acme");
        let large_checkpoint = || Kind::Checkpoint(vec![0; 200_000].into());
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.accept(&buffer, 0, 0, large_checkpoint()).unwrap(), Arrival::Delivered);
        drop(buffer.next().await);
        let other = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        assert_eq!(arrivals.accept(&buffer, 1, 0, output(5000)).unwrap(), Arrival::Dropped);
        drop(other);
        let mut wanted = Vec::new();
        for resends in 1.. {
            let bytes = arrivals.bytes_to_reserve().unwrap();
            wanted.push(bytes);
            let reserved = buffer.reserve(bytes).await;
            // Other tenants take the rest.
            let _rest = budget.try_reserve(&"globex".into(), BUDGET - bytes).unwrap();
            assert!(arrivals.request_resend(reserved).is_some());
            arrivals.accept(&buffer, 0, resends, large_checkpoint()).unwrap();
            let output = arrivals.accept(&buffer, 1, resends, output(5000)).unwrap();
            if output == Arrival::Delivered {
                break;
            }
        }
        assert_eq!(wanted, [MIN_WINDOW_BYTES, MIN_WINDOW_BYTES + 200_000]);
    }

    #[test]
    fn a_worker_that_exceeds_its_window_is_rejected() {
        let budget = MemoryBudget::new(BUDGET);
        let _all = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let buffer = ReportBuffer::new(budget, "acme");
        let mut arrivals = Arrivals::default();
        assert_eq!(
            arrivals.accept(&buffer, 1, 0, output(MAX_BYTES - 1)).unwrap(),
            Arrival::Dropped
        );
        assert_eq!(arrivals.accept(&buffer, 2, 0, output(5000)).unwrap(), Arrival::Ignored);
        let refused = arrivals.accept(&buffer, 3, 0, output(5000)).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
    }

    #[test]
    fn a_new_stream_forgets_dropped_reports() {
        let budget = MemoryBudget::new(BUDGET);
        let all = budget.try_reserve(&"globex".into(), BUDGET).unwrap();
        let buffer = ReportBuffer::new(budget.clone(), "acme");
        let mut arrivals = Arrivals::new(7);
        assert_eq!(arrivals.accept(&buffer, 8, 0, output(5000)).unwrap(), Arrival::Dropped);
        arrivals.restart();
        assert_eq!(arrivals.request_resend(Reservation::default()), None);
        drop(all);
        assert_eq!(
            arrivals.accept(&buffer, 7, 0, output(5000)).unwrap(),
            Arrival::Ignored,
            "repeated"
        );
        assert_eq!(arrivals.accept(&buffer, 8, 0, output(5000)).unwrap(), Arrival::Delivered);
    }

    #[test]
    fn gaps_in_report_numbers_are_rejected() {
        let buffer = ReportBuffer::new(MemoryBudget::new(BUDGET), "acme");
        let mut arrivals = Arrivals::new(2);
        for (number, kind) in [(4, small()), (0, small()), (3, checkpoint())] {
            let refused = arrivals.accept(&buffer, number, 0, kind).unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
        }
        assert_eq!(arrivals.accept(&buffer, 1, 0, checkpoint()).unwrap(), Arrival::Ignored);
    }
}
