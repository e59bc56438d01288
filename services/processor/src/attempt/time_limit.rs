//! Time limits of an attempt.

use streamer_core::{ActionSpec, ErrorCode, RequestError, Timestamp};
use streamer_store::RequestRecord;
use tokio::time::Instant;

/// Earliest time limit of an attempt, and the error with which the attempt fails when the limit passes.
#[derive(Debug)]
pub(super) struct TimeLimit {
    pub(super) at: Instant,
    pub(super) error: RequestError,
}

impl TimeLimit {
    pub(super) fn earliest(
        record: &RequestRecord,
        spec: &ActionSpec,
        now: Timestamp,
    ) -> Option<Self> {
        let start_time = record.start_time.unwrap_or(now);
        let timeout = |at: Timestamp, message: &str| Self {
            at: Instant::now() + at.since(now),
            error: RequestError::new(ErrorCode::Timeout, message),
        };
        let attempt = spec.start_to_close.map(|limit| {
            timeout(start_time.plus(limit), "the attempt exceeded its start-to-close timeout")
        });
        let all = record.close_by.map(|at| {
            let message = "the request exceeded its schedule-to-close timeout";
            let mut limit = timeout(at, message);
            limit.error.retryable = false;
            limit
        });
        [attempt, all].into_iter().flatten().min_by_key(|limit| limit.at)
    }
}
