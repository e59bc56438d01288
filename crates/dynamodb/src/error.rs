//! What the errors of the SDK mean to the store.

use aws_sdk_dynamodb::{
    error::{ProvideErrorMetadata, SdkError},
    types::CancellationReason,
};
use streamer_store::StoreError;

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing says where the tables are.
    #[error(
        "dynamodb.region: is required, since neither AWS_REGION nor the AWS configuration names one"
    )]
    Region,
    /// The object store's URL cannot be used.
    #[error("dynamodb.objects: {0}")]
    Objects(String),
    /// The tables are not as they must be, or cannot be asked for.
    #[error("{0}")]
    Tables(String),
}

impl OpenError {
    /// Whether it is the configuration that is wrong.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Region | Self::Objects(_) => true,
            Self::Tables(_) => false,
        }
    }
}

/// Codes that mean "more than is provisioned or allowed": the same call may succeed a little later.
const THROTTLED: [&str; 6] = [
    "ProvisionedThroughputExceededException",
    "ProvisionedThroughputExceeded",
    "ThrottlingException",
    "ThrottlingError",
    "Throttling",
    "RequestLimitExceeded",
];
/// Codes that mean that two transactions met.
const CONFLICTS: [&str; 3] =
    ["TransactionConflict", "TransactionConflictException", "TransactionInProgressException"];

pub(crate) fn is_throttled(code: &str) -> bool {
    THROTTLED.contains(&code)
}

pub(crate) fn is_conflict(code: &str) -> bool {
    CONFLICTS.contains(&code)
}

/// A failed call, after the SDK has repeated it as often as it may.
pub(crate) fn store_error<E, R>(doing: &'static str, error: &SdkError<E, R>) -> StoreError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    let code = error.code().unwrap_or_default().to_owned();
    let reason = match error.message() {
        Some(message) => format!("{code}: {message}"),
        None => chain(error),
    };
    of_code(doing, &code, reason)
}

/// What happened, down to its cause.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
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

/// A transaction that did not happen, for the reason that counts.
pub(crate) fn cancelled(doing: &'static str, reasons: &[CancellationReason]) -> StoreError {
    let said: Vec<_> = reasons
        .iter()
        .filter(|reason| !matches!(reason.code(), None | Some("None")))
        .map(|reason| {
            format!("{}: {}", reason.code().unwrap_or("?"), reason.message().unwrap_or(""))
        })
        .collect();
    let codes = || reasons.iter().filter_map(CancellationReason::code);
    let code = codes().find(|code| is_throttled(code)).or_else(|| codes().find(|c| *c != "None"));
    of_code(doing, code.unwrap_or_default(), format!("transaction cancelled: {}", said.join(", ")))
}

fn of_code(doing: &'static str, code: &str, reason: String) -> StoreError {
    if is_throttled(code) {
        return StoreError::Overloaded { doing, reason };
    }
    match code {
        "ValidationException" | "ValidationError" | "ItemCollectionSizeLimitExceededException" => {
            StoreError::Refused { doing, reason }
        }
        "ResourceNotFoundException" => StoreError::Unavailable {
            doing,
            reason: format!("{reason} (`streamer tables create` makes the tables)"),
        },
        _ => StoreError::Unavailable { doing, reason },
    }
}

/// What is stored cannot be read.
pub(crate) fn damaged(doing: &'static str, reason: impl std::fmt::Display) -> StoreError {
    let reason = reason.to_string();
    StoreError::Corrupt { doing, reason }
}
