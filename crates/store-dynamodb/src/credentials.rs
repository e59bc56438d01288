//! Provides the SDK credentials to the object store, so that both use the same sources.

use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use async_trait::async_trait;
use aws_sdk_dynamodb::config::{ProvideCredentials, SharedCredentialsProvider};
use object_store::{CredentialProvider, aws::AwsCredential};
use parking_lot::Mutex;
use streamer_core::{Clock, SystemClock, Timestamp};

/// Time before their expiry at which credentials are renewed.
const RENEW_BEFORE: Duration = Duration::from_secs(300);
/// Time after which credentials without an expiry are renewed; the same as in the SDK.
const RENEW_AFTER: Duration = Duration::from_secs(900);

#[derive(Debug)]
pub(crate) struct SdkCredentials {
    provider: SharedCredentialsProvider,
    latest: Mutex<Option<Latest>>,
}

#[derive(Clone, Debug)]
struct Latest {
    credential: Arc<AwsCredential>,
    fresh_until: Timestamp,
    expires_at: Option<Timestamp>,
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
        let found = match latest {
            Some(latest) if latest.fresh_until > now => return Ok(latest.credential),
            latest => match (self.provider.provide_credentials().await, latest) {
                (Ok(found), _) => found,
                (Err(error), Some(latest)) if latest.expires_at.is_none_or(|at| at > now) => {
                    tracing::warn!(%error, "failed to renew the credentials of the object store");
                    return Ok(latest.credential);
                }
                (Err(error), _) => {
                    let source = Box::new(error);
                    return Err(object_store::Error::Generic { store: "S3", source });
                }
            },
        };
        let expiry = found.expiry().and_then(|expiry| expiry.duration_since(UNIX_EPOCH).ok());
        let expires_at = expiry.map(|expiry| Timestamp::default().plus(expiry));
        let fresh_until = match expires_at {
            // Credentials that are valid only for minutes are used for half of their lifetime.
            Some(at) => at.minus(RENEW_BEFORE).max(now.plus(at.since(now) / 2)),
            None => now.plus(RENEW_AFTER),
        };
        let credential = Arc::new(AwsCredential {
            key_id: found.access_key_id().to_owned(),
            secret_key: found.secret_access_key().to_owned(),
            token: found.session_token().map(str::to_owned),
        });
        *self.latest.lock() =
            Some(Latest { credential: credential.clone(), fresh_until, expires_at });
        Ok(credential)
    }
}
