//! Keys from a JWKS URL, with rotation and revocation.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::Uri;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use parking_lot::RwLock;
use quick_cache::sync::Cache;
use serde_json::Value;
use streamer_core::is_loopback_host;
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    task::JoinHandle,
    time::Instant,
};

use crate::{KeyError, VerificationKey, jwk::verification_key};

const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_SET_BYTES: usize = 1024 * 1024;
/// Maximum number of keys in a set: a token may be verified with several of them.
const MAX_KEYS: usize = 256;
/// Maximum number of unknown key IDs that are stored.
const MAX_UNKNOWN_IDS: usize = 1024;

/// Rules for when the keys are fetched again.
#[derive(Clone, Copy, Debug)]
pub struct JwksRefresh {
    /// Maximum age of the keys. Older keys are fetched again when they are needed, so that revoked keys are
    /// dropped.
    pub max_age: Duration,
    /// Minimum interval between fetches, including fetches for tokens with an unknown key ID.
    pub min_interval: Duration,
    /// Maximum time for which keys older than `max_age` are used while they cannot be fetched.
    pub max_outage: Duration,
}

/// Fetches and caches the keys at a JWKS URL.
pub struct JwksSource {
    url: Uri,
    refresh: JwksRefresh,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    cache: RwLock<CachedSet>,
    /// Lock of the fetch in progress.
    fetching: Arc<Mutex<()>>,
    /// Time when a token with an unknown key ID was first received, by the hash of the key ID.
    unknown_ids: Cache<u64, Instant>,
    hasher: RandomState,
}

#[derive(Clone, Default)]
struct CachedSet {
    set: Arc<KeySet>,
    /// Time when the fetch of the cached set began.
    fetched_at: Option<Instant>,
    last_attempt_at: Option<Instant>,
    /// Reason why the last fetch failed; `None` if it succeeded.
    failure: Option<String>,
}

/// Keys that the issuer published at one time.
#[derive(Default)]
pub(crate) struct KeySet {
    pub(crate) keys: Vec<VerificationKey>,
    /// Digest of the keys, which is equal for sets with the same keys.
    pub(crate) digest: u64,
}

impl KeySet {
    pub(crate) fn contains(&self, id: &str) -> bool {
        self.keys.iter().any(|key| key.id.as_deref() == Some(id))
    }
}

/// State of the cached keys.
enum CacheState {
    /// The keys are current, or the last attempt to fetch is too recent to repeat it.
    Usable(Arc<KeySet>),
    /// No keys are available, and the last attempt to fetch is too recent to repeat it.
    Unavailable(String),
    /// The keys must be fetched.
    Stale,
    /// The keys must be fetched, but the last fetch failed and the cached keys are still accepted.
    Outage(Arc<KeySet>),
}

