//! Callers' own ids for their requests.

use super::*;

impl Dynamo {
    /// The request that has this name.
    pub(crate) async fn named(
        &self,
        owner: &Owner,
        client_id: &str,
    ) -> Result<Option<RequestItem>, StoreError> {
        match self.name_target(owner, client_id).await? {
            Some(uid) => self.get(&uid).await,
            None => Ok(None),
        }
    }

    /// What a name stands for, whether that is still there or not.
    pub(crate) async fn name_target(
        &self,
        owner: &Owner,
        client_id: &str,
    ) -> Result<Option<String>, StoreError> {
        let key = key([("name", name_of(owner, client_id).as_str())]);
        let found = self.get_item("finding a request", &self.tables.names, key).await?;
        match found.as_ref().and_then(|item| item.get("uid")) {
            Some(AttributeValue::S(uid)) => Ok(Some(uid.clone())),
            _ => Ok(None),
        }
    }

    /// Frees a name whose request is gone, unless it stands for another by now.
    pub(crate) async fn free_name(
        &self,
        owner: &Owner,
        client_id: &str,
        target: &str,
    ) -> Result<(), StoreError> {
        let same = Expression::default().when("uid", "=", text(target));
        let freed = self
            .client
            .delete_item()
            .table_name(&self.tables.names)
            .set_key(Some(key([("name", name_of(owner, client_id).as_str())])))
            .set_condition_expression(same.condition())
            .set_expression_attribute_names(same.names())
            .set_expression_attribute_values(same.values())
            .send()
            .await;
        match freed {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some("ConditionalCheckFailedException") => Ok(()),
            Err(error) => Err(store_error("freeing an id", &error)),
        }
    }
}

/// Key of a caller's own id: a JSON list, since each of the three may have any character.
pub(crate) fn name_of(owner: &Owner, client_id: &str) -> String {
    serde_json::json!([owner.tenant, owner.user, client_id]).to_string()
}
