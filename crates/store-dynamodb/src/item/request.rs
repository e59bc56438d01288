//! Item of a request.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use streamer_core::{AttemptNumber, RequestState, Seq, Timestamp, Uid};
use streamer_store::{NewRequest, Owner, RequestRecord, StoreError};

use super::{
    Blob, StoredKind, StoredValue,
    event::{StoredError, StoredEvent, StoredOutput, StoredProgress},
    numbers,
};
use crate::error::corrupt;

/// Reference to a value of a request: in the item, in a part, or in the object store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredRef {
    #[serde(flatten)]
    pub(crate) value: StoredValue,
    /// Key of the part that contains the value, if any.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) part: Option<String>,
}

/// Attributes that make a request appear in the indexes of the queue.
pub(crate) const QUEUE_ATTRIBUTES: [&str; 6] =
    ["queue_shard", "queue_rank", "delay_shard", "delay_until", "expiry_shard", "expire_at"];

/// Item of a request. It contains all data of the request except older events and values that are too large for an
/// item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RequestItem {
    pub(crate) uid: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) client_id: Option<String>,
    pub(crate) tenant: String,
    pub(crate) user: String,
    pub(crate) action: String,
    #[serde(with = "state_name")]
    pub(crate) state: RequestState,
    #[serde(with = "numbers::attempt")]
    pub(crate) attempt: AttemptNumber,
    #[serde(default)]
    pub(crate) failed_attempts: u32,
    #[serde(with = "numbers::seq")]
    pub(crate) last_seq: Seq,
    #[serde(with = "numbers::seq")]
    pub(crate) attempt_seq: Seq,
    pub(crate) priority: i32,
    pub(crate) create_time: i64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) start_time: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) finish_time: Option<i64>,
    pub(crate) not_before: i64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) deadline: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) close_by: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) lease_until: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) lease_holder: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) worker: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) metadata: Option<Blob>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) cancel_reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) redrive_of: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) trace_parent: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) trace_state: Option<String>,
    /// SHA-256 hash of the action and the payload.
    pub(crate) fingerprint: Blob,
    pub(crate) payload: StoredRef,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) checkpoint: Option<StoredRef>,
    /// Latest events; earlier events are in parts.
    pub(crate) events: Vec<StoredEvent>,
    /// Size of `events` in bytes.
    pub(crate) events_bytes: i64,
    /// Whether the request has parts or objects.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) has_parts: Option<bool>,
    /// Latest progress of the latest attempt, if its event is in a part.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) progress: Option<StoredProgress>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) error: Option<StoredError>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) output: Option<StoredOutput>,
    // Keys of the indexes.
    pub(crate) tenant_shard: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) queue_shard: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) queue_rank: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) delay_shard: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) delay_until: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) expiry_shard: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) expire_at: Option<i64>,
}

impl RequestItem {
    pub(crate) fn new(new: &NewRequest, payload: StoredRef, accepted: StoredEvent) -> Self {
        let millis = |time: Option<Timestamp>| time.map(Timestamp::as_millis);
        Self {
            uid: new.uid.to_string(),
            client_id: new.client_id.clone(),
            tenant: new.owner.tenant.clone(),
            user: new.owner.user.clone(),
            action: new.action.clone(),
            state: RequestState::Queued,
            attempt: AttemptNumber::NONE,
            failed_attempts: 0,
            last_seq: Seq::FIRST,
            attempt_seq: Seq::NONE,
            priority: new.priority,
            create_time: new.create_time.as_millis(),
            start_time: None,
            finish_time: None,
            not_before: new.not_before.as_millis(),
            deadline: millis(new.deadline),
            close_by: millis(new.close_by),
            lease_until: None,
            lease_holder: None,
            worker: None,
            metadata: new.metadata.clone().map(Blob),
            cancel_reason: None,
            redrive_of: new.redrive_of.map(|uid| uid.to_string()),
            trace_parent: new.trace_parent.clone(),
            trace_state: new.trace_state.clone(),
            fingerprint: Blob(bytes::Bytes::copy_from_slice(&new.fingerprint)),
            has_parts: (payload.part.is_some() || payload.value.object.is_some()).then_some(true),
            payload,
            checkpoint: None,
            events: vec![accepted],
            events_bytes: 0,
            progress: None,
            error: None,
            output: None,
            tenant_shard: String::new(),
            queue_shard: None,
            queue_rank: None,
            delay_shard: None,
            delay_until: None,
            expiry_shard: None,
            expire_at: None,
        }
    }

    pub(crate) fn parsed_uid(&self) -> Result<Uid, StoreError> {
        self.uid.parse().map_err(|error| corrupt("reading a request", error))
    }

    pub(crate) fn owner(&self) -> Owner {
        Owner { tenant: self.tenant.clone(), user: self.user.clone() }
    }

    /// Returns the latest progress of the latest attempt. A later attempt discards it.
    pub(crate) fn latest_progress(&self) -> Option<StoredProgress> {
        latest_progress(&self.events, self.progress.as_ref())
    }

    pub(crate) fn to_record(&self) -> Result<RequestRecord, StoreError> {
        let time = |millis: Option<i64>| millis.map(Timestamp::from_millis);
        let redrive_of = self.redrive_of.as_ref().map(|uid| uid.parse::<Uid>()).transpose();
        Ok(RequestRecord {
            uid: self.parsed_uid()?,
            client_id: self.client_id.clone(),
            owner: self.owner(),
            action: self.action.clone(),
            state: self.state,
            attempt: self.attempt,
            failed_attempts: self.failed_attempts,
            last_seq: self.last_seq,
            attempt_seq: self.attempt_seq,
            priority: self.priority,
            create_time: Timestamp::from_millis(self.create_time),
            start_time: time(self.start_time),
            finish_time: time(self.finish_time),
            not_before: Timestamp::from_millis(self.not_before),
            deadline: time(self.deadline),
            close_by: time(self.close_by),
            progress: self.latest_progress().map(StoredProgress::into_progress),
            metadata: self.metadata.clone().map(|metadata| metadata.0),
            cancel_reason: self.cancel_reason.clone(),
            error: self.error.clone().map(StoredError::into_error),
            output: self.output.clone().map(StoredOutput::into_summary),
            redrive_of: redrive_of.map_err(|error| corrupt("reading a request", error))?,
            trace_parent: self.trace_parent.clone(),
            trace_state: self.trace_state.clone(),
        })
    }
}

/// Returns the latest progress after `events`, given the latest progress `before` them.
pub(crate) fn latest_progress(
    events: &[StoredEvent],
    before: Option<&StoredProgress>,
) -> Option<StoredProgress> {
    for event in events.iter().rev() {
        match &event.kind {
            StoredKind::Progress(progress) => return Some(progress.clone()),
            StoredKind::Started { .. } | StoredKind::Retrying { .. } => return None,
            _ => {}
        }
    }
    before.cloned()
}

/// Returns a map from UID to item.
pub(crate) fn by_uid(items: Vec<RequestItem>) -> HashMap<String, RequestItem> {
    items.into_iter().map(|item| (item.uid.clone(), item)).collect()
}

/// Returns the key of a client ID: a JSON list of tenant, user and client ID, each of which may contain any character.
pub(crate) fn client_id_key(owner: &Owner, client_id: &str) -> String {
    serde_json::json!([owner.tenant, owner.user, client_id]).to_string()
}

/// A state is stored as its name, such as `QUEUED`.
mod state_name {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use streamer_core::RequestState;

    pub(super) fn serialize<S: Serializer>(
        state: &RequestState,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(state.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<RequestState, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(Error::custom)
    }
}
