//! What follows from how an attempt ended: pure decisions, as events.

use std::time::Duration;

use streamer_core::{
    ErrorCode, OutputDigest, RequestError, RetryPolicy, Timestamp, limits, validate,
};
use streamer_proto::{
    common::v1::{Cancelled, Event, Failed, OutputSummary, Retrying, Succeeded, event::Kind},
    timestamp,
};
use streamer_rpc::{error_to_proto, json_payload};
use streamer_store::RequestRecord;

/// An attempt up to this one that is handed back is followed at once by another.
const FREE_RETURNS: u32 = 3;

/// How an attempt ended.
pub(crate) enum Outcome {
    /// With this JSON result.
    Succeeded(bytes::Bytes),
    /// With this error.
    Failed(RequestError),
    /// Not at all: it was handed back unfinished, for this reason.
    Released(RequestError),
}

/// The last event of an attempt.
pub(crate) struct Ending {
    pub(crate) kind: Kind,
    /// When another attempt is due.
    pub(crate) retry_at: Option<Timestamp>,
}

/// What is known of the attempt when it ends.
pub(crate) struct Ended<'a> {
    pub(crate) attempt: u32,
    /// `seq` of its `started` event.
    pub(crate) attempt_seq: i64,
    pub(crate) output: &'a OutputDigest,
    /// Why cancellation was asked for, when it was.
    pub(crate) cancel_reason: Option<String>,
    pub(crate) policy: RetryPolicy,
    /// No attempt may start from then on.
    pub(crate) close_by: Option<Timestamp>,
    pub(crate) now: Timestamp,
    /// 0.0 to 1.0.
    pub(crate) random: f64,
}

/// Decides how the attempt's log goes on. Asked-for cancellation wins over failure, success over
/// both.
pub(crate) fn conclude(outcome: Outcome, ended: &Ended<'_>) -> Ending {
    let last = |kind| Ending { kind, retry_at: None };
    let (error, released) = match outcome {
        Outcome::Succeeded(result) => {
            return last(Kind::Succeeded(Succeeded {
                result: Some(json_payload(result)),
                output: Some(summary(ended.output)),
            }));
        }
        Outcome::Failed(error) => (bounded(error), false),
        Outcome::Released(error) => (bounded(error), true),
    };
    if let Some(reason) = &ended.cancel_reason {
        return last(Kind::Cancelled(Cancelled {
            reason: reason.clone(),
            output: Some(summary(ended.output)),
        }));
    }
    let in_time = |wait: Duration| ended.close_by.is_none_or(|limit| ended.now.plus(wait) < limit);
    let wait = if released {
        // It costs no attempt, but one that comes back again and again must not go round and round.
        let again = ended.attempt.saturating_sub(FREE_RETURNS);
        let unbounded = RetryPolicy { max_attempts: u32::MAX, ..ended.policy };
        let patience = |failed| unbounded.backoff(failed, ended.random);
        if again == 0 { Some(Duration::ZERO) } else { patience(again) }
    } else if error.retryable && !ended.policy.final_errors.contains(error.code) {
        ended.policy.backoff(ended.attempt, ended.random)
    } else {
        None
    };
    match wait {
        Some(wait) if in_time(wait) => retry(&error, wait, ended),
        _ => last(failed(&error, ended.attempt_seq)),
    }
}

/// An error whose every part is small enough to be kept and shown.
fn bounded(error: RequestError) -> RequestError {
    RequestError {
        message: validate::cut(error.message, limits::MAX_ERROR_MESSAGE_BYTES),
        details: error.details.filter(|text| text.len() <= limits::MAX_ERROR_DETAILS_BYTES),
        ..error
    }
}

fn retry(error: &RequestError, wait: Duration, ended: &Ended<'_>) -> Ending {
    let retry_at = ended.now.plus(wait);
    let kind = Kind::Retrying(Retrying {
        retry_at: Some(timestamp(retry_at.as_millis())),
        rewind_to_seq: ended.attempt_seq,
        error: Some(error_to_proto(error)),
    });
    Ending { kind, retry_at: Some(retry_at) }
}

