//! Token verification.

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::HeaderValue;
use jsonwebtoken::errors::ErrorKind;
use quick_cache::sync::Cache;
use serde_json::Value;
use streamer_core::{Clock, Timestamp};

use crate::{
    AuthError, Caller, JwksSource, Principal, VerificationKey,
    claims::{AcceptedClaims, Claims, TokenRules},
    unique_json::UniqueJson,
};

/// Maximum number of cached verified tokens.
const CACHED_TOKENS: usize = 16_384;

/// Verifies tokens against the configured keys.
pub struct Authenticator {
    keys: Arc<Vec<VerificationKey>>,
    jwks: Option<Arc<JwksSource>>,
    rules: TokenRules,
    clock: Arc<dyn Clock>,
    verified: Cache<String, Arc<Verified>>,
}

struct Verified {
    principal: Arc<Principal>,
    /// Header with the token, shared by all callers with the same token.
    authorization: HeaderValue,
    valid_from: Timestamp,
    /// [`KeySet::digest`](crate::jwks::KeySet) of the set whose key signed the token; `None` if the key was
    /// configured. If the set changes, the token is verified again.
    key_set: Option<u64>,
}

/// Claims of a token with a valid signature.
struct Verification {
    claims: Claims,
    key_set: Option<u64>,
}

impl Verified {
    fn caller(&self) -> Caller {
        Caller::new(self.principal.clone(), self.authorization.clone())
    }
}

impl Authenticator {
    /// Returns an authenticator that accepts tokens signed by one of `keys` or by a key at the JWKS URL.
    #[must_use]
    pub fn new(
        keys: Vec<VerificationKey>,
        jwks: Option<JwksSource>,
        rules: TokenRules,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let jwks = jwks.map(Arc::new);
        Self { keys: Arc::new(keys), jwks, rules, clock, verified: Cache::new(CACHED_TOKENS) }
    }

    /// Returns the time until which the token of `caller` is accepted.
    #[must_use]
    pub fn accepted_until(&self, caller: &Caller) -> Timestamp {
        caller.principal.expires_at.plus(self.rules.leeway)
    }

    /// Returns the remaining duration for which the token of `caller` is accepted.
    #[must_use]
    pub fn time_left(&self, caller: &Caller) -> Duration {
        self.accepted_until(caller).since(self.clock.now())
    }

    /// Verifies a token and returns its caller.
    ///
    /// # Errors
    /// Returns the reason why the token is not accepted.
    pub async fn authenticate(&self, token: &str) -> Result<Caller, AuthError> {
        if let Some(cached) = self.cached(token) {
            return cached;
        }
        if let Some(jwks) = &self.jwks
            && self.verified.get(token).is_some_and(|verified| verified.key_set.is_some())
        {
            // The cached keys may be stale. If no keys are available, `verify` returns the reason.
            drop(jwks.current().await);
            if let Some(cached) = self.cached(token) {
                return cached;
            }
        }
        let verification = self.verify(token).await?;
        let verified = Arc::new(self.check(verification, token)?);
        self.check_validity_window(&verified)?;
        let caller = verified.caller();
        self.verified.insert(token.to_owned(), verified);
        Ok(caller)
    }

    /// Returns the same result as [`Self::authenticate`] for a cached token, and `None` for any other token.
    /// This is the hot path: it verifies no signature and does not wait.
    #[must_use]
    pub fn cached(&self, token: &str) -> Option<Result<Caller, AuthError>> {
        let verified = self.verified.get(token)?;
        if let (Some(key_set), Some(jwks)) = (verified.key_set, &self.jwks)
            && jwks.digest() != Some(key_set)
        {
            return None;
        }
        Some(self.check_validity_window(&verified).map(|()| verified.caller()))
    }

    async fn verify(&self, token: &str) -> Result<Verification, AuthError> {
        let max = self.rules.max_token_bytes;
        if token.len() > max {
            return Err(AuthError::Malformed(format!("must be at most {max} bytes")));
        }
        check_header(token)?;
        let header = jsonwebtoken::decode_header(token).map_err(|error| match error.kind() {
            // `none`, and every other algorithm that jsonwebtoken does not support.
            ErrorKind::Json(_) | ErrorKind::InvalidAlgorithmName => AuthError::Algorithm,
            _ => AuthError::Malformed(error.to_string()),
        })?;
        // Configured keys are tried first: they do not depend on the JWKS server.
        match verify_with(&self.keys, &header, token) {
            Ok(claims) => return Ok(Verification { claims, key_set: None }),
            Err(AuthError::Algorithm | AuthError::Signature) if self.jwks.is_some() => {}
            Err(error) => return Err(error),
        }
        let Some(jwks) = &self.jwks else { return Err(AuthError::Algorithm) };
        let mut set = jwks.current().await.map_err(AuthError::KeysUnavailable)?;
        let mut outcome = verify_with(&set.keys, &header, token);
        if let (Err(AuthError::Algorithm | AuthError::Signature), Some(id)) =
            (&outcome, &header.kid)
            && !set.contains(id)
            && let Some(newer) =
                jwks.refresh_for_unknown_id(id).await.map_err(AuthError::KeysUnavailable)?
        {
            set = newer;
            outcome = verify_with(&set.keys, &header, token);
        }
        outcome.map(|claims| Verification { claims, key_set: Some(set.digest) })
    }