impl JwksSource {
    /// Returns a source that fetches from the given `https:` URL when keys are first needed; `http:` is
    /// allowed for this machine only (for example a sidecar or a test).
    ///
    /// # Errors
    /// Returns an error if the URL is invalid, or if the machine has no root certificates.
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
                    "must be an https:// URL, or an http:// URL on this machine".into(),
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
            cache: RwLock::default(),
            fetching: Arc::default(),
            unknown_ids: Cache::new(MAX_UNKNOWN_IDS),
            hasher: RandomState::new(),
        })
    }

    /// Returns the current keys; fetches them if the cached keys are stale.
    ///
    /// # Errors
    /// Returns an error if no keys are available, or only expired keys.
    pub(crate) async fn current(self: &Arc<Self>) -> Result<Arc<KeySet>, String> {
        match self.state() {
            CacheState::Usable(set) => return Ok(set),
            CacheState::Unavailable(reason) => return Err(reason),
            CacheState::Outage(set) => {
                self.fetch_in_background();
                return Ok(set);
            }
            CacheState::Stale => {}
        }
        let guard = self.fetching.clone().lock_owned().await;
        match self.state() {
            CacheState::Usable(set) | CacheState::Outage(set) => Ok(set),
            CacheState::Unavailable(reason) => Err(reason),
            CacheState::Stale => self.fetch_and_wait(guard).await,
        }
    }

    /// Returns the digest of the cached keys if they can be used without waiting for a fetch.
    pub(crate) fn digest(self: &Arc<Self>) -> Option<u64> {
        match self.state() {
            CacheState::Usable(set) => Some(set.digest),
            CacheState::Outage(set) => {
                self.fetch_in_background();
                Some(set.digest)
            }
            CacheState::Unavailable(_) | CacheState::Stale => None,
        }
    }

    /// Returns a set that was fetched after a token with the given unknown key ID was first received; `None`
    /// if the cached set is already such a set, which proves that the issuer does not have the key.
    ///
    /// # Errors
    /// Returns an error if no such set is available now: the key may be new and the token valid.
    pub(crate) async fn refresh_for_unknown_id(
        self: &Arc<Self>,
        id: &str,
    ) -> Result<Option<Arc<KeySet>>, String> {
        let key = self.hasher.hash_one(id);
        let first_seen = self.unknown_ids.get(&key).unwrap_or_else(|| {
            let now = Instant::now();
            self.unknown_ids.insert(key, now);
            now
        });
        if self.is_conclusive(first_seen)? {
            return Ok(None);
        }
        let guard = self.fetching.clone().lock_owned().await;
        // A concurrent call may have fetched while this call waited for the lock.
        if self.is_conclusive(first_seen)? {
            return Ok(Some(self.cache.read().set.clone()));
        }
        let set = self.fetch_and_wait(guard).await?;
        if self.is_fetched_after(first_seen) {
            Ok(Some(set))
        } else {
            Err("its key is unknown, and the keys cannot be fetched".into())
        }
    }

    /// Returns whether the cached set proves that the issuer does not have a key whose ID was first received at
    /// `first_seen`; `false` if a newer set may be fetched.
    fn is_conclusive(&self, first_seen: Instant) -> Result<bool, String> {
        if !self.is_attempted_recently(&self.cache.read()) {
            return Ok(false);
        }
        if self.is_fetched_after(first_seen) {
            return Ok(true);
        }
        // The message is short enough for the reason of a WebSocket close frame.
        Err(format!(
            "its key is unknown, retry later (auth.jwks_min_refresh_interval is {})",
            self.refresh.min_interval.as_millis()
        ))
    }

    fn state(&self) -> CacheState {
        let cache = self.cache.read();
        let age = cache.fetched_at.map(|at| at.elapsed());
        if age.is_some_and(|age| age < self.refresh.max_age) {
            return CacheState::Usable(cache.set.clone());
        }
        let fallback = self.fallback(&cache);
        match fallback {
            fallback if self.is_attempted_recently(&cache) => fallback,
            CacheState::Usable(set) if cache.failure.is_some() => CacheState::Outage(set),
            _ => CacheState::Stale,
        }
    }

    /// Returns the state of the cached keys while no keys can be fetched.
    fn fallback(&self, cache: &CachedSet) -> CacheState {
        let limit = self.refresh.max_age.saturating_add(self.refresh.max_outage);
        if cache.fetched_at.is_some_and(|at| at.elapsed() < limit) {
            return CacheState::Usable(cache.set.clone());
        }
        CacheState::Unavailable(
            cache.failure.clone().unwrap_or_else(|| "no keys were fetched yet".into()),
        )
    }

    fn is_attempted_recently(&self, cache: &CachedSet) -> bool {
        cache.last_attempt_at.is_some_and(|at| at.elapsed() < self.refresh.min_interval)
    }

    fn is_fetched_after(&self, time: Instant) -> bool {
        self.cache.read().fetched_at.is_some_and(|at| at > time)
    }

    /// Fetches without blocking callers while the JWKS server does not respond.
    fn fetch_in_background(self: &Arc<Self>) {
        // A fetch that is already in progress is sufficient.
        if let Ok(guard) = self.fetching.clone().try_lock_owned() {
            drop(self.start_fetch(guard));
        }
    }

    async fn fetch_and_wait(
        self: &Arc<Self>,
        guard: OwnedMutexGuard<()>,
    ) -> Result<Arc<KeySet>, String> {
        let fetched = self.start_fetch(guard).await;
        fetched.unwrap_or_else(|error| Err(format!("the fetch was aborted: {error}")))
    }

    /// Starts a fetch in a dedicated task, so that a caller that stops waiting does not abort it.
    fn start_fetch(
        self: &Arc<Self>,
        guard: OwnedMutexGuard<()>,
    ) -> JoinHandle<Result<Arc<KeySet>, String>> {
        let source = self.clone();
        tokio::spawn(async move {
            let fetched = source.fetch_and_cache().await;
            drop(guard);
            fetched
        })
    }

    /// Fetches and caches the keys; if that fails, the cached keys are kept.
    async fn fetch_and_cache(&self) -> Result<Arc<KeySet>, String> {
        let started_at = Instant::now();
        let fetched = tokio::time::timeout(FETCH_TIMEOUT, self.fetch())
            .await
            .unwrap_or_else(|_| Err(format!("no response within {} s", FETCH_TIMEOUT.as_secs())));
        let mut cache = self.cache.write();
        cache.last_attempt_at = Some(Instant::now());
        match fetched {
            Ok(set) => {
                cache.set = Arc::new(set);
                cache.fetched_at = Some(started_at);
                cache.failure = None;
                Ok(cache.set.clone())
            }
            Err(reason) => {
                tracing::warn!(url = %self.url, reason, "failed to fetch the signing keys");
                cache.failure = Some(reason);
                match self.fallback(&cache) {
                    CacheState::Usable(set) => Ok(set),
                    CacheState::Unavailable(reason) => Err(reason),
                    CacheState::Stale | CacheState::Outage(_) => {
                        Err("no keys were fetched yet".into())
                    }
                }
            }
        }
    }

    async fn fetch(&self) -> Result<KeySet, String> {
        let response =
            self.client.get(self.url.clone()).await.map_err(|error| error.to_string())?;
        // Redirects are not followed: the operator configured this URL only.
        if !response.status().is_success() {
            return Err(format!("status {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_SET_BYTES)
            .collect()
            .await
            .map_err(|error| error.to_string())?
            .to_bytes();
        let set: Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        let Some(Value::Array(jwks)) = set.get("keys") else {
            return Err("not a JSON Web Key Set: keys is not an array".into());
        };
        if jwks.len() > MAX_KEYS {
            return Err(format!("the set must have at most {MAX_KEYS} keys, has {}", jwks.len()));
        }
        let (mut keys, mut texts) = (Vec::with_capacity(jwks.len()), Vec::new());
        for jwk in jwks {
            match verification_key(jwk) {
                Ok(key) => {
                    keys.push(key);
                    texts.push(jwk.to_string());
                }
                Err(reason) => {
                    let id = jwk.get("kid").map(ToString::to_string).unwrap_or_default();
                    tracing::debug!(url = %self.url, id, reason, "skipped a key of the set");
                }
            }
        }
        if keys.is_empty() {
            // An empty set also replaces the cached keys, because the issuer published it.
            tracing::warn!(url = %self.url, "the key set has no RS256, ES256 or EdDSA key");
        }
        texts.sort_unstable();
        Ok(KeySet { keys, digest: self.hasher.hash_one(&texts) })
    }
}
