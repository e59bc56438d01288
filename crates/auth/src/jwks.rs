//! Keys from a JWKS URL, with rotation and withdrawal.

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

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BYTES: usize = 1024 * 1024;
/// Keys of one set at most: each token may be tried with several.
const MAX_KEYS: usize = 256;
/// Unknown key ids that are remembered at most.
const MAX_UNKNOWN: usize = 1024;

/// When keys are fetched again.
#[derive(Clone, Copy, Debug)]
pub struct JwksRefresh {
    /// Keys older than this are fetched anew on use, so that withdrawn ones go.
    pub max_age: Duration,
    /// They are not fetched more often than this, also when a token names an unknown key id.
    pub min_interval: Duration,
    /// How long keys count beyond their age while no others can be fetched.
    pub max_outage: Duration,
}

/// Fetches and keeps the keys of one JWKS URL.
pub struct JwksSource {
    url: Uri,
    refresh: JwksRefresh,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    held: RwLock<Held>,
    /// Held by the one fetch that is under way.
    fetching: Arc<Mutex<()>>,
    /// When a token came first that names a key which the set did not have, by the hash of the key id.
    unknown: Cache<u64, Instant>,
    hasher: RandomState,
}

#[derive(Clone, Default)]
struct Held {
    set: Arc<KeySet>,
    /// When the set was asked for that is held.
    fetched_at: Option<Instant>,
    tried_at: Option<Instant>,
    /// Why the last try failed.
    failure: Option<String>,
}

/// The keys that were published at one time.
#[derive(Default)]
pub(crate) struct KeySet {
    pub(crate) keys: Vec<VerificationKey>,
    /// Sets with the same keys have the same.
    pub(crate) digest: u64,
}

impl KeySet {
    pub(crate) fn has(&self, id: &str) -> bool {
        self.keys.iter().any(|key| key.id.as_deref() == Some(id))
    }
}

