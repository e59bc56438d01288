//! The end of an attempt whose holder is gone.

use streamer_core::{ErrorCode, OutputDigest, RequestError, RetryPolicy, Timestamp, retry};
use streamer_proto::common::v1::event::Kind;
use streamer_rpc::payload_bytes;
use streamer_store::{RequestRecord, Store, StoreError};

use crate::outcome::{self, Ended, Ending, Outcome};

/// Events read at a time.
const PAGE: usize = 512;
const PAGE_BYTES: usize = 1024 * 1024;

/// What follows for this request, whose lease ran out: another attempt, failure, or the
/// cancellation that was asked for.
pub(crate) async fn conclude(
    store: &dyn Store,
    record: &RequestRecord,
    policy: RetryPolicy,
    now: Timestamp,
) -> Result<Ending, StoreError> {
    // Only a cancelled request keeps its output.
    let output = match record.cancel_reason {
        Some(_) => output_of(store, record).await?,
        None => OutputDigest::default(),
    };
    let error = RequestError::new(
        ErrorCode::Unavailable,
        format!("attempt {} was abandoned: its lease ran out", record.attempt),
    );
    let ended = Ended {
        attempt: record.attempt,
        attempt_seq: record.attempt_seq,
        output: &output,
        cancel_reason: record.cancel_reason.clone(),
        policy,
        close_by: record.close_by,
        now,
        random: retry::random_fraction(),
    };
    Ok(outcome::conclude(Outcome::Failed(error), &ended))
}

/// The output of the latest attempt, as it stands in the log.
pub(crate) async fn output_of(
    store: &dyn Store,
    record: &RequestRecord,
) -> Result<OutputDigest, StoreError> {
    let mut digest = OutputDigest::default();
    let mut after_seq = record.attempt_seq;
    loop {
        let page = store.read_events(record.uid, after_seq, PAGE, PAGE_BYTES).await?;
        for event in &page.events {
            after_seq = event.seq;
            if let Some(Kind::Output(output)) = &event.kind {
                digest.push(&payload_bytes(output.data.as_ref()));
            }
        }
        if !page.more {
            return Ok(digest);
        }
    }
}