/// The end of a request whose output, after `rewind_to_seq`, is void.
pub(crate) fn failed(error: &RequestError, rewind_to_seq: i64) -> Kind {
    Kind::Failed(Failed {
        error: Some(error_to_proto(error)),
        rewind_to_seq,
        output: Some(summary(&OutputDigest::default())),
    })
}

/// The end of a request that waited too long, for its first attempt or for another.
pub(crate) fn overdue(record: &RequestRecord, now: Timestamp) -> Kind {
    let passed = |limit: Option<Timestamp>| limit.filter(|limit| *limit <= now);
    let message = match (passed(record.close_by), passed(record.deadline)) {
        (None, Some(deadline)) => format!("it was not started by its deadline, {deadline}"),
        (close_by, _) => format!(
            "it had not ended within its schedule-to-close timeout, at {}",
            close_by.unwrap_or(now)
        ),
    };
    let error = RequestError { retryable: false, ..RequestError::new(ErrorCode::Timeout, message) };
    failed(&error, 0)
}

pub(crate) fn summary(output: &OutputDigest) -> OutputSummary {
    OutputSummary { chunks: output.chunks(), sha256: output.sha256().to_vec().into() }
}

/// An event of an attempt.
pub(crate) fn event(seq: i64, attempt: u32, now: Timestamp, kind: Kind) -> Event {
    Event {
        seq,
        attempt: i32::try_from(attempt).unwrap_or(i32::MAX),
        time: Some(timestamp(now.as_millis())),
        kind: Some(kind),
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::ErrorCodes;

    use super::*;

    fn ended(attempt: u32, output: &OutputDigest) -> Ended<'_> {
        Ended {
            attempt,
            attempt_seq: 7,
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
        let ending = conclude(failure(true), &ended(1, &OutputDigest::default()));
        assert_eq!(ending.retry_at, Some(Timestamp::from_millis(1500)));
        let Kind::Retrying(retrying) = ending.kind else { panic!("{:?}", ending.kind) };
        assert_eq!(retrying.rewind_to_seq, 7);
    }

    #[test]
    fn the_last_attempt_and_final_errors_fail() {
        for (attempt, retryable) in [(2, true), (1, false)] {
            let ending = conclude(failure(retryable), &ended(attempt, &OutputDigest::default()));
            let Kind::Failed(failed) = ending.kind else { panic!("{:?}", ending.kind) };
            assert_eq!(failed.output.unwrap().chunks, 0);
            assert_eq!(ending.retry_at, None);
        }
    }

    #[test]
    fn what_the_policy_calls_final_and_what_comes_too_late_fails() {
        let output = OutputDigest::default();
        let timeout = Outcome::Failed(RequestError::new(ErrorCode::Timeout, "slow"));
        assert!(matches!(conclude(timeout, &ended(1, &output)).kind, Kind::Failed(_)));
        let close_by = Some(Timestamp::from_millis(1400));
        let ending = conclude(failure(true), &Ended { close_by, ..ended(1, &output) });
        assert!(matches!(ending.kind, Kind::Failed(_)), "the next attempt would begin at 1500");
    }

    #[test]
    fn what_is_handed_back_starts_again_at_once_even_after_the_last_attempt() {
        let released = Outcome::Released(RequestError::new(ErrorCode::Unavailable, "stopping"));
        let ending = conclude(released, &ended(2, &OutputDigest::default()));
        assert_eq!(ending.retry_at, Some(Timestamp::from_millis(1000)));
    }

    #[test]
    fn cancellation_wins_over_failure_but_not_over_success() {
        let mut output = OutputDigest::default();
        output.push(b"x");
        let cancelled = Ended { cancel_reason: Some("enough".into()), ..ended(1, &output) };
        let ending = conclude(failure(true), &cancelled);
        let Kind::Cancelled(end) = ending.kind else { panic!("{:?}", ending.kind) };
        assert_eq!((end.reason.as_str(), end.output.unwrap().chunks), ("enough", 1));
        let ending = conclude(Outcome::Succeeded("1".into()), &cancelled);
        assert!(matches!(ending.kind, Kind::Succeeded(_)));
    }
}
