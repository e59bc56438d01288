//! Makes events of the reports of an attempt, and numbers them.

use std::sync::Arc;

use streamer_core::{AttemptNumber, Clock, OutputDigest, Seq, Timestamp, Uid};
use streamer_handler::Report;
use streamer_proto::{
    common::v1::{Event, Output, Payload, Progress, event::Kind, payload::Body},
    internal::v1::PublishRequest,
    timestamp,
};
use streamer_rpc::json_payload;
use streamer_store::log_event;

use super::outcome::FinalEvent;

/// The events of an attempt that were not published yet.
pub(super) struct EventBatch {
    uid: Uid,
    attempt: AttemptNumber,
    clock: Arc<dyn Clock>,
    /// `seq` of the `started` event.
    attempt_seq: Seq,
    next_seq: Seq,
    digest: OutputDigest,
    batch: PublishRequest,
}

impl EventBatch {
    /// Returns an empty batch. `last_seq` is the number of the latest event of the request, and `digest` that of the
    /// output which the attempt has already produced.
    pub(super) fn new(
        uid: Uid,
        attempt: AttemptNumber,
        (attempt_seq, last_seq): (Seq, Seq),
        digest: OutputDigest,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let batch = empty(uid, attempt);
        Self { uid, attempt, clock, attempt_seq, next_seq: last_seq.next(), digest, batch }
    }

    /// Returns the digest of the output.
    pub(super) fn digest(&self) -> &OutputDigest {
        &self.digest
    }

    /// Returns the number of events of the attempt after its `started` event.
    pub(super) fn event_count(&self) -> i64 {
        self.next_seq.previous().events_since(self.attempt_seq)
    }

    /// Adds reports of the handler.
    pub(super) fn add_reports(&mut self, reports: impl IntoIterator<Item = Report>) {
        for report in reports {
            let kind = match report {
                Report::Progress { percentage, message, metadata } => Kind::Progress(Progress {
                    percentage,
                    message,
                    metadata: metadata.map(json_payload),
                }),
                Report::Output { content_type, data } => {
                    let chunk_index = self.digest.chunks();
                    self.digest.push(&data);
                    let data = Payload { content_type, body: Some(Body::Data(data)) };
                    Kind::Output(Output { data: Some(data), chunk_index })
                }
                Report::Checkpoint(data) => {
                    self.batch.checkpoint = Some(data);
                    continue;
                }
                Report::KeepAlive => continue,
            };
            self.add(kind);
        }
    }

    /// Adds the final event.
    pub(super) fn add_final(&mut self, event: &FinalEvent) {
        self.batch.retry_at = event.retry_at.map(|at: Timestamp| timestamp(at.as_millis()));
        self.add(event.kind.clone());
    }

    /// Returns the batch if it has a content, and begins a new one.
    pub(super) fn take(&mut self) -> Option<PublishRequest> {
        let is_empty = self.batch.events.is_empty() && self.batch.checkpoint.is_none();
        (!is_empty).then(|| std::mem::replace(&mut self.batch, empty(self.uid, self.attempt)))
    }

    fn add(&mut self, kind: Kind) {
        let event: Event = log_event(self.next_seq, self.attempt, self.clock.now(), kind);
        self.next_seq = self.next_seq.next();
        self.batch.events.push(event);
    }
}

fn empty(uid: Uid, attempt: AttemptNumber) -> PublishRequest {
    PublishRequest {
        uid: uid.to_bytes().to_vec().into(),
        attempt: attempt.as_i32(),
        events: Vec::new(),
        checkpoint: None,
        retry_at: None,
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::ManualClock;
    use streamer_proto::common::v1::Cancelled;

    use super::*;

    fn batch() -> EventBatch {
        let clock = Arc::new(ManualClock::at(Timestamp::from_millis(7)));
        let seqs = (Seq::from(4), Seq::from(6));
        let uid = Uid::new(Timestamp::default());
        EventBatch::new(uid, AttemptNumber::FIRST.next(), seqs, OutputDigest::default(), clock)
    }

    fn output(data: &'static str) -> Report {
        Report::Output { content_type: "text/plain".into(), data: data.into() }
    }

    #[test]
    fn reports_become_numbered_events() {
        let mut batch = batch();
        let progress =
            Report::Progress { percentage: Some(5.0), message: "m".into(), metadata: None };
        batch.add_reports([progress, output("a"), Report::KeepAlive, output("bc")]);
        batch.add_reports([Report::Checkpoint("1".into()), Report::Checkpoint("2".into())]);
        assert_eq!((batch.event_count(), batch.digest().chunks()), (5, 2));
        let sent = batch.take().unwrap();
        assert_eq!(sent.checkpoint.as_deref(), Some(&b"2"[..]), "the latest one");
        assert_eq!((sent.attempt, sent.retry_at), (2, None));
        let chunks: Vec<_> = sent
            .events
            .iter()
            .map(|event| match &event.kind {
                Some(Kind::Output(output)) => (event.seq, event.attempt, output.chunk_index),
                _ => (event.seq, event.attempt, -1),
            })
            .collect();
        assert_eq!(chunks, [(7, 2, -1), (8, 2, 0), (9, 2, 1)]);
        assert!(batch.take().is_none(), "a new batch begins");
        batch.add_reports([output("d")]);
        assert_eq!(batch.take().unwrap().events[0].seq, 10);
    }

    #[test]
    fn a_batch_without_events_is_published_only_with_a_checkpoint() {
        let mut batch = batch();
        batch.add_reports([Report::KeepAlive]);
        assert!(batch.take().is_none());
        batch.add_reports([Report::Checkpoint("1".into())]);
        assert!(batch.take().unwrap().events.is_empty());
        assert!(batch.take().is_none());
    }

    #[test]
    fn the_final_event_may_have_a_retry_time() {
        let mut batch = batch();
        let retry_at = Some(Timestamp::from_millis(9000));
        let kind = Kind::Cancelled(Cancelled::default());
        batch.add_final(&FinalEvent { kind: kind.clone(), retry_at });
        let sent = batch.take().unwrap();
        assert_eq!(sent.retry_at, Some(timestamp(9000)));
        assert_eq!(sent.events[0].kind, Some(kind));
        batch.add_reports([output("late")]);
        assert_eq!(batch.take().unwrap().retry_at, None);
    }
}
