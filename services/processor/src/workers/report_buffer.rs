//! Buffer for the reports of one remote attempt, between the worker's stream and the attempt. Keeps their order, and
//! limits their number and bytes.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use streamer_core::limits::{MAX_CONTENT_TYPE_BYTES, MAX_PENDING_REPORTS};
use streamer_handler::{MemoryBudget, Reservation};
use streamer_proto::{
    common::v1::{Error, Payload, Progress, payload::Body},
    processor::v1::report::Kind,
};
use streamer_rpc::{compact_bytes, payload_bytes};
use tokio::sync::Notify;

/// Maximum number of pending progress and output reports.
pub(crate) const MAX_REPORTS: usize = MAX_PENDING_REPORTS;
/// Bytes of pending progress and output reports at which no further ones are accepted.
pub(crate) const MAX_BYTES: usize = 1024 * 1024;
/// Bytes of pending checkpoints at which no further ones are accepted.
const MAX_CHECKPOINT_BYTES: usize = 64 * 1024 * 1024;
/// Minimum window of an attempt, in bytes; applies when the budget is low.
pub(crate) const MIN_WINDOW_BYTES: usize = 64 * 1024;
/// Maximum bytes of pending reports that need no reservation; most attempts never have more. The limit is half of that
/// of a `ReportQueue`, where each report counts slightly more, so that a report without a reservation never waits for
/// one in the queue, ahead of reports that have reservations.
const UNRESERVED_BYTES: usize = 2 * 1024;

pub(crate) struct ReportBuffer {
    state: Mutex<State>,
    filled: Notify,
    /// Memory budget that all attempts share.
    budget: Arc<MemoryBudget>,
    /// Tenant whose share of the budget the attempt uses.
    tenant: Arc<str>,
}

#[derive(Default)]
struct State {
    reports: VecDeque<(Kind, Reservation)>,
    /// Number of pending reports that become events.
    events: usize,
    bytes: usize,
    checkpoint_bytes: usize,
    /// Whether the last report has arrived, or the attempt has finished; further reports are then discarded.
    closed: bool,
}

impl State {
    /// Adds or subtracts the size of a report, as `change` defines.
    fn count(&mut self, kind: &Kind, change: fn(usize, usize) -> usize) {
        match kind {
            Kind::Checkpoint(data) => {
                self.checkpoint_bytes = change(self.checkpoint_bytes, data.len());
            }
            _ => self.bytes = change(self.bytes, bytes(kind)),
        }
    }
}

