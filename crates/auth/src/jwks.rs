//! Keys from a JWKS URL, with rotation.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::Uri;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{JwkSet, KeyAlgorithm, PublicKeyUse},
};
use parking_lot::RwLock;
use streamer_core::is_loopback_host;
use tokio::{sync::Mutex, time::Instant};

use crate::{KeyError, VerificationKey};

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BYTES: usize = 1024 * 1024;

/// When keys are fetched again.
#[derive(Clone, Copy, Debug)]
pub struct JwksRefresh {
    /// Keys older than this are fetched anew on use, so that withdrawn ones go.
    pub max_age: Duration,
    /// A token with an unknown key id makes us look again, but not more often than this.
    pub min_interval: Duration,
}

/// Fetches and keeps the keys of one JWKS URL.
pub struct JwksSource {
    url: Uri,
    refresh: JwksRefresh,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    keys: RwLock<Fetched>,
    fetching: Mutex<()>,
}

#[derive(Clone, Default)]
struct Fetched {
    keys: Arc<Vec<VerificationKey>>,
    tried_at: Option<Instant>,
    /// Why the last try failed.
    failure: Option<String>,
    got_at: Option<Instant>,
}

impl JwksSource {
    /// Will fetch from this `https:` URL when first needed; `http:` is for this machine only (a
    /// sidecar, a test).
    ///
    /// # Errors
    /// When it is no such URL, or the machine has no root certificates.
    pub fn new(url: &str, refresh: JwksRefresh) -> Result<Self, KeyError> {
        let malformed = |reason: String| KeyError::Malformed {
            path: url.to_owned(),
            algorithm: "JWKS".into(),
            reason,
        };
        let parsed: Uri = url.parse().map_err(|error| malformed(format!("{error}")))?;
        let is_local = parsed.host().is_some_and(is_loopback_host);
        match parsed.scheme_str() {
            Some("https") if parsed.host().is_some() => {}
            Some("http") if is_local => {}
            _ => {
                return Err(malformed(
                    "must be an https:// URL, or http:// on this machine".into(),
                ));
            }
        }
        let connector = HttpsConnectorBuilder::new()
            .with_native_roots()
            .map_err(|error| malformed(error.to_string()))?
            .https_or_http()
            .enable_http1()
            .build();
        Ok(Self {
            url: parsed,
            refresh,
            client: Client::builder(TokioExecutor::new()).build(connector),
            keys: RwLock::default(),
            fetching: Mutex::default(),
        })
    }

    /// The keys as of now; fetched when `wanted` is not among them, or when they are old.
    ///
    /// # Errors
    /// When they are needed and cannot be had.
    pub(crate) async fn keys(
        &self,
        wanted: Option<&str>,
    ) -> Result<Arc<Vec<VerificationKey>>, String> {
        if let Some(keys) = self.fresh(wanted) {
            return Ok(keys);
        }
        let _one_at_a_time = self.fetching.lock().await;
        if let Some(keys) = self.fresh(wanted) {
            return Ok(keys);
        }
        if let Some(reason) = self.failed_lately() {
            return Err(reason);
        }
        let fetched = tokio::time::timeout(TIMEOUT, self.fetch())
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} s", TIMEOUT.as_secs())));
        let now = Instant::now();
        let mut held = self.keys.write();
        held.tried_at = Some(now);
        match fetched {
            Ok(keys) => {
                held.keys = Arc::new(keys);
                held.got_at = Some(now);
                held.failure = None;
                Ok(held.keys.clone())
            }
            // Old keys serve on while the issuer is out of reach.
            Err(reason) if held.got_at.is_some() => {
                tracing::warn!(url = %self.url, reason, "could not refresh the signing keys");
                Ok(held.keys.clone())
            }
            Err(reason) => {
                held.failure = Some(reason.clone());
                Err(reason)
            }
        }
    }

    /// How long keys count as current.
    pub(crate) fn max_age(&self) -> Duration {
        self.refresh.max_age
    }

    /// Why there are no keys at all, when that was found out just now.
    fn failed_lately(&self) -> Option<String> {
        let held = self.keys.read();
        let lately = held.tried_at.is_some_and(|at| at.elapsed() < self.refresh.min_interval);
        held.failure.clone().filter(|_| lately)
    }

    fn fresh(&self, wanted: Option<&str>) -> Option<Arc<Vec<VerificationKey>>> {
        let held = self.keys.read().clone();
        let tried_lately = held.tried_at.is_some_and(|at| at.elapsed() < self.refresh.min_interval);
        let young = held.got_at.is_some_and(|at| at.elapsed() < self.refresh.max_age);
        let known = match wanted {
            Some(id) => held.keys.iter().any(|key| key.id.as_deref() == Some(id)),
            None => true,
        };
        let usable = held.got_at.is_some() && ((young && known) || tried_lately);
        usable.then_some(held.keys)
    }

    async fn fetch(&self) -> Result<Vec<VerificationKey>, String> {
        let response =
            self.client.get(self.url.clone()).await.map_err(|error| error.to_string())?;
        if !response.status().is_success() {
            return Err(format!("status {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_BYTES)
            .collect()
            .await
            .map_err(|error| error.to_string())?
            .to_bytes();
        let set: JwkSet = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        let keys: Vec<_> = set.keys.iter().filter_map(verification_key).collect();
        if keys.is_empty() {
            return Err("it holds no RS256, ES256 or EdDSA key".into());
        }
        Ok(keys)
    }
}

/// Symmetric keys and algorithms beyond ours are passed over.
fn verification_key(jwk: &jsonwebtoken::jwk::Jwk) -> Option<VerificationKey> {
    use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve};
    let algorithm = match (jwk.common.key_algorithm, &jwk.algorithm) {
        (Some(KeyAlgorithm::RS256) | None, AlgorithmParameters::RSA(_)) => Algorithm::RS256,
        (Some(KeyAlgorithm::ES256) | None, AlgorithmParameters::EllipticCurve(parameters))
            if parameters.curve == EllipticCurve::P256 =>
        {
            Algorithm::ES256
        }
        (Some(KeyAlgorithm::EdDSA) | None, AlgorithmParameters::OctetKeyPair(_)) => {
            Algorithm::EdDSA
        }
        _ => return None,
    };
    if jwk.common.public_key_use.as_ref().is_some_and(|of| *of != PublicKeyUse::Signature) {
        return None;
    }
    let key = DecodingKey::from_jwk(jwk).ok()?;
    Some(VerificationKey { id: jwk.common.key_id.clone(), algorithm, key })
}
