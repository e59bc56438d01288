//! Failures as gRPC statuses with `google.rpc` details, and back.

use std::collections::HashMap;

use streamer_core::{ErrorCode, RequestError, Violations};
use streamer_store::StoreError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// `ErrorInfo.domain` of everything that Streamer refuses.
const DOMAIN: &str = "streamer";
/// Key of `ErrorInfo.metadata` under which further details travel.
const DETAILS: &str = "details";
/// Key of `ErrorInfo.metadata` that says whether to try again.
const RETRYABLE: &str = "retryable";

/// A failure as a status: `ErrorInfo` carries its code as reason.
#[must_use]
pub fn status(error: &RequestError) -> Status {
    let mut metadata = HashMap::from([(RETRYABLE.to_owned(), error.retryable.to_string())]);
    if let Some(details) = &error.details {
        metadata.insert(DETAILS.to_owned(), details.clone());
    }
    let details = ErrorDetails::with_error_info(error.code.as_str(), DOMAIN, metadata);
    Status::with_error_details(grpc_code(error.code), error.message.clone(), details)
}

/// Every broken rule at once: `INVALID_ARGUMENT` with `BadRequest`.
#[must_use]
pub fn validation_status(violations: &Violations) -> Status {
    let fields: Vec<_> = violations
        .iter()
        .map(|violation| FieldViolation::new(&violation.field, &violation.description))
        .collect();
    let mut details = ErrorDetails::with_bad_request(fields);
    let metadata = HashMap::from([
        (RETRYABLE.to_owned(), "false".to_owned()),
        (DETAILS.to_owned(), violations_details(violations)),
    ]);
    details.set_error_info(ErrorCode::ValidationError.as_str(), DOMAIN, metadata);
    Status::with_error_details(Code::InvalidArgument, violations.to_string(), details)
}

/// The broken rules as the JSON object that `Error.details` holds.
#[must_use]
pub fn violations_details(violations: &Violations) -> String {
    let list: Vec<_> = violations
        .iter()
        .map(|violation| {
            serde_json::json!({ "field": violation.field, "description": violation.description })
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

/// A failure of the store.
#[must_use]
pub fn store_status(error: &StoreError) -> Status {
    let code = match error {
        StoreError::Unavailable { .. } => ErrorCode::Unavailable,
        StoreError::Corrupt { .. } | StoreError::Locked { .. } | StoreError::TooNew { .. } => {
            ErrorCode::InternalError
        }
    };
    status(&RequestError::new(code, error.to_string()))
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
        details: metadata.get(DETAILS).cloned(),
    }
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
