//! Pure functions that determine the final event of an attempt.

use std::time::Duration;

use streamer_core::{
    AttemptNumber, ErrorCode, OutputDigest, RequestError, RetryPolicy, Seq, Timestamp, limits,
    validate,
};
use streamer_proto::{
    common::v1::{Cancelled, Failed, OutputSummary, Retrying, Succeeded, event::Kind},
    timestamp,
};
use streamer_rpc::{error_to_proto, json_payload};
use streamer_store::RequestRecord;

/// Maximum number of releases of a request after which the next attempt starts without a delay.
const MAX_IMMEDIATE_RELEASES: u32 = 3;

/// Outcome of an attempt.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The handler succeeded with this JSON result.
    Succeeded(bytes::Bytes),
    /// The attempt failed with this error.
    Failed(RequestError),
    /// The attempt was released unfinished, for the reason in this error.
    Released(RequestError),
}

/// Final event of an attempt.
pub(crate) struct FinalEvent {
    pub(crate) kind: Kind,
    /// Time at which the next attempt is due; `None` if no attempt follows.
    pub(crate) retry_at: Option<Timestamp>,
}

/// State of an attempt when it finishes.
pub(crate) struct AttemptSummary<'a> {
    pub(crate) attempt: AttemptNumber,
    /// Number of earlier attempts that failed.
    pub(crate) failed_attempts: u32,
    /// `seq` of its `started` event.
    pub(crate) attempt_seq: Seq,
    pub(crate) output: &'a OutputDigest,
    /// Cancellation reason; `None` if cancellation was not requested.
    pub(crate) cancel_reason: Option<String>,
    pub(crate) policy: RetryPolicy,
    /// Time from which no attempt may start; `None` if no limit applies.
    pub(crate) close_by: Option<Timestamp>,
    pub(crate) now: Timestamp,
    /// Random fraction for the backoff, from 0.0 to 1.0.
    pub(crate) random: f64,
}

/// Returns the final event of an attempt. Success takes precedence over a requested cancellation, which takes
/// precedence over failure.
pub(crate) fn final_event(outcome: Outcome, summary: &AttemptSummary<'_>) -> FinalEvent {
    let last = |kind| FinalEvent { kind, retry_at: None };
    let (error, released) = match outcome {
        Outcome::Succeeded(result) => {
            return last(Kind::Succeeded(Succeeded {
                result: Some(json_payload(result)),
                output: Some(output_summary(summary.output)),
            }));
        }
        Outcome::Failed(error) => (bounded(error), false),
        Outcome::Released(error) => (bounded(error), true),
    };
    if let Some(reason) = &summary.cancel_reason {
        return last(Kind::Cancelled(Cancelled {
            reason: reason.clone(),
            output: Some(output_summary(summary.output)),
        }));
    }
    let in_time =
        |wait: Duration| summary.close_by.is_none_or(|limit| summary.now.plus(wait) < limit);
    let wait = if released {
        // A release does not count as a failed attempt, but repeated releases are retried with backoff.
        let releases = summary.attempt.as_u32().saturating_sub(summary.failed_attempts);
        let again = releases.saturating_sub(MAX_IMMEDIATE_RELEASES);
        let unbounded = RetryPolicy { max_attempts: u32::MAX, ..summary.policy };
        let backoff = |failed| unbounded.backoff(failed, summary.random);
        if again == 0 { Some(Duration::ZERO) } else { backoff(again) }
    } else if error.retryable && !summary.policy.final_errors.contains(error.code) {
        summary.policy.backoff(summary.failed_attempts.saturating_add(1), summary.random)
    } else {
        None
    };
    match wait {
        Some(wait) if in_time(wait) => retrying(&error, wait, released, summary),
        _ => last(failed(&error, summary.attempt_seq)),
    }
}

/// Truncates the message of an error that is too long, and removes details that are too large.
fn bounded(error: RequestError) -> RequestError {
    RequestError {
        message: validate::cut(error.message, limits::MAX_ERROR_MESSAGE_BYTES),
        details: error.details.filter(|text| text.len() <= limits::MAX_ERROR_DETAILS_BYTES),
        ..error
    }
}

fn retrying(
    error: &RequestError,
    wait: Duration,
    released: bool,
    summary: &AttemptSummary<'_>,
) -> FinalEvent {
    let retry_at = summary.now.plus(wait);
    let kind = Kind::Retrying(Retrying {
        retry_at: Some(timestamp(retry_at.as_millis())),
        rewind_to_seq: summary.attempt_seq.as_i64(),
        error: Some(error_to_proto(error)),
        released,
    });
    FinalEvent { kind, retry_at: Some(retry_at) }
}

/// Returns the final event of a failed request whose output after `rewind_to_seq` is invalid.
pub(crate) fn failed(error: &RequestError, rewind_to_seq: Seq) -> Kind {
    Kind::Failed(Failed {
        error: Some(error_to_proto(error)),
        rewind_to_seq: rewind_to_seq.as_i64(),
        output: Some(output_summary(&OutputDigest::default())),
    })
}

