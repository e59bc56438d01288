//! Stored form of events.

use serde::{Deserialize, Serialize};
use streamer_core::{AttemptNumber, Seq};
use streamer_proto::{
    common::v1::{
        Accepted, Cancelled, Error, Event, Failed, Output, OutputSummary, Payload, Progress,
        Retrying, Started, Succeeded, event::Kind, payload::Body,
    },
    millis, timestamp,
};
use streamer_store::{EventNumbers, StoreError};

use super::{Blob, encode, numbers, size};

/// Value of any size.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredValue {
    /// Media type; absent for JSON.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) content_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) data: Option<Blob>,
    /// Reference to the data, if the data is in the object store.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) object: Option<StoredObject>,
}

/// Reference to a value in the object store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredObject {
    pub(crate) path: String,
    pub(crate) bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredProgress {
    /// Percentage as text, because numbers in DynamoDB have different limits.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    percentage: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty", default)]
    message: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    metadata: Option<StoredValue>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredError {
    code: i32,
    message: String,
    retryable: bool,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    details: Option<StoredValue>,
}

/// Chunk count and digest of the output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredOutput {
    chunks: i64,
    sha256: Blob,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StoredKind {
    Accepted {
        action: String,
    },
    Started {
        worker: String,
    },
    Progress(StoredProgress),
    Output {
        #[serde(skip_serializing_if = "Option::is_none", default)]
        data: Option<StoredValue>,
        chunk_index: i64,
    },
    Retrying {
        #[serde(skip_serializing_if = "Option::is_none", default)]
        retry_at: Option<i64>,
        #[serde(with = "numbers::seq")]
        rewind_to_seq: Seq,
        #[serde(skip_serializing_if = "Option::is_none", default)]
        error: Option<StoredError>,
        #[serde(default)]
        released: bool,
    },
    Succeeded {
        #[serde(skip_serializing_if = "Option::is_none", default)]
        result: Option<StoredValue>,
        #[serde(skip_serializing_if = "Option::is_none", default)]
        output: Option<StoredOutput>,
    },
    Failed {
        #[serde(skip_serializing_if = "Option::is_none", default)]
        error: Option<StoredError>,
        #[serde(with = "numbers::seq")]
        rewind_to_seq: Seq,
        #[serde(skip_serializing_if = "Option::is_none", default)]
        output: Option<StoredOutput>,
    },
    Cancelled {
        #[serde(skip_serializing_if = "String::is_empty", default)]
        reason: String,
        #[serde(skip_serializing_if = "Option::is_none", default)]
        output: Option<StoredOutput>,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredEvent {
    #[serde(with = "numbers::seq")]
    pub(crate) seq: Seq,
    #[serde(with = "numbers::attempt")]
    pub(crate) attempt: AttemptNumber,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) time: Option<i64>,
    #[serde(flatten)]
    pub(crate) kind: StoredKind,
}

impl StoredEvent {
    pub(crate) fn new(event: &Event) -> Result<Self, StoreError> {
        let rejected = |reason: &str| StoreError::Rejected {
            doing: "storing an event",
            reason: reason.into(),
        };
        event.check_numbers().map_err(|error| rejected(&error.to_string()))?;
        let Some(kind) = &event.kind else { return Err(rejected("the event has no kind")) };
        Ok(Self {
            seq: event.seq(),
            attempt: event.attempt_number(),
            time: event.time.as_ref().map(millis),
            kind: StoredKind::new(kind).ok_or_else(|| rejected("a payload is not bytes"))?,
        })
    }

    pub(crate) fn into_event(self) -> Event {
        Event {
            seq: self.seq.as_i64(),
            attempt: self.attempt.as_i32(),
            time: self.time.map(timestamp),
            kind: Some(self.kind.into_kind()),
        }
    }

    /// Returns the value of the event that may be large, if any.
    pub(crate) fn value_mut(&mut self) -> Option<&mut StoredValue> {
        match &mut self.kind {
            StoredKind::Output { data: value, .. }
            | StoredKind::Succeeded { result: value, .. } => value.as_mut(),
            _ => None,
        }
    }
}

impl StoredKind {
    /// Converts the kind of a checked event to its stored form. Returns `None` if a payload is not bytes.
    fn new(kind: &Kind) -> Option<Self> {
        Some(match kind {
            Kind::Accepted(accepted) => Self::Accepted { action: accepted.action.clone() },
            Kind::Started(started) => Self::Started { worker: started.worker.clone() },
            Kind::Progress(progress) => Self::Progress(StoredProgress::new(progress)?),
            Kind::Output(output) => {
                let data = optional(output.data.as_ref(), StoredValue::new)?;
                Self::Output { data, chunk_index: output.chunk_index }
            }
            Kind::Retrying(retrying) => Self::Retrying {
                retry_at: retrying.retry_at.as_ref().map(millis),
                rewind_to_seq: Seq::from_i64(retrying.rewind_to_seq).ok()?,
                error: optional(retrying.error.as_ref(), StoredError::new)?,
                released: retrying.released,
            },
            Kind::Succeeded(succeeded) => Self::Succeeded {
                result: optional(succeeded.result.as_ref(), StoredValue::new)?,
                output: succeeded.output.as_ref().map(StoredOutput::new),
            },
            Kind::Failed(failed) => Self::Failed {
                error: optional(failed.error.as_ref(), StoredError::new)?,
                rewind_to_seq: Seq::from_i64(failed.rewind_to_seq).ok()?,
                output: failed.output.as_ref().map(StoredOutput::new),
            },
            Kind::Cancelled(cancelled) => Self::Cancelled {
                reason: cancelled.reason.clone(),
                output: cancelled.output.as_ref().map(StoredOutput::new),
            },
        })
    }

    fn into_kind(self) -> Kind {
        match self {
            Self::Accepted { action } => Kind::Accepted(Accepted { action }),
            Self::Started { worker } => Kind::Started(Started { worker }),
            Self::Progress(progress) => Kind::Progress(progress.into_progress()),
            Self::Output { data, chunk_index } => {
                Kind::Output(Output { data: data.map(StoredValue::into_payload), chunk_index })
            }
            Self::Retrying { retry_at, rewind_to_seq, error, released } => {
                Kind::Retrying(Retrying {
                    retry_at: retry_at.map(timestamp),
                    rewind_to_seq: rewind_to_seq.as_i64(),
                    error: error.map(StoredError::into_error),
                    released,
                })
            }
            Self::Succeeded { result, output } => Kind::Succeeded(Succeeded {
                result: result.map(StoredValue::into_payload),
                output: output.map(StoredOutput::into_summary),
            }),
            Self::Failed { error, rewind_to_seq, output } => Kind::Failed(Failed {
                error: error.map(StoredError::into_error),
                rewind_to_seq: rewind_to_seq.as_i64(),
                output: output.map(StoredOutput::into_summary),
            }),
            Self::Cancelled { reason, output } => Kind::Cancelled(Cancelled {
                reason,
                output: output.map(StoredOutput::into_summary),
            }),
        }
    }
}

/// Converts an optional value to its stored form. Returns `None` only if the value cannot be stored.
fn optional<T, S>(value: Option<&T>, store: impl FnOnce(&T) -> Option<S>) -> Option<Option<S>> {
    match value {
        Some(value) => store(value).map(Some),
        None => Some(None),
    }
}

const JSON: &str = "application/json";

impl StoredValue {
    pub(crate) fn new(payload: &Payload) -> Option<Self> {
        let data = match &payload.body {
            Some(Body::Data(data)) => Some(Blob(data.clone())),
            Some(Body::Json(_)) => return None,
            None => None,
        };
        Some(Self::of(&payload.content_type, data))
    }

    pub(crate) fn of(content_type: &str, data: Option<Blob>) -> Self {
        let content_type = (content_type != JSON).then(|| content_type.to_owned());
        Self { content_type, data, object: None }
    }

    pub(crate) fn content_type(&self) -> String {
        self.content_type.clone().unwrap_or_else(|| JSON.to_owned())
    }

    fn into_payload(self) -> Payload {
        Payload {
            content_type: self.content_type(),
            body: self.data.map(|data| Body::Data(data.0)),
        }
    }
}

impl StoredProgress {
    fn new(progress: &Progress) -> Option<Self> {
        Some(Self {
            percentage: progress.percentage.map(|percentage| percentage.to_string()),
            message: progress.message.clone(),
            metadata: optional(progress.metadata.as_ref(), StoredValue::new)?,
        })
    }

    pub(crate) fn into_progress(self) -> Progress {
        Progress {
            percentage: self.percentage.and_then(|percentage| percentage.parse().ok()),
            message: self.message,
            metadata: self.metadata.map(StoredValue::into_payload),
        }
    }
}

impl StoredError {
    fn new(error: &Error) -> Option<Self> {
        Some(Self {
            code: error.code,
            message: error.message.clone(),
            retryable: error.retryable,
            details: optional(error.details.as_ref(), StoredValue::new)?,
        })
    }

    pub(crate) fn into_error(self) -> Error {
        Error {
            code: self.code,
            message: self.message,
            retryable: self.retryable,
            details: self.details.map(StoredValue::into_payload),
        }
    }
}

impl StoredOutput {
    pub(crate) fn new(summary: &OutputSummary) -> Self {
        Self { chunks: summary.chunks, sha256: Blob(summary.sha256.clone()) }
    }

    pub(crate) fn into_summary(self) -> OutputSummary {
        OutputSummary { chunks: self.chunks, sha256: self.sha256.0 }
    }
}

/// Returns the number of bytes that the given events add to the item.
pub(crate) fn events_size(events: &[StoredEvent]) -> Result<i64, StoreError> {
    let mut bytes = 0;
    for event in events {
        bytes += size(&encode(event)?) + 1;
    }
    Ok(i64::try_from(bytes).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use aws_sdk_dynamodb::types::AttributeValue;
    use streamer_core::Timestamp;
    use streamer_store::log_event;

    use super::*;
    use crate::item::{decode, encode_item};

    fn retrying() -> Event {
        let retrying = Retrying { rewind_to_seq: 2, ..Retrying::default() };
        let (seq, attempt) = (Seq::from(7), AttemptNumber::FIRST);
        log_event(seq, attempt, Timestamp::default(), Kind::Retrying(retrying))
    }

    #[test]
    fn numbers_are_stored_as_numbers() {
        let stored = StoredEvent::new(&retrying()).unwrap();
        let item = encode_item(&stored).unwrap();
        let number = |text: &str| AttributeValue::N(text.into());
        assert_eq!((&item["seq"], &item["attempt"]), (&number("7"), &number("1")));
        let AttributeValue::M(kind) = &item["retrying"] else { panic!("{item:?}") };
        assert_eq!(kind["rewind_to_seq"], number("2"));
        let read: StoredEvent = decode("reading an event", item).unwrap();
        assert_eq!(read.into_event(), retrying());
    }

    #[test]
    fn numbers_out_of_range_are_rejected_and_reported_with_their_field() {
        let event = Event { seq: -1, ..retrying() };
        let rejected = StoredEvent::new(&event).unwrap_err().to_string();
        assert!(rejected.contains("event.seq: must be 0 to"), "{rejected}");
        for (attribute, number) in [("seq", "-1"), ("attempt", "2147483648")] {
            let mut item = encode_item(&StoredEvent::new(&retrying()).unwrap()).unwrap();
            item.insert(attribute.into(), AttributeValue::N(number.into()));
            let read: Result<StoredEvent, _> = decode("reading an event", item);
            let corrupt = read.unwrap_err().to_string();
            assert!(corrupt.contains(&format!("{attribute}: must be 0 to")), "{corrupt}");
        }
    }
}
