//! Verifies tokens.

use std::{sync::Arc, time::Duration};

use http::HeaderValue;
use jsonwebtoken::{Validation, errors::ErrorKind};
use quick_cache::sync::Cache;
use serde::Deserialize;
use streamer_core::{Clock, Timestamp};
use tokio::time::Instant;

use crate::{Caller, JwksSource, Principal, VerificationKey};

/// Verified tokens kept at most.
const CACHED_TOKENS: usize = 16_384;
/// Larger tokens are refused unread.
const MAX_TOKEN_BYTES: usize = 8 * 1024;
const MAX_NAME_CHARS: usize = 128;

/// Why a caller is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No token was sent.
    #[error("a token is required: send `authorization: Bearer <token>`")]
    Missing,
    /// It cannot be read.
    #[error("the token is malformed: {0}")]
    Malformed(String),
    /// Its algorithm is not one of those configured.
    #[error("the token's algorithm is not accepted here")]
    Algorithm,
    /// No configured key signed it.
    #[error("the token's signature does not match any accepted key")]
    Signature,
    /// Its time is over.
    #[error("the token expired at {0}")]
    Expired(Timestamp),
    /// Its time has not come.
    #[error("the token is not valid before {0}")]
    NotYetValid(Timestamp),
    /// A claim is missing or is not what is asked for.
    #[error("claim {claim} {rule}")]
    Claim {
        /// Which.
        claim: &'static str,
        /// The rule that it breaks.
        rule: String,
    },
    /// The keys cannot be had at the moment.
    #[error("the signing keys cannot be fetched now: {0}")]
    KeysUnavailable(String),
}

/// What a token must say.
#[derive(Clone, Debug)]
pub struct TokenRules {
    /// Claim `iss` must be one of these.
    pub issuers: Vec<String>,
    /// Claim `aud` must name one of these.
    pub audiences: Vec<String>,
    /// How far clocks may differ.
    pub leeway: Duration,
}

#[derive(Deserialize)]
struct Claims {
    iss: Option<String>,
    aud: Option<OneOrMany>,
    sub: Option<String>,
    tenant_id: Option<String>,
    #[serde(default)]
    permissions: Vec<String>,
    exp: Option<f64>,
    nbf: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn has_any(&self, wanted: &[String]) -> bool {
        match self {
            Self::One(one) => wanted.contains(one),
            Self::Many(many) => many.iter().any(|one| wanted.contains(one)),
        }
    }
}

/// Verifies tokens against the configured keys.
pub struct Authenticator {
    keys: Arc<Vec<VerificationKey>>,
    jwks: Option<JwksSource>,
    rules: TokenRules,
    clock: Arc<dyn Clock>,
    verified: Cache<String, Arc<Verified>>,
}

struct Verified {
    principal: Arc<Principal>,
    /// One copy for everybody who carries this token.
    authorization: HeaderValue,
    valid_from: Timestamp,
    /// Tokens are verified anew when the keys may have changed.
    verified_at: Instant,
}

impl Verified {
    fn caller(&self) -> Caller {
        Caller { principal: self.principal.clone(), authorization: self.authorization.clone() }
    }
}

impl Authenticator {
    /// Accepts tokens that one of `keys`, or one of the keys at the JWKS URL, signed.
    #[must_use]
    pub fn new(
        keys: Vec<VerificationKey>,
        jwks: Option<JwksSource>,
        rules: TokenRules,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { keys: Arc::new(keys), jwks, rules, clock, verified: Cache::new(CACHED_TOKENS) }
    }

    /// When this caller's token is not accepted any more.
    #[must_use]
    pub fn accepted_until(&self, caller: &Caller) -> Timestamp {
        caller.principal.expires_at.plus(self.rules.leeway)
    }

    /// Who holds this token.
    ///
    /// # Errors
    /// Why it is not accepted.
    pub async fn authenticate(&self, token: &str) -> Result<Caller, AuthError> {
        if let Some(known) = self.cached(token) {
            return known;
        }
        let claims = self.verify(token).await?;
        let verified = Arc::new(self.check(claims, token)?);
        self.in_force(&verified)?;
        let caller = verified.caller();
        self.verified.insert(token.to_owned(), verified);
        Ok(caller)
    }

    /// As [`Self::authenticate`] for a token that was verified lately; `None` for others. The hot
    /// path: no signature, no await.
    #[must_use]
    pub fn cached(&self, token: &str) -> Option<Result<Caller, AuthError>> {
        let verified = self.verified.get(token)?;
        let max_age = self.jwks.as_ref().map(JwksSource::max_age);
        if max_age.is_some_and(|max_age| verified.verified_at.elapsed() >= max_age) {
            return None;
        }
        Some(self.in_force(&verified).map(|()| verified.caller()))
    }

