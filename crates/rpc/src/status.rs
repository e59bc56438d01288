//! Conversion of errors to and from gRPC statuses with `google.rpc` details.

use std::{collections::HashMap, time::Duration};

use serde::Deserialize;
use streamer_core::{ErrorCode, RequestError, Violations, validate::cut};
use streamer_store::StoreError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Maximum size of a status message, in bytes. Statuses are sent in headers, and many clients accept at most
/// 8 KiB of headers.
const MAX_MESSAGE_BYTES: usize = 2048;
const MAX_DETAILS_BYTES: usize = 2048;
/// `ErrorInfo.domain` of Streamer's errors.
const DOMAIN: &str = "streamer";
/// Key of `ErrorInfo.metadata` that contains further details.
const DETAILS: &str = "details";
/// Retry delay that callers receive when the store is unavailable or overloaded.
const STORE_RETRY_DELAY: Duration = Duration::from_secs(1);
/// Key of `ErrorInfo.metadata` that contains whether to retry.
const RETRYABLE: &str = "retryable";

/// Converts an error to a status, with its code as `ErrorInfo.reason`.
#[must_use]
pub fn status(error: &RequestError) -> Status {
    let mut metadata = HashMap::from([(RETRYABLE.to_owned(), error.retryable.to_string())]);
    if let Some(details) = error.details.as_ref().filter(|text| text.len() <= MAX_DETAILS_BYTES) {
        metadata.insert(DETAILS.to_owned(), details.clone());
    }
    let mut details = ErrorDetails::with_error_info(error.code.as_str(), DOMAIN, metadata);
    let quota = Quota::of(error);
    if let Some(limit) = quota.limit {
        details.add_quota_failure_violation(limit, &error.message);
    }
    if let Some(wait) = quota.retry_after_ms {
        details.set_retry_info(Some(Duration::from_millis(wait)));
    }
    let message = cut(error.message.clone(), MAX_MESSAGE_BYTES);
    Status::with_error_details(grpc_code(error.code), message, details)
}

/// Converts an error that is retryable if `code` is retryable to a status.
pub fn error_status(code: ErrorCode, message: impl Into<String>) -> Status {
    status(&RequestError::new(code, message))
}

/// Limit and retry delay in the details of an error.
#[derive(Default, Deserialize)]
struct Quota {
    limit: Option<String>,
    retry_after_ms: Option<u64>,
}

impl Quota {
    fn of(error: &RequestError) -> Self {
        let temporary = matches!(error.code, ErrorCode::RateLimited | ErrorCode::Unavailable);
        let details = error.details.as_deref().filter(|_| temporary);
        // Details from a handler may have any shape.
        details.and_then(|details| serde_json::from_str(details).ok()).unwrap_or_default()
    }
}

/// Returns `INVALID_ARGUMENT` with all violations in `BadRequest`.
#[must_use]
pub fn validation_status(violations: &Violations) -> Status {
    let fields: Vec<_> = violations
        .iter()
        .map(|violation| FieldViolation::new(&violation.field, &violation.description))
        .collect();
    let mut details = ErrorDetails::with_bad_request(fields);
    let metadata = HashMap::from([(RETRYABLE.to_owned(), "false".to_owned())]);
    details.set_error_info(ErrorCode::ValidationError.as_str(), DOMAIN, metadata);
    Status::with_error_details(Code::InvalidArgument, violations.to_string(), details)
}

/// Returns `INVALID_ARGUMENT` for a field that violates a rule.
#[must_use]
pub fn violation_status(field: &str, rule: &str) -> Status {
    let mut violations = Violations::default();
    violations.push(field, rule);
    validation_status(&violations)
}

/// Returns the violations as the JSON object in `Error.details`.
#[must_use]
pub fn violations_details(violations: &Violations) -> String {
    violations_json(violations.iter().map(|one| (one.field.as_str(), one.description.as_str())))
}

fn violations_json<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let list: Vec<_> = fields
        .map(|(field, description)| {
            serde_json::json!({ "field": field, "description": description })
        })
        .collect();
    serde_json::json!({ "violations": list }).to_string()
}

/// Returns the status for a request that does not exist or that the caller may not see: callers cannot
/// distinguish the two.
#[must_use]
pub fn not_found(name: &str) -> Status {
    let shown: String = name.chars().take(140).collect();
    error_status(ErrorCode::NotFound, format!("request not found: {shown:?}"))
}

