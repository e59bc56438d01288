//! Messages that are events of a request's log.

use std::borrow::Cow;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use streamer_core::{ErrorCode, RequestError};

use crate::ClientError;

/// Members that identify an event of a request's log.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct EventHead {
    /// ID that the caller specified.
    pub request_id: String,
    /// ID that the server assigned.
    pub uid: String,
    /// Sequence number of the event.
    pub seq: i64,
    /// Number of the attempt; 0 before the first attempt.
    pub attempt: i32,
}

/// Event of a log, whose head is parsed separately: serde's `flatten` would buffer, and thus check, members that this
/// version does not know.
pub(super) trait LogEvent: DeserializeOwned {
    fn head(&mut self) -> &mut EventHead;

    /// Parses the text of a message.
    fn parse(text: &str) -> serde_json::Result<Self> {
        let mut event: Self = serde_json::from_str(text)?;
        *event.head() = serde_json::from_str(text)?;
        Ok(event)
    }
}

macro_rules! log_events {
    ($($name:ty),*) => {
        $(impl LogEvent for $name {
            fn head(&mut self) -> &mut EventHead {
                &mut self.event
            }
        })*
    };
}

log_events!(Accepted, Started, Progress, Output, Retrying, Complete);

/// `accepted`.
#[derive(Clone, Debug, Deserialize)]
pub struct Accepted {
    /// Identifies the event.
    #[serde(skip)]
    pub event: EventHead,
    /// Action of the request.
    pub action: String,
}

/// `started`.
#[derive(Clone, Debug, Deserialize)]
pub struct Started {
    /// Identifies the event.
    #[serde(skip)]
    pub event: EventHead,
    /// Name of the processor or worker that runs the attempt.
    pub worker: String,
}

/// `progress`.
#[derive(Clone, Debug, Deserialize)]
pub struct Progress {
    /// Identifies the event.
    #[serde(skip)]
    pub event: EventHead,
    /// Completed percentage, if it is known.
    pub percentage: Option<f64>,
    /// Description of the current step.
    pub message: String,
    /// Metadata of the handler.
    pub metadata: Option<Box<RawValue>>,
}

/// `output`.
#[derive(Clone, Debug, Deserialize)]
pub struct Output {
    /// Identifies the event.
    #[serde(skip)]
    pub event: EventHead,
    /// Index of the chunk, starting at 0.
    pub chunk_index: i64,
    /// The chunk: JSON, or a string according to `content_type` and `encoding`.
    pub data: Box<RawValue>,
    /// Content type of a chunk that is not JSON.
    pub content_type: Option<String>,
    /// `base64` if the chunk is neither JSON nor text.
    pub encoding: Option<String>,
}

impl Output {
    /// Returns the bytes of the chunk.
    ///
    /// # Errors
    /// Returns an error if the chunk is not encoded as `content_type` and `encoding` require.
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>, ClientError> {
        if self.content_type.is_none() {
            return Ok(self.data.get().as_bytes().into());
        }
        let malformed = |error: &dyn std::fmt::Display| {
            ClientError::Protocol(format!("malformed output chunk: {error}"))
        };
        let text: String =
            serde_json::from_str(self.data.get()).map_err(|error| malformed(&error))?;
        match self.encoding.as_deref() {
            Some("base64") => Ok(STANDARD.decode(text).map_err(|error| malformed(&error))?.into()),
            _ => Ok(text.into_bytes().into()),
        }
    }
}

/// `retrying`.
#[derive(Clone, Debug, Deserialize)]
pub struct Retrying {
    /// Identifies the event.
    #[serde(skip)]
    pub event: EventHead,
    /// Time at which the next attempt is due.
    pub retry_at: String,
    /// Sequence number after which output chunks are void.
    pub rewind_to_seq: i64,
    /// Whether the attempt was handed back unfinished, and does not count as failed.
    #[serde(default)]
    pub released: bool,
    /// Error of the attempt, or why it was handed back.
    pub error: ErrorBody,
}

/// `complete`.
#[derive(Clone, Debug, Deserialize)]
pub struct Complete {
    /// Identifies the event.
    #[serde(skip)]
    pub event: EventHead,
    /// The result.
    pub result: Box<RawValue>,
    /// Summary of the output, if the request has any.
    pub output: Option<OutputSummary>,
}

/// `error`.
#[derive(Clone, Debug, Deserialize)]
pub struct ErrorMessage {
    /// ID that the caller specified; `None` if the message that the error concerns contains none.
    pub request_id: Option<String>,
    /// ID that the server assigned; `None` for the error of a call.
    pub uid: Option<String>,
    /// Sequence number of the terminal event; `None` for the error of a call.
    pub seq: Option<i64>,
    /// Number of the last attempt, in an event.
    pub attempt: Option<i32>,
    /// Sequence number after which output chunks are void.
    #[serde(default)]
    pub rewind_to_seq: i64,
    /// The error.
    pub error: ErrorBody,
    /// Summary of the valid output of a request that failed.
    pub output: Option<OutputSummary>,
}

/// Error in a message.
#[derive(Clone, Debug, Deserialize)]
pub struct ErrorBody {
    /// Error code as sent. A newer server may use codes that this version does not know.
    pub code: String,
    /// Human-readable message.
    pub message: String,
    /// Whether the same request may succeed if it is sent again unchanged.
    pub retryable: bool,
    /// Additional details.
    pub details: Option<Box<RawValue>>,
}

impl ErrorBody {
    /// Returns the error code; an unknown code is an internal error.
    #[must_use]
    pub fn error_code(&self) -> ErrorCode {
        ErrorCode::from_name(&self.code).unwrap_or(ErrorCode::InternalError)
    }
}

impl From<ErrorBody> for RequestError {
    fn from(error: ErrorBody) -> Self {
        Self {
            code: error.error_code(),
            message: error.message,
            retryable: error.retryable,
            details: error.details.map(|details| details.get().to_owned()),
        }
    }
}

/// `cancelled`.
#[derive(Clone, Debug, Deserialize)]
pub struct Cancelled {
    /// ID that the caller specified.
    pub request_id: String,
    /// ID that the server assigned.
    pub uid: String,
    /// Sequence number of the terminal event; `None` for a sync action, which has no log.
    pub seq: Option<i64>,
    /// Number of the last attempt, in an event.
    pub attempt: Option<i32>,
    /// Reason that the caller specified.
    pub reason: String,
    /// Summary of the output, if the request has any.
    pub output: Option<OutputSummary>,
}

/// Number and checksum of the valid output chunks of a request.
#[derive(Clone, Debug, Deserialize)]
pub struct OutputSummary {
    /// Number of chunks.
    pub chunks: i64,
    /// SHA-256 in hexadecimal digits.
    pub sha256: String,
}
