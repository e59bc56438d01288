//! Reports of one remote attempt, between the worker's stream and the attempt: in order, bounded in
//! number and in bytes.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use streamer_core::limits::{MAX_CONTENT_TYPE_BYTES, MAX_WAITING_REPORTS};
use streamer_handler::{OutputBudget, Reservation};
use streamer_proto::{
    common::v1::{Error, Payload, Progress, payload::Body},
    processor::v1::report::Kind,
};
use streamer_rpc::{compact_bytes, payload_bytes};
use tokio::sync::Notify;

/// Progress and output reports that wait at most.
pub(crate) const MAX_REPORTS: usize = MAX_WAITING_REPORTS;
/// Bytes of those at which no more are taken.
pub(crate) const MAX_BYTES: usize = 1024 * 1024;
/// Bytes of checkpoints between them at which no more are taken.
const MAX_CHECKPOINT_BYTES: usize = 64 * 1024 * 1024;
/// Smallest window of an attempt, in bytes, however little room is left.
pub(crate) const MIN_WINDOW_BYTES: usize = 64 * 1024;
/// Waiting bytes up to which none are reserved: most attempts never have more. It is half of what a `ReportQueue`
/// takes without a reservation, where each report counts for a little more. So a report without a reservation
/// never waits for one, with reports behind it that have reservations.
const UNRESERVED_BYTES: usize = 2 * 1024;

pub(crate) struct Mailbox {
    state: Mutex<State>,
    filled: Notify,
    /// What all attempts share, and in whose name it is used.
    budget: Arc<OutputBudget>,
    tenant: Arc<str>,
}

#[derive(Default)]
struct State {
    reports: VecDeque<(Kind, Reservation)>,
    /// How many of them become events.
    events: usize,
    bytes: usize,
    checkpoint_bytes: usize,
    /// The last report is in, or none is wanted any more.
    closed: bool,
}

impl State {
    /// Adds or takes off what a report counts for.
    fn count(&mut self, kind: &Kind, change: fn(usize, usize) -> usize) {
        match kind {
            Kind::Checkpoint(data) => {
                self.checkpoint_bytes = change(self.checkpoint_bytes, data.len());
            }
            _ => self.bytes = change(self.bytes, bytes(kind)),
        }
    }
}

/// There is no room: the worker does not keep to its bounds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Mailbox {
    /// Reserves the bytes of waiting reports in `budget`, for this tenant.
    pub(crate) fn new(budget: Arc<OutputBudget>, tenant: &str) -> Self {
        Self { state: Mutex::default(), filled: Notify::new(), budget, tenant: tenant.into() }
    }

    /// How many bytes must be reserved for a report before it is added.
    pub(crate) fn needs_reserved(&self, kind: &Kind) -> usize {
        let held = held_bytes(kind);
        let waiting = {
            let state = self.state.lock();
            state.bytes + state.checkpoint_bytes
        };
        if waiting + held <= UNRESERVED_BYTES { 0 } else { held }
    }

    /// Reserves bytes, if there is room now.
    pub(crate) fn try_reserve(&self, bytes: usize) -> Option<Reservation> {
        self.budget.try_reserve(&self.tenant, bytes)
    }

    /// Reserves bytes; waits until there is room.
    pub(crate) async fn reserve(&self, bytes: usize) -> Reservation {
        self.budget.reserve(&self.tenant, bytes).await
    }

    /// Bytes of unacknowledged reports that the worker may have from now on.
    pub(crate) fn window(&self) -> usize {
        window(self.budget.available_to(&self.tenant))
    }

    /// Adds a report. What is added after [`Self::close`] is dropped.
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
                // The last one counts.
                Kind::Checkpoint(_) => {
                    if let Some((Kind::Checkpoint(before), _)) = state.reports.back() {
                        state.checkpoint_bytes -= before.len();
                        state.reports.pop_back();
                    }
                    if state.checkpoint_bytes >= MAX_CHECKPOINT_BYTES {
                        return Err(Full);
                    }
                }
                // Whatever waits says that the handler lives.
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

    /// Takes the next report, once there is one, with what is reserved for it. For one reader.
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

    /// Drops what waits and what comes: the attempt has ended.
    pub(crate) fn close(&self) {
        let dropped =
            std::mem::replace(&mut *self.state.lock(), State { closed: true, ..State::default() });
        drop(dropped);
    }
}