/// Converts a store error to a status. It logs the engine's message, which is for operators, and omits it
/// from the status.
#[must_use]
pub fn store_status(error: &StoreError) -> Status {
    let (code, message) = match error {
        StoreError::Unavailable { .. } => {
            tracing::warn!(%error, "store call failed");
            let message = "the store is unavailable; try again";
            let mut error = RequestError::new(ErrorCode::Unavailable, message);
            error.details =
                Some(format!("{{\"retry_after_ms\":{}}}", STORE_RETRY_DELAY.as_millis()));
            return status(&error);
        }
        StoreError::Overloaded { .. } => {
            tracing::warn!(%error, "store call failed");
            let message = "the store is overloaded; try again";
            return status(&RequestError::limited("store", message, Some(STORE_RETRY_DELAY)));
        }
        StoreError::Rejected { .. } => {
            tracing::error!(%error, "store call failed");
            (ErrorCode::ValidationError, "rejected by storage")
        }
        StoreError::Corrupt { .. }
        | StoreError::Locked { .. }
        | StoreError::UnsupportedVersion { .. } => {
            tracing::error!(%error, "store call failed");
            (ErrorCode::InternalError, "storage is corrupt or unusable; contact the operator")
        }
    };
    error_status(code, message)
}

/// Converts a status to an error with the Streamer code that the status contains, or otherwise with the
/// nearest code.
#[must_use]
pub fn request_error(status: &Status) -> RequestError {
    let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
    let own_code = info.as_ref().and_then(|info| ErrorCode::from_name(&info.reason));
    let code = own_code.unwrap_or_else(|| nearest_error_code(status.code()));
    let metadata = info.map(|info| info.metadata).unwrap_or_default();
    RequestError {
        code,
        message: status.message().to_owned(),
        retryable: metadata.get(RETRYABLE).map_or(code.is_retryable(), |value| value == "true"),
        details: metadata.get(DETAILS).cloned().or_else(|| {
            let rules = status.get_details_bad_request()?.field_violations;
            let fields = rules.iter().map(|one| (one.field.as_str(), one.description.as_str()));
            Some(violations_json(fields))
        }),
    }
}

/// Replaces tonic's rejection of a message larger than `limit` bytes, which does not reach the service, with
/// a validation error; returns all other responses unchanged.
#[must_use]
pub fn map_message_too_large<B>(response: http::Response<B>, limit: usize) -> http::Response<B>
where
    B: Default,
{
    // No Streamer service returns OUT_OF_RANGE.
    let is_too_large = Status::from_header_map(response.headers())
        .is_some_and(|status| status.code() == Code::OutOfRange);
    if !is_too_large {
        return response;
    }
    let rule = format!("must be at most {limit} bytes (limits.max_payload_bytes plus overhead)");
    violation_status("message", &rule).into_http()
}

fn grpc_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::ValidationError => Code::InvalidArgument,
        ErrorCode::InvalidAction | ErrorCode::NotFound => Code::NotFound,
        ErrorCode::Unauthorized => Code::Unauthenticated,
        ErrorCode::Forbidden => Code::PermissionDenied,
        ErrorCode::Conflict => Code::AlreadyExists,
        ErrorCode::RateLimited => Code::ResourceExhausted,
        ErrorCode::Timeout => Code::DeadlineExceeded,
        ErrorCode::Cancelled => Code::Cancelled,
        ErrorCode::ProcessingFailed => Code::Unknown,
        ErrorCode::Unavailable => Code::Unavailable,
        ErrorCode::InternalError => Code::Internal,
    }
}

fn nearest_error_code(code: Code) -> ErrorCode {
    match code {
        Code::InvalidArgument | Code::OutOfRange => ErrorCode::ValidationError,
        Code::NotFound => ErrorCode::NotFound,
        Code::Unauthenticated => ErrorCode::Unauthorized,
        Code::PermissionDenied => ErrorCode::Forbidden,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => ErrorCode::Conflict,
        Code::ResourceExhausted => ErrorCode::RateLimited,
        Code::DeadlineExceeded => ErrorCode::Timeout,
        Code::Cancelled => ErrorCode::Cancelled,
        Code::Unknown => ErrorCode::ProcessingFailed,
        Code::Unavailable => ErrorCode::Unavailable,
        Code::Ok | Code::Unimplemented | Code::Internal | Code::DataLoss => {
            ErrorCode::InternalError
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_round_trip_through_statuses() {
        for &code in ErrorCode::ALL {
            let error = RequestError {
                retryable: !code.is_retryable(),
                details: Some("{\"a\":1}".into()),
                ..RequestError::new(code, "reason")
            };
            assert_eq!(request_error(&status(&error)), error);
        }
    }

    #[test]
    fn exceeded_limits_have_google_rpc_details() {
        let wait = Duration::from_millis(1500);
        let status = status(&RequestError::limited("a.b", "too many", Some(wait)));
        assert_eq!(status.message(), "too many (a.b)");
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(wait));
        assert_eq!(status.get_details_quota_failure().unwrap().violations[0].subject, "a.b");
    }

    #[test]
    fn violations_are_in_bad_request_and_in_details() {
        let mut violations = Violations::default();
        violations.push("id", "is too long");
        let status = validation_status(&violations);
        let fields = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(fields.len(), 1);
        assert_eq!(fields[0].field, "id");
        let details = request_error(&status).details.unwrap();
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&details).unwrap(),
            serde_json::json!({"violations": [{"field": "id", "description": "is too long"}]})
        );
    }
}
