//! The credentials of the SDK, for the object store: so that both find them in the same places.

use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use async_trait::async_trait;
use aws_sdk_dynamodb::config::{ProvideCredentials, SharedCredentialsProvider};
use object_store::{CredentialProvider, aws::AwsCredential};
use parking_lot::Mutex;
use streamer_core::{Clock, SystemClock, Timestamp};

/// Fresh ones are asked for so long before the old ones expire.
const RENEW_BEFORE: Duration = Duration::from_secs(300);
/// Those that do not say when they expire are asked for again after so long, as the SDK does.
const RENEW_AFTER: Duration = Duration::from_secs(900);

#[derive(Debug)]
pub(crate) struct SdkCredentials {
    provider: SharedCredentialsProvider,
    latest: Mutex<Option<Latest>>,
}

#[derive(Clone, Debug)]
struct Latest {
    credential: Arc<AwsCredential>,
    good_until: Timestamp,
}

impl SdkCredentials {
    pub(crate) fn new(provider: SharedCredentialsProvider) -> Self {
        Self { provider, latest: Mutex::default() }
    }
}

#[async_trait]
impl CredentialProvider for SdkCredentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let now = SystemClock.now();
        let latest = self.latest.lock().clone();
        if let Some(latest) = latest.filter(|latest| latest.good_until > now) {
            return Ok(latest.credential);
        }
        let found = self.provider.provide_credentials().await.map_err(|error| {
            object_store::Error::Generic { store: "S3", source: Box::new(error) }
        })?;
        let expiry = found.expiry().and_then(|expiry| expiry.duration_since(UNIX_EPOCH).ok());
        let good_until = match expiry {
            Some(expiry) => Timestamp::default().plus(expiry).minus(RENEW_BEFORE),
            None => now.plus(RENEW_AFTER),
        };
        let credential = Arc::new(AwsCredential {
            key_id: found.access_key_id().to_owned(),
            secret_key: found.secret_access_key().to_owned(),
            token: found.session_token().map(str::to_owned),
        });
        *self.latest.lock() = Some(Latest { credential: credential.clone(), good_until });
        Ok(credential)
    }
}
