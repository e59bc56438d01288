//! Stores large values in an object store.

use std::{fs, sync::Arc, time::Duration};

use aws_config::SdkConfig;
use bytes::Bytes;
use futures_util::{
    StreamExt, TryStreamExt,
    future::{ready, try_join_all},
};
use object_store::{
    ClientConfigKey, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    local::LocalFileSystem,
    path::Path,
    prefix::PrefixStore,
};
use rustls::crypto::{CryptoProvider, ring};
use sha2::{Digest, Sha256};
use streamer_core::hex;
use streamer_store::StoreError;

use crate::{
    OpenError,
    credentials::SdkCredentials,
    error::corrupt,
    item::{Blob, StoredObject, StoredValue},
};

/// Size above which a value is stored as an object, in bytes. An item of this size costs as much to write as several
/// objects.
pub(crate) const OFFLOAD_BYTES: usize = 64 * 1024;
/// Maximum size of a value without an object store, in bytes. The value must fit into an item together with all other
/// attributes.
pub(crate) const MAX_INLINE_BYTES: usize = 320 * 1024;
/// Timeout of a call, which must end before the lease of its caller expires.
const OBJECT_TIMEOUT: &str = "5s";
/// Maximum time for which a call is retried.
const OBJECT_RETRY_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of objects that are written or read concurrently.
const MAX_CONCURRENT_OBJECTS: usize = 8;

pub(crate) struct LargeObjects {
    store: Arc<dyn ObjectStore>,
}

impl LargeObjects {
    /// Opens the object store at `url`, with the region and the credentials of the SDK.
    pub(crate) fn open(url: &str, config: &SdkConfig) -> Result<Self, OpenError> {
        let invalid = |reason: String| OpenError::Objects(format!("{url}: {reason}"));
        let store: Arc<dyn ObjectStore> = if let Some(folder) = url.strip_prefix("file://") {
            if !folder.starts_with('/') {
                return Err(invalid("must be file:///absolute/folder".into()));
            }
            fs::create_dir_all(folder).map_err(|error| invalid(error.to_string()))?;
            let local = LocalFileSystem::new_with_prefix(folder)
                .map_err(|error| invalid(error.to_string()))?;
            Arc::new(local.with_fsync(true))
        } else if let Some(rest) = url.strip_prefix("s3://") {
            install_crypto_provider();
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let mut s3 = AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                // Separate client options would replace the client options from the environment.
                .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::Timeout), OBJECT_TIMEOUT)
                .with_retry(RetryConfig {
                    retry_timeout: OBJECT_RETRY_TIMEOUT,
                    ..RetryConfig::default()
                });
            if let Some(region) = config.region() {
                s3 = s3.with_region(region.as_ref());
            }
            if let Some(provider) = config.credentials_provider() {
                s3 = s3.with_credentials(Arc::new(SdkCredentials::new(provider)));
            }
            let s3 = s3.build().map_err(|error| invalid(error.to_string()))?;
            match prefix.trim_matches('/') {
                "" => Arc::new(s3),
                prefix => Arc::new(PrefixStore::new(s3, prefix)),
            }
        } else {
            return Err(invalid("must begin with s3:// or file:///".into()));
        };
        Ok(Self { store })
    }

    /// Moves large values to objects. An object is written before the item that refers to it, under a name that is
    /// derived from its content, so that a repeated call writes the same object.
    pub(crate) async fn offload(
        &self,
        uid: &str,
        values: Vec<&mut StoredValue>,
    ) -> Result<(), StoreError> {
        let mut values = values.into_iter();
        loop {
            let mut batch = Vec::with_capacity(MAX_CONCURRENT_OBJECTS);
            for value in values.by_ref().take(MAX_CONCURRENT_OBJECTS) {
                batch.push(self.offload_one(uid, value));
            }
            if batch.is_empty() {
                return Ok(());
            }
            try_join_all(batch).await?;
        }
    }

    async fn offload_one(&self, uid: &str, value: &mut StoredValue) -> Result<(), StoreError> {
        let Some(Blob(data)) = value.data.take_if(|data| data.0.len() > OFFLOAD_BYTES) else {
            return Ok(());
        };
        let path = format!("{uid}/{}", hex(&Sha256::digest(&data)[..16]));
        let bytes = data.len() as u64;
        self.store
            .put(&Path::from(path.as_str()), PutPayload::from_bytes(data))
            .await
            .map_err(|error| unavailable("storing a large value", &error))?;
        value.object = Some(StoredObject { path, bytes });
        Ok(())
    }

    /// Reads the values that were moved to objects.
    pub(crate) async fn restore(&self, values: Vec<&mut StoredValue>) -> Result<(), StoreError> {
        let mut values = values.into_iter();
        loop {
            let mut batch = Vec::with_capacity(MAX_CONCURRENT_OBJECTS);
            for value in values.by_ref().take(MAX_CONCURRENT_OBJECTS) {
                batch.push(self.restore_one(value));
            }
            if batch.is_empty() {
                return Ok(());
            }
            try_join_all(batch).await?;
        }
    }

    async fn restore_one(&self, value: &mut StoredValue) -> Result<(), StoreError> {
        let Some(object) = &value.object else { return Ok(()) };
        let doing = "reading a large value";
        let read = async { self.store.get(&Path::from(object.path.as_str())).await?.bytes().await };
        let data: Bytes = match read.await {
            Ok(data) => data,
            Err(object_store::Error::NotFound { .. }) => {
                return Err(corrupt(doing, format!("object {} does not exist", object.path)));
            }
            Err(error) => return Err(unavailable(doing, &error)),
        };
        if data.len() as u64 != object.bytes {
            let reason = format!(
                "object {} has {} bytes, expected {}",
                object.path,
                data.len(),
                object.bytes
            );
            return Err(corrupt(doing, reason));
        }
        value.data = Some(Blob(data));
        value.object = None;
        Ok(())
    }

    /// Deletes all objects of a request.
    pub(crate) async fn delete_all(&self, uid: &str) -> Result<(), StoreError> {
        let failed = |error| unavailable("deleting large values", &error);
        let prefix = Path::from(uid);
        let objects = self.store.list(Some(&prefix)).map_ok(|object| object.location).boxed();
        let deleted = self.store.delete_stream(objects);
        deleted.try_for_each(|_| ready(Ok(()))).await.map_err(failed)
    }
}

/// Installs the crypto provider of the process, which the HTTPS client needs.
fn install_crypto_provider() {
    if CryptoProvider::get_default().is_none()
        && ring::default_provider().install_default().is_err()
    {
        tracing::debug!("a different crypto provider was installed concurrently");
    }
}

fn unavailable(doing: &'static str, error: &object_store::Error) -> StoreError {
    StoreError::Unavailable { doing, reason: format!("object store: {error}") }
}
