//! Client IDs of requests.

use super::*;

impl Dynamo {
    /// Returns the request with the given client ID.
    pub(crate) async fn find_by_client_id(
        &self,
        owner: &Owner,
        client_id: &str,
    ) -> Result<Option<RequestItem>, StoreError> {
        match self.uid_of_client_id(owner, client_id).await? {
            Some(uid) => self.get(&uid).await,
            None => Ok(None),
        }
    }

    /// Returns the UID for a client ID, even if the request no longer exists.
    pub(crate) async fn uid_of_client_id(
        &self,
        owner: &Owner,
        client_id: &str,
    ) -> Result<Option<String>, StoreError> {
        let key = key([("name", client_id_key(owner, client_id).as_str())]);
        let found = self.get_item("finding a request", &self.tables.names, key).await?;
        match found.as_ref().and_then(|item| item.get("uid")) {
            Some(AttributeValue::S(uid)) => Ok(Some(uid.clone())),
            _ => Ok(None),
        }
    }

    /// Deletes the client ID of a deleted request, unless it already identifies a different request.
    pub(crate) async fn release_client_id(
        &self,
        owner: &Owner,
        client_id: &str,
        target: &str,
    ) -> Result<(), StoreError> {
        let unchanged = Expression::default().when("uid", "=", text(target));
        let key = key([("name", client_id_key(owner, client_id).as_str())]);
        self.delete_item("releasing a client ID", &self.tables.names, key, &unchanged).await
    }
}
