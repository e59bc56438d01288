//! Recovers attempts whose leases expired.

use streamer_core::{ErrorCode, OutputDigest, RequestError, RetryPolicy, Timestamp, backoff};
use streamer_proto::common::v1::event::Kind;
use streamer_rpc::payload_bytes;
use streamer_store::{EventNumbers, RequestRecord, Store, StoreError};

use super::outcome::{self, AttemptSummary, FinalEvent, Outcome};

/// Maximum number of events per page.
const PAGE: usize = 512;
/// Maximum size of a page, in bytes.
const PAGE_BYTES: usize = 1024 * 1024;

/// Returns the final event of an attempt whose lease expired: a retry, a failure, or the requested
/// cancellation.
pub(crate) async fn final_event(
    store: &dyn Store,
    record: &RequestRecord,
    policy: RetryPolicy,
    now: Timestamp,
) -> Result<FinalEvent, StoreError> {
    // Only a cancelled request keeps its output.
    let output = match record.cancel_reason {
        Some(_) => read_output(store, record).await?,
        None => OutputDigest::default(),
    };
    let error = RequestError::new(
        ErrorCode::Unavailable,
        format!("attempt {} was abandoned: its lease expired", record.attempt),
    );
    let summary = AttemptSummary {
        attempt: record.attempt,
        failed_attempts: record.failed_attempts,
        attempt_seq: record.attempt_seq,
        output: &output,
        cancel_reason: record.cancel_reason.clone(),
        policy,
        close_by: record.close_by,
        now,
        random: backoff::random_fraction(),
    };
    Ok(outcome::final_event(Outcome::Failed(error), &summary))
}

/// Reads the output of the latest attempt from the log; returns its digest.
pub(crate) async fn read_output(
    store: &dyn Store,
    record: &RequestRecord,
) -> Result<OutputDigest, StoreError> {
    let mut digest = OutputDigest::default();
    let mut after_seq = record.attempt_seq;
    loop {
        let page = store.read_events(record.uid, after_seq, PAGE, PAGE_BYTES).await?;
        for event in &page.events {
            after_seq = event.seq();
            if let Some(Kind::Output(output)) = &event.kind {
                digest.push(&payload_bytes(output.data.as_ref()));
            }
        }
        if !page.more {
            return Ok(digest);
        }
    }
}