    fn check(&self, verification: Verification, token: &str) -> Result<Verified, AuthError> {
        let Verification { claims, key_set } = verification;
        let AcceptedClaims { principal, valid_from } =
            claims.check(&self.rules, self.clock.now())?;
        let mut authorization = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|error| AuthError::Malformed(error.to_string()))?;
        authorization.set_sensitive(true);
        Ok(Verified { authorization, principal: Arc::new(principal), valid_from, key_set })
    }

    fn check_validity_window(&self, verified: &Verified) -> Result<(), AuthError> {
        let now = self.clock.now();
        let expires_at = verified.principal.expires_at;
        if expires_at.plus(self.rules.leeway) <= now {
            return Err(AuthError::Expired(expires_at));
        }
        if verified.valid_from > now.plus(self.rules.leeway) {
            return Err(AuthError::NotYetValid(verified.valid_from));
        }
        Ok(())
    }
}

/// Name of a member, name of its type, and function that returns whether a value has that type.
type MemberRule = (&'static str, &'static str, fn(&Value) -> bool);

/// Header members and their types, as specified in RFC 7515 section 4.1.
const HEADER_MEMBERS: [MemberRule; 7] = [
    ("kid", "a string", Value::is_string),
    ("typ", "a string", Value::is_string),
    ("cty", "a string", Value::is_string),
    ("jku", "a string", Value::is_string),
    ("x5u", "a string", Value::is_string),
    ("jwk", "an object", Value::is_object),
    ("x5c", "an array", Value::is_array),
];

/// Checks the header for problems that `jsonwebtoken` does not detect: duplicate members, wrong types of
/// members, and extensions.
fn check_header(token: &str) -> Result<(), AuthError> {
    let malformed = |error: String| AuthError::Malformed(format!("header: {error}"));
    let encoded = token.split('.').next().unwrap_or_default();
    let header = URL_SAFE_NO_PAD.decode(encoded).map_err(|error| malformed(error.to_string()))?;
    let UniqueJson(header) =
        serde_json::from_slice(&header).map_err(|error| malformed(error.to_string()))?;
    let Value::Object(header) = header else {
        return Err(malformed("must be a JSON object".into()));
    };
    for (name, type_name, has_type) in HEADER_MEMBERS {
        if header.get(name).is_some_and(|value| !has_type(value)) {
            return Err(malformed(format!("{name} must be {type_name}")));
        }
    }
    if header.contains_key("crit") {
        // RFC 7515 section 4.1.11: a token with an unsupported extension is invalid, and so is one
        // whose `crit` is not a list of names.
        let reason = "header crit: no extension is supported";
        return Err(AuthError::Malformed(reason.into()));
    }
    if !header.get("alg").is_some_and(Value::is_string) {
        return Err(AuthError::Algorithm);
    }
    Ok(())
}

/// Verifies a token with the keys that match the token's header. The header is not trusted: it only selects
/// keys, and each key has a fixed algorithm.
fn verify_with(
    keys: &[VerificationKey],
    header: &jsonwebtoken::Header,
    token: &str,
) -> Result<Claims, AuthError> {
    let malformed = |reason: String| AuthError::Malformed(reason);
    let three_parts = || malformed("must have three parts separated by dots".into());
    let (message, signature) = token.rsplit_once('.').ok_or_else(three_parts)?;
    let (_, claims) = message.split_once('.').ok_or_else(three_parts)?;
    let mut algorithm_matches = false;
    for key in keys.iter().filter(|key| key.algorithm == header.alg) {
        algorithm_matches = true;
        if key.id.is_some() && header.kid.is_some() && key.id != header.kid {
            continue;
        }
        let is_signed =
            jsonwebtoken::crypto::verify(signature, message.as_bytes(), &key.key, key.algorithm)
                .map_err(|error| malformed(format!("signature: {error}")))?;
        if is_signed {
            let claims = URL_SAFE_NO_PAD.decode(claims);
            let claims = claims.map_err(|error| malformed(format!("claims: {error}")))?;
            let claims = serde_json::from_slice(&claims);
            return claims.map_err(|error| malformed(format!("claims: {error}")));
        }
    }
    Err(if algorithm_matches { AuthError::Signature } else { AuthError::Algorithm })
}
