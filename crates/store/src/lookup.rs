//! Lookup of a request by client id or uid.

use streamer_core::Uid;

use crate::{Owner, RequestRecord, Store, StoreError};

/// Returns the request that `name` identifies: by the owner's client id, else by uid. The caller
/// must check access, because a uid identifies a request of any tenant.
///
/// # Errors
/// Returns an error if the store cannot be read.
pub async fn find_by_client_id_or_uid(
    store: &dyn Store,
    owner: &Owner,
    name: &str,
) -> Result<Option<RequestRecord>, StoreError> {
    let uid = name.parse::<Uid>().ok();
    // Most names in the format of a uid are uids, so the uid is tried first; a client id in that
    // format is found as well.
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
