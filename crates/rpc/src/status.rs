//! Failures as gRPC statuses with `google.rpc` details, and back.

use std::{collections::HashMap, time::Duration};

use serde::Deserialize;
use streamer_core::{ErrorCode, RequestError, Violations, validate::cut};
use streamer_store::StoreError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Statuses travel in headers, of which many clients take 8 KiB in all.
const MAX_MESSAGE_BYTES: usize = 2048;
const MAX_DETAILS_BYTES: usize = 2048;
/// `ErrorInfo.domain` of everything that Streamer refuses.
const DOMAIN: &str = "streamer";
/// Key of `ErrorInfo.metadata` under which further details travel.
const DETAILS: &str = "details";
/// When the store could not do something, its callers should wait for so long.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// Key of `ErrorInfo.metadata` that says whether to try again.
const RETRYABLE: &str = "retryable";

/// A failure as a status: `ErrorInfo` carries its code as reason.
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

/// What the details of an error say about coming again.
#[derive(Default, Deserialize)]
struct Quota {
    limit: Option<String>,
    retry_after_ms: Option<u64>,
}

impl Quota {
    fn of(error: &RequestError) -> Self {
        let temporary = matches!(error.code, ErrorCode::RateLimited | ErrorCode::Unavailable);
        let details = error.details.as_deref().filter(|_| temporary);
        // A handler's own details may have any shape.
        details.and_then(|details| serde_json::from_str(details).ok()).unwrap_or_default()
    }
}

/// Every broken rule at once: `INVALID_ARGUMENT` with `BadRequest`.
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

/// The broken rules as the JSON object that `Error.details` holds.
#[must_use]
pub fn violations_details(violations: &Violations) -> String {
    fields_details(violations.iter().map(|one| (one.field.as_str(), one.description.as_str())))
}

fn fields_details<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let list: Vec<_> = fields
        .map(|(field, description)| {
            serde_json::json!({ "field": field, "description": description })
        })
        .collect();
    serde_json::json!({ "violations": list }).to_string()
}

/// The answer for what is not there, and for what is not the caller's: they look the same.
#[must_use]
pub fn not_found(name: &str) -> Status {
    let shown: String = name.chars().take(140).collect();
    status(&RequestError::new(ErrorCode::NotFound, format!("there is no request {shown:?}")))
}

/// A failure of the store. It is told here, where the engine's words end: they are for operators.
#[must_use]
pub fn store_status(error: &StoreError) -> Status {
    let (code, message) = match error {
        StoreError::Unavailable { .. } => {
            tracing::warn!(%error, "a call failed");
            let message = "the store is unavailable; try again";
            let mut error = RequestError::new(ErrorCode::Unavailable, message);
            error.details = Some(format!("{{\"retry_after_ms\":{}}}", STORE_PAUSE.as_millis()));
            return status(&error);
        }
        StoreError::Overloaded { .. } => {
            tracing::warn!(%error, "a call failed");
            let message = "the store has too much to do; try again";
            return status(&RequestError::limited("store", message, Some(STORE_PAUSE)));
        }
        StoreError::Refused { .. } => {
            tracing::error!(%error, "a call failed");
            (ErrorCode::ValidationError, "the store does not take this")
        }
        StoreError::Corrupt { .. } | StoreError::Locked { .. } | StoreError::TooNew { .. } => {
            tracing::error!(%error, "a call failed");
            (ErrorCode::InternalError, "the store is damaged; its operator has to look")
        }
    };
    status(&RequestError::new(code, message))
}

/// What a status says, in the words of the protocols: Streamer's own code where it carries one,
/// else the nearest.
#[must_use]
pub fn request_error(status: &Status) -> RequestError {
    let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
    let own_code = info.as_ref().and_then(|info| ErrorCode::from_name(&info.reason));
    let code = own_code.unwrap_or_else(|| nearest(status.code()));
    let metadata = info.map(|info| info.metadata).unwrap_or_default();
    RequestError {
        code,
        message: status.message().to_owned(),
        retryable: metadata.get(RETRYABLE).map_or(code.is_retryable(), |value| value == "true"),
        details: metadata.get(DETAILS).cloned().or_else(|| {
            let rules = status.get_details_bad_request()?.field_violations;
            let fields = rules.iter().map(|one| (one.field.as_str(), one.description.as_str()));
            Some(fields_details(fields))
        }),
    }
}

/// Tonic's own refusal of a message beyond `limit` bytes, which comes before any of our code, in
/// our words; every other answer as it is.
#[must_use]
pub fn name_message_limit<B>(response: http::Response<B>, limit: usize) -> http::Response<B>
where
    B: Default,
{
    // We never answer OUT_OF_RANGE ourselves.
    let refused = Status::from_header_map(response.headers())
        .is_some_and(|status| status.code() == Code::OutOfRange);
    if !refused {
        return response;
    }
    let mut violations = Violations::default();
    violations.push(
        "message",
        format!("must be at most {limit} bytes (limits.max_payload_bytes and some for the rest)"),
    );
    validation_status(&violations).into_http()
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

fn nearest(code: Code) -> ErrorCode {
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
    fn failures_come_back_from_statuses() {
        for code in ErrorCode::ALL {
            let error = RequestError {
                retryable: !code.is_retryable(),
                details: Some("{\"a\":1}".into()),
                ..RequestError::new(code, "because")
            };
            assert_eq!(request_error(&status(&error)), error);
        }
    }

    #[test]
    fn limits_are_told_as_google_rpc_does() {
        let wait = Duration::from_millis(1500);
        let status = status(&RequestError::limited("a.b", "too many", Some(wait)));
        assert_eq!(status.message(), "too many (a.b)");
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(wait));
        assert_eq!(status.get_details_quota_failure().unwrap().violations[0].subject, "a.b");
    }

    #[test]
    fn violations_stand_in_bad_request_and_in_details() {
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