/// Returns the final event of a request whose first or next attempt did not start in time.
pub(crate) fn overdue(record: &RequestRecord, now: Timestamp) -> Kind {
    let passed = |limit: Option<Timestamp>| limit.filter(|limit| *limit <= now);
    let message = match (passed(record.close_by), passed(record.deadline)) {
        (None, Some(deadline)) => {
            format!("the request was not started by its deadline, {deadline}")
        }
        (close_by, _) => format!(
            "the request did not finish within its schedule-to-close timeout, at {}",
            close_by.unwrap_or(now)
        ),
    };
    let error = RequestError { retryable: false, ..RequestError::new(ErrorCode::Timeout, message) };
    failed(&error, Seq::NONE)
}

pub(crate) fn output_summary(output: &OutputDigest) -> OutputSummary {
    OutputSummary { chunks: output.chunks(), sha256: output.sha256().to_vec().into() }
}

#[cfg(test)]
mod tests {
    use streamer_core::ErrorCodes;

    use super::*;

    fn summary(attempt: u16, output: &OutputDigest) -> AttemptSummary<'_> {
        AttemptSummary {
            attempt: attempt.into(),
            failed_attempts: u32::from(attempt) - 1,
            attempt_seq: Seq::from(7),
            output,
            cancel_reason: None,
            policy: RetryPolicy {
                max_attempts: 2,
                final_errors: ErrorCodes::NONE.with(ErrorCode::Timeout),
                ..RetryPolicy::default()
            },
            close_by: None,
            now: Timestamp::from_millis(1000),
            random: 1.0,
        }
    }

    fn failure(retryable: bool) -> Outcome {
        let error = RequestError::new(ErrorCode::ProcessingFailed, "no");
        Outcome::Failed(RequestError { retryable, ..error })
    }

    #[test]
    fn a_retryable_failure_is_retried_and_rewinds_the_attempt() {
        let event = final_event(failure(true), &summary(1, &OutputDigest::default()));
        assert_eq!(event.retry_at, Some(Timestamp::from_millis(1500)));
        let Kind::Retrying(retrying) = event.kind else { panic!("{:?}", event.kind) };
        assert_eq!(retrying.rewind_to_seq, 7);
    }

    #[test]
    fn the_last_attempt_and_permanent_errors_fail() {
        for (attempt, retryable) in [(2, true), (1, false)] {
            let event =
                final_event(failure(retryable), &summary(attempt, &OutputDigest::default()));
            let Kind::Failed(failed) = event.kind else { panic!("{:?}", event.kind) };
            assert_eq!(failed.output.unwrap().chunks, 0);
            assert_eq!(event.retry_at, None);
        }
    }

    #[test]
    fn final_errors_and_retries_after_close_by_fail() {
        let output = OutputDigest::default();
        let timeout = Outcome::Failed(RequestError::new(ErrorCode::Timeout, "slow"));
        assert!(matches!(final_event(timeout, &summary(1, &output)).kind, Kind::Failed(_)));
        let close_by = Some(Timestamp::from_millis(1400));
        let event = final_event(failure(true), &AttemptSummary { close_by, ..summary(1, &output) });
        assert!(matches!(event.kind, Kind::Failed(_)), "the next attempt would begin at 1500");
    }

    #[test]
    fn a_released_attempt_is_retried_immediately_even_if_it_was_the_last() {
        let released = Outcome::Released(RequestError::new(ErrorCode::Unavailable, "stopping"));
        let event = final_event(released, &summary(2, &OutputDigest::default()));
        assert_eq!(event.retry_at, Some(Timestamp::from_millis(1000)));
    }

    #[test]
    fn only_failed_attempts_use_up_the_policy() {
        let output = OutputDigest::default();
        // Nine attempts were released; the tenth is the first that fails.
        let released = AttemptSummary { failed_attempts: 0, ..summary(10, &output) };
        let event = final_event(failure(true), &released);
        assert_eq!(event.retry_at, Some(Timestamp::from_millis(1500)));
        let Kind::Retrying(retrying) = event.kind else { panic!("{:?}", event.kind) };
        assert!(!retrying.released);
        let last = AttemptSummary { failed_attempts: 1, ..summary(10, &output) };
        assert!(matches!(final_event(failure(true), &last).kind, Kind::Failed(_)));
        let release = || Outcome::Released(RequestError::new(ErrorCode::Unavailable, "stopping"));
        let event = final_event(release(), &last);
        let Kind::Retrying(retrying) = event.kind else { panic!("{:?}", event.kind) };
        assert!(retrying.released && event.retry_at > Some(Timestamp::from_millis(1000)));
        // Two releases and four failures.
        let event =
            final_event(release(), &AttemptSummary { failed_attempts: 4, ..summary(6, &output) });
        assert_eq!(event.retry_at, Some(Timestamp::from_millis(1000)));
    }

    #[test]
    fn cancellation_overrides_failure_but_not_success() {
        let mut output = OutputDigest::default();
        output.push(b"x");
        let cancelled =
            AttemptSummary { cancel_reason: Some("enough".into()), ..summary(1, &output) };
        let event = final_event(failure(true), &cancelled);
        let Kind::Cancelled(end) = event.kind else { panic!("{:?}", event.kind) };
        assert_eq!((end.reason.as_str(), end.output.unwrap().chunks), ("enough", 1));
        let event = final_event(Outcome::Succeeded("1".into()), &cancelled);
        assert!(matches!(event.kind, Kind::Succeeded(_)));
    }
}