/// Error for a worker that exceeds its window.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl ReportBuffer {
    /// Creates a buffer that reserves the bytes of pending reports in `budget`, for the given tenant.
    pub(crate) fn new(budget: Arc<MemoryBudget>, tenant: &str) -> Self {
        Self { state: Mutex::default(), filled: Notify::new(), budget, tenant: tenant.into() }
    }

    /// Returns the bytes to reserve before the report is added.
    pub(crate) fn bytes_to_reserve(&self, kind: &Kind) -> usize {
        let held = payload_size(kind);
        let waiting = {
            let state = self.state.lock();
            state.bytes + state.checkpoint_bytes
        };
        if waiting + held <= UNRESERVED_BYTES { 0 } else { held }
    }

    /// Reserves bytes if the budget has capacity for them.
    pub(crate) fn try_reserve(&self, bytes: usize) -> Option<Reservation> {
        self.budget.try_reserve(&self.tenant, bytes)
    }

    /// Reserves bytes; waits until the budget has capacity for them.
    pub(crate) async fn reserve(&self, bytes: usize) -> Reservation {
        self.budget.reserve(&self.tenant, bytes).await
    }

    /// Returns the maximum bytes of unacknowledged reports that the worker may have from now on.
    pub(crate) fn window(&self) -> usize {
        window(self.budget.available_to(&self.tenant))
    }

    /// Adds a report. Reports added after the last one, or after [`Self::close`], are dropped.
    pub(crate) fn push(&self, kind: Kind, reserved: Reservation) -> Result<(), Full> {
        {
            let mut state = self.state.lock();
            if state.closed {
                return Ok(());
            }
            match &kind {
                Kind::Progress(_) | Kind::Output(_) => {
                    if state.events >= MAX_REPORTS || state.bytes >= MAX_BYTES {
                        return Err(Full);
                    }
                    state.events += 1;
                }
                // Of two consecutive checkpoints, only the later one is kept.
                Kind::Checkpoint(_) => {
                    if let Some((Kind::Checkpoint(before), _)) = state.reports.back() {
                        state.checkpoint_bytes -= before.len();
                        state.reports.pop_back();
                    }
                    if state.checkpoint_bytes >= MAX_CHECKPOINT_BYTES {
                        return Err(Full);
                    }
                }
                // Any pending report shows that the handler is alive.
                Kind::KeepAlive(_) if !state.reports.is_empty() => return Ok(()),
                Kind::KeepAlive(_) | Kind::Result(_) | Kind::Error(_) | Kind::Release(_) => {}
            }
            state.closed = matches!(kind, Kind::Result(_) | Kind::Error(_) | Kind::Release(_));
            state.count(&kind, usize::wrapping_add);
            state.reports.push_back((kind, reserved));
        }
        self.filled.notify_one();
        Ok(())
    }

    /// Waits for the next report; returns it with its reservation. Only one task may call this.
    pub(crate) async fn next(&self) -> (Kind, Reservation) {
        loop {
            {
                let mut state = self.state.lock();
                if let Some((kind, reserved)) = state.reports.pop_front() {
                    state.count(&kind, usize::wrapping_sub);
                    if matches!(kind, Kind::Progress(_) | Kind::Output(_)) {
                        state.events -= 1;
                    }
                    return (kind, reserved);
                }
            }
            self.filled.notified().await;
        }
    }

    /// Drops pending and later reports, because the attempt has finished.
    pub(crate) fn close(&self) {
        let dropped =
            std::mem::replace(&mut *self.state.lock(), State { closed: true, ..State::default() });
        drop(dropped);
    }
}

/// Returns the window of one attempt, in bytes, while `available` bytes remain for its tenant. It is small enough for
/// many attempts to report concurrently, and large enough that a report does not have to wait for the previous one.
fn window(available: usize) -> usize {
    const SHARE: usize = 64;
    (available / SHARE).clamp(MIN_WINDOW_BYTES, MAX_BYTES)
}

/// Compacts a report to reduce its memory: stores its payload as bytes, and copies it from the buffer in which it was
/// received. A content type that is too long is truncated to a length that is still not allowed.
pub(crate) fn compact(kind: Kind) -> Kind {
    let payload = |payload: Payload| {
        let data = match payload.body {
            Some(Body::Data(data)) => compact_bytes(data),
            _ => payload_bytes(Some(&payload)),
        };
        let mut content_type = payload.content_type;
        content_type.truncate(content_type.floor_char_boundary(MAX_CONTENT_TYPE_BYTES + 4));
        content_type.shrink_to_fit();
        Payload { content_type, body: Some(Body::Data(data)) }
    };
    match kind {
        Kind::Progress(progress) => {
            let metadata = progress.metadata.map(payload);
            Kind::Progress(Progress { metadata, ..progress })
        }
        Kind::Output(output) => Kind::Output(payload(output)),
        Kind::Checkpoint(data) => Kind::Checkpoint(compact_bytes(data)),
        Kind::Result(result) => Kind::Result(payload(result)),
        Kind::Error(error) => {
            let details = error.details.map(payload);
            Kind::Error(Error { details, ..error })
        }
        Kind::Release(_) | Kind::KeepAlive(_) => kind,
    }
}

