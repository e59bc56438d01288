//! Reports of one remote attempt, between the worker's stream and the attempt: in order, bounded in
//! number and in bytes.

use std::collections::VecDeque;

use parking_lot::Mutex;
use streamer_proto::{
    common::v1::{Error, Payload, Progress, payload::Body},
    processor::v1::report::Kind,
};
use streamer_rpc::{compact_bytes, payload_bytes};
use tokio::sync::Notify;

/// Progress and output reports that wait at most.
pub(crate) const MAX_REPORTS: usize = 1024;
/// Bytes of those at which no more are taken.
pub(crate) const MAX_BYTES: usize = 8 * 1024 * 1024;
/// Bytes of checkpoints between them at which no more are taken.
const MAX_CHECKPOINT_BYTES: usize = 64 * 1024 * 1024;

#[derive(Default)]
pub(crate) struct Mailbox {
    state: Mutex<State>,
    filled: Notify,
}

#[derive(Default)]
struct State {
    reports: VecDeque<Kind>,
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
    /// Adds a report. What is added after [`Self::close`] is dropped.
    pub(crate) fn push(&self, kind: Kind) -> Result<(), Full> {
        let kind = compact(kind);
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
                    if let Some(Kind::Checkpoint(before)) = state.reports.back() {
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
            state.reports.push_back(kind);
        }
        self.filled.notify_one();
        Ok(())
    }

    /// Takes the next report, once there is one. For one reader.
    pub(crate) async fn next(&self) -> Kind {
        loop {
            {
                let mut state = self.state.lock();
                if let Some(kind) = state.reports.pop_front() {
                    state.count(&kind, usize::wrapping_sub);
                    if matches!(kind, Kind::Progress(_) | Kind::Output(_)) {
                        state.events -= 1;
                    }
                    return kind;
                }
            }
            self.filled.notified().await;
        }
    }

    /// Drops what waits and what comes: the attempt has ended.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        *state = State { closed: true, ..State::default() };
    }
}

/// A report that does not hold the buffer that it was received in.
fn compact(kind: Kind) -> Kind {
    let payload = |payload: Payload| {
        let body = payload.body.map(|body| match body {
            Body::Data(data) => Body::Data(compact_bytes(data)),
            Body::Json(json) => Body::Json(json),
        });
        Payload { body, ..payload }
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
        Kind::Progress(progress) => {
            let metadata = progress.metadata.as_ref();
            progress.message.len() + metadata.map_or(0, |data| payload_bytes(Some(data)).len())
        }
        Kind::Output(output) => payload_bytes(Some(output)).len(),
        Kind::Checkpoint(_)
        | Kind::Result(_)
        | Kind::Error(_)
        | Kind::Release(_)
        | Kind::KeepAlive(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use streamer_proto::processor::v1::KeepAlive;

    use super::*;

    fn progress(message: &str) -> Kind {
        Kind::Progress(Progress { message: message.into(), ..Progress::default() })
    }

    #[tokio::test]
    async fn reports_come_out_in_order_and_only_the_latest_of_several_checkpoints() {
        let mailbox = Mailbox::default();
        let checkpoint = |text: &'static str| Kind::Checkpoint(text.into());
        let keep_alive = Kind::KeepAlive(KeepAlive {});
        for kind in [checkpoint("a"), checkpoint("b"), keep_alive, progress("p"), checkpoint("c")] {
            mailbox.push(kind).unwrap();
        }
        for expected in [checkpoint("b"), progress("p"), checkpoint("c")] {
            assert_eq!(mailbox.next().await, expected);
        }
        let state = mailbox.state.lock();
        assert_eq!((state.bytes, state.checkpoint_bytes, state.events), (0, 0, 0));
    }

    #[test]
    fn it_is_bounded_in_number_and_in_bytes() {
        let mailbox = Mailbox::default();
        for _ in 0..MAX_REPORTS {
            mailbox.push(progress("")).unwrap();
        }
        assert_eq!(mailbox.push(progress("")), Err(Full));
        let mailbox = Mailbox::default();
        let large = "x".repeat(MAX_BYTES - 1);
        assert_eq!(mailbox.push(progress(&large)), Ok(()));
        assert_eq!(mailbox.push(progress("one more may go beyond")), Ok(()));
        assert_eq!(mailbox.push(progress("")), Err(Full));
        mailbox.close();
        assert_eq!(mailbox.push(progress("")), Ok(()), "dropped");
    }
}
