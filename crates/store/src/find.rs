//! Finding a request by either of its names.

use streamer_core::Uid;

use crate::{Owner, RequestRecord, Store, StoreError};

/// The request that `name` stands for: the owner's own id for it, or else its uid. Whether the
/// caller may see it is for the caller to check: a uid reaches any tenant's.
///
/// # Errors
/// When the store cannot be read.
pub async fn find_by_name(
    store: &dyn Store,
    owner: &Owner,
    name: &str,
) -> Result<Option<RequestRecord>, StoreError> {
    let uid = name.parse::<Uid>().ok();
    // Most names that look like a uid are one, so that one is looked up first; an own id of the
    // same shape is found all the same.
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