/// Returns the size of a report that counts towards the window, as defined in docs/worker-protocol.md.
fn bytes(kind: &Kind) -> usize {
    match kind {
        Kind::Progress(_) | Kind::Output(_) => payload_size(kind),
        Kind::Checkpoint(_)
        | Kind::Result(_)
        | Kind::Error(_)
        | Kind::Release(_)
        | Kind::KeepAlive(_) => 0,
    }
}

/// Returns the bytes of a report in memory, except its numbers and short texts.
pub(crate) fn payload_size(kind: &Kind) -> usize {
    let payload =
        |payload: Option<&Payload>| payload.map_or(0, |data| payload_bytes(Some(data)).len());
    match kind {
        Kind::Progress(progress) => progress.message.len() + payload(progress.metadata.as_ref()),
        Kind::Output(data) | Kind::Result(data) => payload(Some(data)),
        Kind::Checkpoint(data) => data.len(),
        Kind::Error(error) => error.message.len() + payload(error.details.as_ref()),
        Kind::Release(release) => release.reason.len(),
        Kind::KeepAlive(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use streamer_proto::processor::v1::KeepAlive;

    use super::*;

    fn progress(message: &str) -> Kind {
        Kind::Progress(Progress { message: message.into(), ..Progress::default() })
    }

    fn new_buffer() -> ReportBuffer {
        ReportBuffer::new(MemoryBudget::new(1 << 28), "acme")
    }

    fn push(buffer: &ReportBuffer, kind: Kind) -> Result<(), Full> {
        buffer.push(kind, Reservation::default())
    }

    #[tokio::test]
    async fn reports_are_ordered_and_consecutive_checkpoints_are_merged() {
        let buffer = new_buffer();
        let checkpoint = |text: &'static str| Kind::Checkpoint(text.into());
        let keep_alive = Kind::KeepAlive(KeepAlive {});
        for kind in [checkpoint("a"), checkpoint("b"), keep_alive, progress("p"), checkpoint("c")] {
            push(&buffer, kind).unwrap();
        }
        for expected in [checkpoint("b"), progress("p"), checkpoint("c")] {
            assert_eq!(buffer.next().await.0, expected);
        }
        let state = buffer.state.lock();
        assert_eq!((state.bytes, state.checkpoint_bytes, state.events), (0, 0, 0));
    }

    #[tokio::test]
    async fn only_large_pending_reports_are_reserved() {
        let budget = MemoryBudget::new(1 << 28);
        let buffer = ReportBuffer::new(budget.clone(), "acme");
        let large = progress(&"x".repeat(100_000));
        let checkpoint = Kind::Checkpoint(vec![0; 50_000].into());
        for kind in [progress("small"), large, checkpoint.clone(), checkpoint] {
            let reserved = buffer.try_reserve(buffer.bytes_to_reserve(&kind)).unwrap();
            buffer.push(kind, reserved).unwrap();
        }
        assert_eq!(budget.used(), 150_000, "only the later of two checkpoints is kept");
        assert_eq!(buffer.next().await.1.bytes(), 0);
        assert_eq!(buffer.next().await.1.bytes(), 100_000);
        buffer.close();
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_window_shrinks_with_the_available_budget() {
        assert_eq!(window(1 << 28), MAX_BYTES);
        assert_eq!(window(1 << 25), 1 << 19);
        assert_eq!(window(0), MIN_WINDOW_BYTES);
    }

    #[test]
    fn the_buffer_is_bounded_in_number_and_bytes() {
        let buffer = new_buffer();
        for _ in 0..MAX_REPORTS {
            push(&buffer, progress("")).unwrap();
        }
        assert_eq!(push(&buffer, progress("")), Err(Full));
        let buffer = new_buffer();
        let large = "x".repeat(MAX_BYTES - 1);
        assert_eq!(push(&buffer, progress(&large)), Ok(()));
        assert_eq!(push(&buffer, progress("one more may exceed the limit")), Ok(()));
        assert_eq!(push(&buffer, progress("")), Err(Full));
        buffer.close();
        assert_eq!(push(&buffer, progress("")), Ok(()), "dropped");
    }
}