/// The window of one attempt while `available` bytes are left for its tenant: small enough for many attempts to
/// report at once, and never so small that each report waits for the one before.
fn window(available: usize) -> usize {
    const SHARE: usize = 64;
    (available / SHARE).clamp(MIN_WINDOW_BYTES, MAX_BYTES)
}

/// A report in the form in which it takes the least memory: with its payload as bytes, without the buffer that
/// it was received in. A content type that is too long is cut, but not to a length that is allowed.
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

/// What a report counts for, as docs/worker-protocol.md has it.
fn bytes(kind: &Kind) -> usize {
    match kind {
        Kind::Progress(_) | Kind::Output(_) => held_bytes(kind),
        Kind::Checkpoint(_)
        | Kind::Result(_)
        | Kind::Error(_)
        | Kind::Release(_)
        | Kind::KeepAlive(_) => 0,
    }
}

/// What a report holds in memory, without its numbers and short texts.
pub(crate) fn held_bytes(kind: &Kind) -> usize {
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

    fn new_mailbox() -> Mailbox {
        Mailbox::new(OutputBudget::new(1 << 28), "acme")
    }

    fn push(mailbox: &Mailbox, kind: Kind) -> Result<(), Full> {
        mailbox.push(kind, Reservation::default())
    }

    #[tokio::test]
    async fn reports_come_out_in_order_and_only_the_latest_of_several_checkpoints() {
        let mailbox = new_mailbox();
        let checkpoint = |text: &'static str| Kind::Checkpoint(text.into());
        let keep_alive = Kind::KeepAlive(KeepAlive {});
        for kind in [checkpoint("a"), checkpoint("b"), keep_alive, progress("p"), checkpoint("c")] {
            push(&mailbox, kind).unwrap();
        }
        for expected in [checkpoint("b"), progress("p"), checkpoint("c")] {
            assert_eq!(mailbox.next().await.0, expected);
        }
        let state = mailbox.state.lock();
        assert_eq!((state.bytes, state.checkpoint_bytes, state.events), (0, 0, 0));
    }

    #[tokio::test]
    async fn waiting_reports_are_reserved_but_for_small_ones() {
        let budget = OutputBudget::new(1 << 28);
        let mailbox = Mailbox::new(budget.clone(), "acme");
        let large = progress(&"x".repeat(100_000));
        let checkpoint = Kind::Checkpoint(vec![0; 50_000].into());
        for kind in [progress("small"), large, checkpoint.clone(), checkpoint] {
            let reserved = mailbox.try_reserve(mailbox.needs_reserved(&kind)).unwrap();
            mailbox.push(kind, reserved).unwrap();
        }
        assert_eq!(budget.used(), 150_000, "of two checkpoints the later one is kept");
        assert_eq!(mailbox.next().await.1.bytes(), 0);
        assert_eq!(mailbox.next().await.1.bytes(), 100_000);
        mailbox.close();
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_window_shrinks_with_what_is_left() {
        assert_eq!(window(1 << 28), MAX_BYTES);
        assert_eq!(window(1 << 25), 1 << 19);
        assert_eq!(window(0), MIN_WINDOW_BYTES);
    }

    #[test]
    fn it_is_bounded_in_number_and_in_bytes() {
        let mailbox = new_mailbox();
        for _ in 0..MAX_REPORTS {
            push(&mailbox, progress("")).unwrap();
        }
        assert_eq!(push(&mailbox, progress("")), Err(Full));
        let mailbox = new_mailbox();
        let large = "x".repeat(MAX_BYTES - 1);
        assert_eq!(push(&mailbox, progress(&large)), Ok(()));
        assert_eq!(push(&mailbox, progress("one more may go beyond")), Ok(()));
        assert_eq!(push(&mailbox, progress("")), Err(Full));
        mailbox.close();
        assert_eq!(push(&mailbox, progress("")), Ok(()), "dropped");
    }
}
