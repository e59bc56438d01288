//! Messages that are replies to the client, or that concern the connection.

use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::value::RawValue;
use streamer_core::RequestState;

use super::{ErrorBody, OutputSummary};

/// `connected`.
#[derive(Clone, Debug, Deserialize)]
pub struct Connected {
    /// ID of the connection.
    pub connection_id: String,
    /// User that the token identifies.
    pub user_id: String,
    /// Tenant that the token identifies.
    pub tenant_id: String,
    /// Interval at which the server sends pings.
    pub heartbeat_ms: u64,
    /// Maximum size of a message from the client.
    pub max_message_bytes: u64,
    /// Time at which the token expires.
    pub expires_at: String,
}

/// `acknowledgment`.
#[derive(Clone, Debug, Deserialize)]
pub struct Acknowledgment {
    /// ID that the caller specified.
    pub request_id: String,
    /// ID that the server assigned.
    pub uid: String,
    /// State of the request; `None` if this version does not know it.
    #[serde(deserialize_with = "known_state")]
    pub status: Option<RequestState>,
    /// Description of what the server did.
    pub message: String,
    /// Whether the request was submitted before.
    pub duplicate: bool,
    /// Sequence number of the latest event.
    pub last_seq: i64,
    /// Position in the queue, if the request is queued and due.
    pub queue_position: Option<QueuePosition>,
    /// Trace of the submission, if it is traced.
    pub trace_id: Option<String>,
}

/// Estimated position of a request in the queue.
#[derive(Clone, Debug, Deserialize)]
pub struct QueuePosition {
    /// Best case.
    pub earliest: i64,
    /// Worst case.
    pub latest: i64,
    /// Estimated start, if it is known.
    pub estimated_start_time: Option<String>,
}

/// `response`.
#[derive(Clone, Debug, Deserialize)]
pub struct Response {
    /// ID that the caller specified.
    pub request_id: String,
    /// ID that the server assigned.
    pub uid: String,
    /// Sequence number of the terminal event; `None` for a sync action, which has no log.
    pub seq: Option<i64>,
    /// The result.
    pub data: Box<RawValue>,
    /// Summary of the output, if the request has any.
    pub output: Option<OutputSummary>,
}

/// `subscribed`.
#[derive(Clone, Debug, Deserialize)]
pub struct Subscribed {
    /// ID that the caller specified.
    pub request_id: String,
    /// ID that the server assigned.
    pub uid: String,
    /// Sequence number of the latest event.
    pub last_seq: i64,
    /// State of the request; `None` if this version does not know it.
    #[serde(deserialize_with = "known_state")]
    pub state: Option<RequestState>,
    /// Action of the request.
    pub action: String,
    /// Number of the latest attempt; 0 before the first attempt.
    pub attempt: i32,
    /// Latest progress, if the handler reported any.
    pub progress: Option<LatestProgress>,
}

/// `unsubscribed`.
#[derive(Clone, Debug, Deserialize)]
pub struct Unsubscribed {
    /// ID that the caller specified.
    pub request_id: String,
}

/// A request: the members of `request`, and the elements of `requests`.
#[derive(Clone, Debug, Deserialize)]
pub struct RequestInfo {
    /// ID that the caller specified.
    pub request_id: String,
    /// ID that the server assigned.
    pub uid: String,
    /// User who submitted the request.
    pub user_id: String,
    /// Action of the request.
    pub action: String,
    /// State of the request; `None` if this version does not know it.
    #[serde(deserialize_with = "known_state")]
    pub state: Option<RequestState>,
    /// Number of the latest attempt; 0 before the first attempt.
    pub attempt: i32,
    /// Sequence number of the latest event.
    pub last_seq: i64,
    /// Priority, 0 to 9.
    pub priority: i32,
    /// Whether the request is being cancelled.
    pub cancel_requested: bool,
    /// Time at which the request was stored.
    pub create_time: Option<String>,
    /// Time at which the latest attempt started.
    pub start_time: Option<String>,
    /// Time at which the request ended.
    pub finish_time: Option<String>,
    /// Earliest start time, if the request was delayed.
    pub not_before: Option<String>,
    /// Latest start time. A request that has not started by then fails.
    pub deadline: Option<String>,
    /// Time by which the request must end; otherwise it fails.
    pub close_by: Option<String>,
    /// Position in the queue, if the request is queued and due.
    pub queue_position: Option<QueuePosition>,
    /// `uid` of the request that this request runs again, if any.
    pub redrive_of: Option<String>,
    /// Latest progress, if the handler reported any.
    pub progress: Option<LatestProgress>,
    /// Payload: JSON, or a string according to `content_type` and `encoding`. Only in `request`.
    pub payload: Option<Box<RawValue>>,
    /// Content type of a payload that is not JSON.
    pub content_type: Option<String>,
    /// `base64` if the payload is neither JSON nor text.
    pub encoding: Option<String>,
    /// Metadata of the caller.
    pub metadata: Option<Box<RawValue>>,
    /// Result of a request that succeeded. Only in `request`.
    pub result: Option<Box<RawValue>>,
    /// Error of a request that failed or was cancelled.
    pub error: Option<ErrorBody>,
    /// Summary of the output of a request that ended.
    pub output: Option<OutputSummary>,
}

/// `requests`.
#[derive(Clone, Debug, Deserialize)]
pub struct RequestPage {
    /// Requests of the page.
    pub requests: Vec<RequestInfo>,
    /// Token for the next page; empty on the last page.
    pub next_page_token: String,
}

/// Latest progress of a request, in a snapshot.
#[derive(Clone, Debug, Deserialize)]
pub struct LatestProgress {
    /// Completed percentage, if it is known.
    pub percentage: Option<f64>,
    /// Description of the current step.
    pub message: String,
    /// Metadata of the handler.
    pub metadata: Option<Box<RawValue>>,
}

/// `message`.
#[derive(Clone, Debug, Deserialize)]
pub struct Push {
    /// Subject of the message.
    pub topic: String,
    /// The data: JSON, or a string according to `content_type` and `encoding`.
    pub data: Box<RawValue>,
    /// Content type of data that is not JSON.
    pub content_type: Option<String>,
    /// `base64` if the data is neither JSON nor text.
    pub encoding: Option<String>,
}

/// `authenticated` or `auth_expiring`.
#[derive(Clone, Debug, Deserialize)]
pub struct TokenExpiry {
    /// Time at which the token expires.
    pub expires_at: String,
}

/// `draining`.
#[derive(Clone, Debug, Deserialize)]
pub struct Draining {
    /// Time after which the client should reconnect.
    pub reconnect_after_ms: u64,
}

/// A message of an unknown type.
#[derive(Clone, Debug, Deserialize)]
pub struct Unknown {
    /// Type of the message.
    #[serde(rename = "type")]
    pub kind: String,
    /// ID that the caller specified, if the message concerns one request.
    #[serde(default, deserialize_with = "if_readable")]
    pub request_id: Option<String>,
    /// Sequence number, if the message is an event.
    #[serde(default, deserialize_with = "if_readable")]
    pub seq: Option<i64>,
}

/// Reads a member of a message that this version does not know; `None` if it has a different type.
fn if_readable<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let text = Box::<RawValue>::deserialize(deserializer)?;
    Ok(serde_json::from_str(text.get()).ok())
}

/// Reads the name of a state; `None` if this version does not know it.
fn known_state<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<RequestState>, D::Error> {
    Ok(String::deserialize(deserializer)?.parse().ok())
}
