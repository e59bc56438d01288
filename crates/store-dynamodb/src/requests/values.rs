//! Payloads and checkpoints, which are stored in the item, in parts or in the object store.

use futures_util::{TryStreamExt, stream};

use super::*;

/// Maximum number of parts that are deleted concurrently.
const MAX_CONCURRENT_DELETES: usize = 16;

impl Dynamo {
    /// Stores a payload in the item, in a part or in the object store, depending on its size.
    pub(crate) async fn store_payload(
        &self,
        uid: &str,
        payload: &StoredPayload,
    ) -> Result<StoredRef, StoreError> {
        let mut value = StoredValue::of(&payload.content_type, Some(Blob(payload.data.clone())));
        if payload.data.len() <= INLINE_PAYLOAD_BYTES {
            return Ok(StoredRef { value, part: None });
        }
        if let Some(objects) = &self.objects {
            objects.offload(uid, vec![&mut value]).await?;
        }
        let Some(data) = value.data.take() else { return Ok(StoredRef { value, part: None }) };
        let mut item = key([("uid", uid), ("part", PAYLOAD)]);
        item.insert("data".into(), encode(&data)?);
        // An existing part was written by an earlier identical call, and is never replaced.
        let put = self
            .client
            .put_item()
            .table_name(&self.tables.parts)
            .set_item(Some(item))
            .condition_expression("attribute_not_exists(uid)")
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await;
        match put {
            Ok(put) => self.metrics.record_write(put.consumed_capacity()),
            Err(error) if error.code() == Some("ConditionalCheckFailedException") => {}
            Err(error) => return Err(store_error("storing a payload", &error)),
        }
        Ok(StoredRef { value, part: Some(PAYLOAD.to_owned()) })
    }

    /// Deletes the payload of a duplicate submission. A failure is only logged, because a payload that remains is
    /// harmless.
    pub(crate) async fn delete_payload(&self, uid: &str, stored_ref: &StoredRef) {
        let outcome = match (&stored_ref.part, &self.objects, &stored_ref.value.object) {
            (Some(part), _, _) => self.delete_part(uid, part).await,
            (None, Some(objects), Some(_)) => objects.delete_all(uid).await,
            _ => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, uid, "failed to delete an unused payload");
        }
    }

    /// Reads a value from the item, a part or the object store.
    pub(crate) async fn load_value(
        &self,
        uid: &str,
        stored_ref: &StoredRef,
    ) -> Result<Option<StoredPayload>, StoreError> {
        let mut value = stored_ref.value.clone();
        if let Some(part) = &stored_ref.part {
            value.data = self.read_part(uid, part).await?;
        }
        self.restore(vec![&mut value]).await?;
        let content_type = value.content_type();
        Ok(value.data.map(|data| StoredPayload { content_type, data: data.0 }))
    }

    pub(crate) async fn read_part(
        &self,
        uid: &str,
        part: &str,
    ) -> Result<Option<Blob>, StoreError> {
        let doing = "reading a payload";
        let key = key([("uid", uid), ("part", part)]);
        let mut found = self.get_item(doing, &self.tables.parts, key).await?;
        let data = found.as_mut().and_then(|item| item.remove("data"));
        data.map(|data| {
            serde_dynamo::from_attribute_value(data).map_err(|error| corrupt(doing, error))
        })
        .transpose()
    }

    pub(crate) async fn read_payload(&self, uid: Uid) -> Result<Option<StoredPayload>, StoreError> {
        let uid = uid.to_string();
        match self.get(&uid).await? {
            Some(item) => self.load_value(&uid, &item.payload).await,
            None => Ok(None),
        }
    }

    pub(crate) async fn delete_parts(&self, uid: &str) -> Result<(), StoreError> {
        let parts = self.part_keys(uid).await?.into_iter().map(Ok);
        stream::iter(parts)
            .try_for_each_concurrent(MAX_CONCURRENT_DELETES, async |part: String| {
                self.delete_part(uid, &part).await
            })
            .await?;
        match &self.objects {
            Some(objects) => objects.delete_all(uid).await,
            None => Ok(()),
        }
    }

    pub(crate) async fn delete_part(&self, uid: &str, part: &str) -> Result<(), StoreError> {
        self.client
            .delete_item()
            .table_name(&self.tables.parts)
            .set_key(Some(key([("uid", uid), ("part", part)])))
            .send()
            .await
            .map(drop)
            .map_err(|error| store_error("deleting a part", &error))
    }

    pub(crate) async fn restore(&self, values: Vec<&mut StoredValue>) -> Result<(), StoreError> {
        let values: Vec<_> = values.into_iter().filter(|value| value.object.is_some()).collect();
        match &self.objects {
            _ if values.is_empty() => Ok(()),
            Some(objects) => objects.restore(values).await,
            None => Err(StoreError::Unavailable {
                doing: "reading a large value",
                reason: "the value is in an object store, but dynamodb.object_store_url is not set"
                    .into(),
            }),
        }
    }
}
