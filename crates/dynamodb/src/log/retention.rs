//! What goes with a request that has ended.

use super::*;

impl Dynamo {
    /// Lets the parts and the name of a request that has ended go with it. Nobody waits for this; what
    /// it does not reach, because the process ends, stays.
    pub(crate) fn forget_later(&self, uid: &str, known: Option<&RequestItem>, at: Timestamp) {
        if known.is_some_and(|item| item.has_parts.is_none() && item.client_id.is_none()) {
            return;
        }
        let (dynamo, uid) = (self.clone(), uid.to_owned());
        tokio::spawn(async move {
            if let Err(error) = dynamo.forget_parts(&uid, at).await {
                tracing::warn!(%error, uid, "could not set when the parts of a request go");
            }
        });
    }

    pub(crate) async fn forget_parts(&self, uid: &str, at: Timestamp) -> Result<(), StoreError> {
        let Some(item) = self.get(uid).await? else { return Ok(()) };
        let mut keys = Vec::new();
        if let Some(client_id) = &item.client_id {
            let name = name_of(&item.owner(), client_id);
            keys.push((&self.tables.names, key([("name", name.as_str())]), "name"));
        }
        if item.has_parts == Some(true) {
            for part in self.part_names(uid).await? {
                keys.push((&self.tables.parts, key([("uid", uid), ("part", &part)]), "uid"));
            }
        }
        for (table, key, there) in keys {
            let update = Expression::default()
                .set(TIME_TO_LIVE, number(at.as_millis() / 1000))
                .when_there(there);
            // It may be gone already.
            self.update_item("forgetting a request", table, key, &update).await?;
        }
        Ok(())
    }
}
