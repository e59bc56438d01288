//! Expiry of the parts and the client ID of a request that has ended.

use super::*;

impl Dynamo {
    /// Sets the expiry of the parts and the client ID of a request that has ended, in the background. If the process
    /// exits before this is done, the parts and the client ID remain.
    pub(crate) fn expire_parts_in_background(
        &self,
        uid: &str,
        item: Option<&RequestItem>,
        at: Timestamp,
    ) {
        if item.is_some_and(|item| item.has_parts.is_none() && item.client_id.is_none()) {
            return;
        }
        let (dynamo, uid) = (self.clone(), uid.to_owned());
        tokio::spawn(async move {
            if let Err(error) = dynamo.expire_parts(&uid, at).await {
                tracing::warn!(%error, uid, "failed to set the expiry of request parts");
            }
        });
    }

    pub(crate) async fn expire_parts(&self, uid: &str, at: Timestamp) -> Result<(), StoreError> {
        let Some(item) = self.get(uid).await? else { return Ok(()) };
        let mut keys = Vec::new();
        if let Some(client_id) = &item.client_id {
            let name = client_id_key(&item.owner(), client_id);
            // The client ID may already identify a different request.
            let own = Expression::default().when("uid", "=", text(uid));
            keys.push((&self.tables.names, key([("name", name.as_str())]), own));
        }
        if item.has_parts == Some(true) {
            for part in self.part_keys(uid).await? {
                let exists = Expression::default().when_exists("uid");
                keys.push((&self.tables.parts, key([("uid", uid), ("part", &part)]), exists));
            }
        }
        for (table, key, condition) in keys {
            let update = condition.set(TIME_TO_LIVE, number(at.as_millis() / 1000));
            // The item may already be deleted.
            self.update_item("setting the expiry of a request", table, key, &update).await?;
        }
        Ok(())
    }
}