    async fn verify(&self, token: &str) -> Result<Claims, AuthError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(AuthError::Malformed(format!("it is over {MAX_TOKEN_BYTES} bytes")));
        }
        let header = jsonwebtoken::decode_header(token).map_err(|error| match error.kind() {
            // `none` and everything else that jsonwebtoken does not know.
            ErrorKind::Json(_) | ErrorKind::InvalidAlgorithmName => AuthError::Algorithm,
            _ => AuthError::Malformed(error.to_string()),
        })?;
        // The configured ones first: they do not depend on anybody being there.
        let refusal = match verify_with(&self.keys, &header, token) {
            Err(AuthError::Algorithm | AuthError::Signature) if self.jwks.is_some() => None,
            outcome => Some(outcome),
        };
        match (refusal, &self.jwks) {
            (Some(outcome), _) => outcome,
            (None, Some(jwks)) => {
                let keys = jwks.keys(header.kid.as_deref()).await;
                verify_with(&keys.map_err(AuthError::KeysUnavailable)?, &header, token)
            }
            (None, None) => Err(AuthError::Algorithm),
        }
    }

    fn check(&self, claims: Claims, token: &str) -> Result<Verified, AuthError> {
        let broken = |claim, rule: &str| AuthError::Claim { claim, rule: rule.to_owned() };
        match &claims.iss {
            Some(issuer) if self.rules.issuers.contains(issuer) => {}
            Some(_) => return Err(broken("iss", "is not an accepted issuer")),
            None => return Err(broken("iss", "is required")),
        }
        match &claims.aud {
            Some(audience) if audience.has_any(&self.rules.audiences) => {}
            Some(_) => return Err(broken("aud", "does not name this service")),
            None => return Err(broken("aud", "is required")),
        }
        let expires_at = seconds(claims.exp.ok_or_else(|| broken("exp", "is required"))?);
        let mut authorization = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|error| AuthError::Malformed(error.to_string()))?;
        authorization.set_sensitive(true);
        Ok(Verified {
            authorization,
            principal: Arc::new(Principal {
                tenant: name("tenant_id", claims.tenant_id)?,
                user: name("sub", claims.sub)?,
                permissions: claims.permissions,
                expires_at,
            }),
            valid_from: claims.nbf.map_or(Timestamp::from_millis(i64::MIN), seconds),
            verified_at: Instant::now(),
        })
    }

    fn in_force(&self, verified: &Verified) -> Result<(), AuthError> {
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

/// Tries the keys that fit the header, which is not trusted: it only picks among keys, each of which
/// has its algorithm.
fn verify_with(
    keys: &[VerificationKey],
    header: &jsonwebtoken::Header,
    token: &str,
) -> Result<Claims, AuthError> {
    let mut right_algorithm = false;
    for key in keys {
        let other_id =
            key.id.is_some() && header.kid.is_some() && key.id.as_ref() != header.kid.as_ref();
        if key.algorithm != header.alg || other_id {
            continue;
        }
        right_algorithm = true;
        let mut validation = Validation::new(key.algorithm);
        // Claims are checked below, by our clock and with errors that name the claim.
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_aud = false;
        match jsonwebtoken::decode::<Claims>(token, &key.key, &validation) {
            Ok(decoded) => return Ok(decoded.claims),
            Err(error) => match error.kind() {
                ErrorKind::InvalidSignature => {}
                _ => return Err(AuthError::Malformed(error.to_string())),
            },
        }
    }
    Err(if right_algorithm { AuthError::Signature } else { AuthError::Algorithm })
}

fn name(claim: &'static str, value: Option<String>) -> Result<String, AuthError> {
    let broken = |rule: String| AuthError::Claim { claim, rule };
    let value = value.ok_or_else(|| broken("is required".into()))?;
    let length = value.chars().count();
    if length == 0 || length > MAX_NAME_CHARS {
        return Err(broken(format!("must have 1 to {MAX_NAME_CHARS} characters, has {length}")));
    }
    if value.chars().any(char::is_control) {
        return Err(broken("must not have control characters".into()));
    }
    Ok(value)
}

/// NumericDate of RFC 7519: seconds since the Unix epoch, possibly with a fraction.
fn seconds(numeric_date: f64) -> Timestamp {
    // `as` saturates, which is what a date beyond the calendar shall do.
    #[expect(clippy::cast_possible_truncation, reason = "saturates")]
    Timestamp::from_millis((numeric_date * 1000.0) as i64)
}
