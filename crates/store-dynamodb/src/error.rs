//! Converts SDK errors to store errors.

use aws_sdk_dynamodb::{
    error::{ProvideErrorMetadata, SdkError},
    operation::transact_write_items::TransactWriteItemsError,
    types::CancellationReason,
};
use streamer_store::StoreError;

/// Error that occurs when the store is opened or its tables are managed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No AWS region is configured.
    #[error(
        "dynamodb.region: is required, since neither AWS_REGION nor the AWS configuration names one"
    )]
    Region,
    /// The object store cannot be used.
    #[error("dynamodb.object_store_url: {0}")]
    Objects(String),
    /// A table cannot be described or created.
    #[error("{0}")]
    Tables(String),
}

impl OpenError {
    /// Returns whether the error is caused by an invalid configuration.
    #[must_use]
    pub fn is_configuration_error(&self) -> bool {
        match self {
            Self::Region | Self::Objects(_) => true,
            Self::Tables(_) => false,
        }
    }
}

/// Error codes of throttled calls, for which a retry after a short delay may succeed.
const THROTTLED: [&str; 6] = [
    "ProvisionedThroughputExceededException",
    "ProvisionedThroughputExceeded",
    "ThrottlingException",
    "ThrottlingError",
    "Throttling",
    "RequestLimitExceeded",
];
/// Error codes of conflicting transactions.
const CONFLICTS: [&str; 3] =
    ["TransactionConflict", "TransactionConflictException", "TransactionInProgressException"];

pub(crate) fn is_throttled(code: &str) -> bool {
    THROTTLED.contains(&code)
}

pub(crate) fn is_conflict(code: &str) -> bool {
    CONFLICTS.contains(&code)
}

/// Converts the error that a call returned after all retries of the SDK.
pub(crate) fn store_error<E, R>(doing: &'static str, error: &SdkError<E, R>) -> StoreError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    let code = error.code().unwrap_or_default().to_owned();
    let reason = match error.message() {
        Some(message) => format!("{code}: {message}"),
        None => error_chain(error),
    };
    error_for_code(doing, &code, reason)
}

/// Returns the message of an error, followed by the messages of its causes.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut reasons = vec![error.to_string()];
    let mut source = error.source();
    while let Some(reason) = source {
        let text = reason.to_string();
        if reasons.last() != Some(&text) {
            reasons.push(text);
        }
        source = reason.source();
    }
    reasons.join(": ")
}

/// Converts the cancellation of a transaction, according to the most relevant of `reasons`.
pub(crate) fn transaction_error(doing: &'static str, reasons: &[CancellationReason]) -> StoreError {
    let messages: Vec<_> = reasons
        .iter()
        .filter(|reason| !matches!(reason.code(), None | Some("None")))
        .map(|reason| {
            format!("{}: {}", reason.code().unwrap_or("?"), reason.message().unwrap_or(""))
        })
        .collect();
    let codes = || reasons.iter().filter_map(CancellationReason::code);
    let code = codes().find(|code| is_throttled(code)).or_else(|| codes().find(|c| *c != "None"));
    error_for_code(
        doing,
        code.unwrap_or_default(),
        format!("transaction cancelled: {}", messages.join(", ")),
    )
}

/// Returns the cancellation reasons if a transaction was cancelled.
pub(crate) fn cancellation_reasons<R>(
    error: &SdkError<TransactWriteItemsError, R>,
) -> Option<&[CancellationReason]> {
    match error.as_service_error() {
        Some(TransactWriteItemsError::TransactionCanceledException(cancelled)) => {
            Some(cancelled.cancellation_reasons())
        }
        _ => None,
    }
}

/// Returns whether a transaction failed only because of conflicts or throttling.
pub(crate) fn is_transient(reasons: &[CancellationReason]) -> bool {
    let mut codes =
        reasons.iter().filter_map(|reason| reason.code()).filter(|code| *code != "None");
    codes.all(|code| is_conflict(code) || is_throttled(code))
}

fn error_for_code(doing: &'static str, code: &str, reason: String) -> StoreError {
    if is_throttled(code) {
        return StoreError::Overloaded { doing, reason };
    }
    match code {
        "ValidationException" | "ValidationError" | "ItemCollectionSizeLimitExceededException" => {
            StoreError::Rejected { doing, reason }
        }
        "ResourceNotFoundException" => StoreError::Unavailable {
            doing,
            reason: format!("{reason} (`streamer tables create` creates the tables)"),
        },
        _ => StoreError::Unavailable { doing, reason },
    }
}

/// Returns an error for stored data that cannot be read.
pub(crate) fn corrupt(doing: &'static str, reason: impl std::fmt::Display) -> StoreError {
    let reason = reason.to_string();
    StoreError::Corrupt { doing, reason }
}