/// What to do where keys are needed.
enum Usable {
    /// These are current, or the best there is.
    Set(Arc<KeySet>),
    /// There are none, and it was tried just now.
    None(String),
    /// They have to be fetched.
    Stale,
    /// They have to be fetched, but the last try failed, and these count on meanwhile.
    Outage(Arc<KeySet>),
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
            held: RwLock::default(),
            fetching: Arc::default(),
            unknown: Cache::new(MAX_UNKNOWN),
            hasher: RandomState::new(),
        })
    }

    /// The keys as of now, fetched when those at hand are old.
    ///
    /// # Errors
    /// When there are none, or only such as are too old.
    pub(crate) async fn current(self: &Arc<Self>) -> Result<Arc<KeySet>, String> {
        match self.usable() {
            Usable::Set(set) => return Ok(set),
            Usable::None(reason) => return Err(reason),
            Usable::Outage(set) => {
                self.fetch_in_background();
                return Ok(set);
            }
            Usable::Stale => {}
        }
        let guard = self.fetching.clone().lock_owned().await;
        match self.usable() {
            Usable::Set(set) | Usable::Outage(set) => Ok(set),
            Usable::None(reason) => Err(reason),
            Usable::Stale => self.fetched(guard).await,
        }
    }

    /// The digest of the keys at hand, if they can be used without a fetch.
    pub(crate) fn digest(self: &Arc<Self>) -> Option<u64> {
        match self.usable() {
            Usable::Set(set) => Some(set.digest),
            Usable::Outage(set) => {
                self.fetch_in_background();
                Some(set.digest)
            }
            Usable::None(_) | Usable::Stale => None,
        }
    }

    /// A set that was asked for after a token with this unknown key id came first; `None` if the one at
    /// hand is such a set, and so its issuer does not have the key.
    ///
    /// # Errors
    /// When none can be had now: the key may be a new one, and the token good.
    pub(crate) async fn newer(self: &Arc<Self>, id: &str) -> Result<Option<Arc<KeySet>>, String> {
        let key = self.hasher.hash_one(id);
        let came_at = self.unknown.get(&key).unwrap_or_else(|| {
            let now = Instant::now();
            self.unknown.insert(key, now);
            now
        });
        if self.is_answered(came_at)? {
            return Ok(None);
        }
        let guard = self.fetching.clone().lock_owned().await;
        // Fetched while this call waited.
        if self.is_answered(came_at)? {
            return Ok(Some(self.held.read().set.clone()));
        }
        let set = self.fetched(guard).await?;
        if self.is_fetched_after(came_at) {
            Ok(Some(set))
        } else {
            Err("its key is not known, and the keys cannot be fetched".into())
        }
    }

    /// Whether the set at hand says that there is no key for a token that came then. `false` if a newer one
    /// may be fetched.
    fn is_answered(&self, came_at: Instant) -> Result<bool, String> {
        if !self.tried_lately(&self.held.read()) {
            return Ok(false);
        }
        if self.is_fetched_after(came_at) {
            return Ok(true);
        }
        // Short enough for the reason of a WebSocket's end.
        Err(format!(
            "its key is not known yet (auth.jwks_min_refresh_ms is {})",
            self.refresh.min_interval.as_millis()
        ))
    }

    fn usable(&self) -> Usable {
        let held = self.held.read();
        let age = held.fetched_at.map(|at| at.elapsed());
        if age.is_some_and(|age| age < self.refresh.max_age) {
            return Usable::Set(held.set.clone());
        }
        let best = self.best(&held);
        match best {
            best if self.tried_lately(&held) => best,
            Usable::Set(set) if held.failure.is_some() => Usable::Outage(set),
            _ => Usable::Stale,
        }
    }

    /// What there is while no keys can be fetched.
    fn best(&self, held: &Held) -> Usable {
        let limit = self.refresh.max_age.saturating_add(self.refresh.max_outage);
        if held.fetched_at.is_some_and(|at| at.elapsed() < limit) {
            return Usable::Set(held.set.clone());
        }
        Usable::None(held.failure.clone().unwrap_or_else(|| "there are no keys yet".into()))
    }

    fn tried_lately(&self, held: &Held) -> bool {
        held.tried_at.is_some_and(|at| at.elapsed() < self.refresh.min_interval)
    }

    fn is_fetched_after(&self, time: Instant) -> bool {
        self.held.read().fetched_at.is_some_and(|at| at > time)
    }

    /// While the last fetch failed: callers would wait for a server that does not answer.
    fn fetch_in_background(self: &Arc<Self>) {
        // If one is under way already, it will do.
        if let Ok(guard) = self.fetching.clone().try_lock_owned() {
            drop(self.start_fetch(guard));
        }
    }

    async fn fetched(self: &Arc<Self>, guard: OwnedMutexGuard<()>) -> Result<Arc<KeySet>, String> {
        let fetched = self.start_fetch(guard).await;
        fetched.unwrap_or_else(|error| Err(format!("the fetch was broken off: {error}")))
    }

    /// In a task of its own: callers that leave would break it off, and the next one would begin anew.
    fn start_fetch(
        self: &Arc<Self>,
        guard: OwnedMutexGuard<()>,
    ) -> JoinHandle<Result<Arc<KeySet>, String>> {
        let source = self.clone();
        tokio::spawn(async move {
            let fetched = source.fetch_into_place().await;
            drop(guard);
            fetched
        })
    }

    /// Fetches the keys; those at hand stay when that fails.
    async fn fetch_into_place(&self) -> Result<Arc<KeySet>, String> {
        let began = Instant::now();
        let fetched = tokio::time::timeout(TIMEOUT, self.fetch())
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} s", TIMEOUT.as_secs())));
        let mut held = self.held.write();
        held.tried_at = Some(Instant::now());
        match fetched {
            Ok(set) => {
                held.set = Arc::new(set);
                held.fetched_at = Some(began);
                held.failure = None;
                Ok(held.set.clone())
            }
            Err(reason) => {
                tracing::warn!(url = %self.url, reason, "could not fetch the signing keys");
                held.failure = Some(reason);
                match self.best(&held) {
                    Usable::Set(set) => Ok(set),
                    Usable::None(reason) => Err(reason),
                    Usable::Stale | Usable::Outage(_) => Err("there are no keys yet".into()),
                }
            }
        }
    }

    async fn fetch(&self) -> Result<KeySet, String> {
        let response =
            self.client.get(self.url.clone()).await.map_err(|error| error.to_string())?;
        // Redirects among them: the operator configured this URL and no other.
        if !response.status().is_success() {
            return Err(format!("status {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_BYTES)
            .collect()
            .await
            .map_err(|error| error.to_string())?
            .to_bytes();
        let set: Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        let Some(Value::Array(jwks)) = set.get("keys") else {
            return Err("it is no JSON Web Key Set: keys is not an array".into());
        };
        if jwks.len() > MAX_KEYS {
            return Err(format!("it has {} keys, more than {MAX_KEYS}", jwks.len()));
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
                    tracing::debug!(url = %self.url, id, reason, "a key of the set is not used");
                }
            }
        }
        if keys.is_empty() {
            // What was published counts, also when it is nothing.
            tracing::warn!(url = %self.url, "the key set has no RS256, ES256 or EdDSA key");
        }
        texts.sort_unstable();
        Ok(KeySet { keys, digest: self.hasher.hash_one(&texts) })
    }
}
