//! Stored items, which are human-readable: times are in milliseconds since the Unix epoch, text is stored as text, and
//! only bytes that are not text are binary.

mod blob;
mod event;
mod numbers;
mod request;
mod size;

use aws_sdk_dynamodb::types::AttributeValue;
use serde::{Serialize, de::DeserializeOwned};
use streamer_store::StoreError;

pub(crate) use blob::Blob;
pub(crate) use event::{StoredEvent, StoredKind, StoredObject, StoredValue, events_size};
pub(crate) use request::{
    QUEUE_ATTRIBUTES, RequestItem, StoredRef, by_uid, client_id_key, latest_progress,
};
pub(crate) use size::size;

use crate::{error::corrupt, expression::Attributes};

pub(crate) fn encode(value: &impl Serialize) -> Result<AttributeValue, StoreError> {
    serde_dynamo::to_attribute_value(value).map_err(|error| corrupt("encoding an item", error))
}

pub(crate) fn encode_item(value: &impl Serialize) -> Result<Attributes, StoreError> {
    serde_dynamo::to_item(value).map_err(|error| corrupt("encoding an item", error))
}

pub(crate) fn decode<T: DeserializeOwned>(
    doing: &'static str,
    item: Attributes,
) -> Result<T, StoreError> {
    serde_dynamo::from_item(item).map_err(|error| corrupt(doing, error))
}
