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
            // It may stand for another request by now.
            let own = Expression::default().when("uid", "=", text(uid));
            keys.push((&self.tables.names, key([("name", name.as_str())]), own));
        }
        if item.has_parts == Some(true) {
            for part in self.part_names(uid).await? {
                let there = Expression::default().when_there("uid");
                keys.push((&self.tables.parts, key([("uid", uid), ("part", &part)]), there));
            }
        }
        for (table, key, condition) in keys {
            let update = condition.set(TIME_TO_LIVE, number(at.as_millis() / 1000));
            // It may be gone already.
            self.update_item("forgetting a request", table, key, &update).await?;
        }
        Ok(())
    }
}
