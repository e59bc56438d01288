//! Lookup of a request by client ID or UID.

use streamer_core::Uid;

use crate::{Owner, RequestRecord, Store, StoreError};

/// Returns the request that `name` identifies, as a client ID of `owner` or as a UID. The caller must check access,
/// because a UID can identify a request of any tenant.
///
/// # Errors
/// Returns an error if the store cannot be read.
pub async fn find_by_client_id_or_uid(
    store: &dyn Store,
    owner: &Owner,
    name: &str,
) -> Result<Option<RequestRecord>, StoreError> {
    let uid = name.parse::<Uid>().ok();
    // Most names in the format of a UID are UIDs, so the lookup by UID is first; a client ID in that format is also
    // found.
    if let Some(uid) = uid
        && let Some(record) = store.get_request(uid).await?
        && record.owner == *owner
    {
        return Ok(Some(record));
    }
    if let Some(record) = store.find_request(owner.clone(), name.to_owned()).await? {
        return Ok(Some(record));
    }
    match uid {
        Some(uid) => store.get_request(uid).await,
        None => Ok(None),
    }
}
