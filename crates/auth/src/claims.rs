//! Claims of a token and their validation rules.

use std::{borrow::Cow, time::Duration};

use serde::{Deserialize, Deserializer, de::Error};
use serde_json::{Map, Value};
use streamer_core::Timestamp;

use crate::{AuthError, Principal, unique_json::UniqueJson};

const MAX_NAME_CHARS: usize = 128;
/// Wildcard for every tenant in permissions (`worker:report@*`); no tenant can have this name.
const ANY_TENANT: &str = "*";

/// Rules for the claims of a token.
#[derive(Clone, Debug)]
pub struct TokenRules {
    /// Accepted values of claim `iss`.
    pub issuers: Vec<String>,
    /// Accepted audiences, of which claim `aud` must contain one.
    pub audiences: Vec<String>,
    /// Accepted tenants; empty for all.
    pub tenants: Vec<String>,
    /// Claim that contains the tenant.
    pub tenant_claim: String,
    /// Claim that contains the permissions: an array of strings, or one space-separated string.
    pub permissions_claim: String,
    /// Allowed clock skew.
    pub leeway: Duration,
    /// Maximum size of a token; larger tokens are rejected without being parsed.
    pub max_token_bytes: usize,
}

impl Default for TokenRules {
    /// Returns rules that accept no issuer.
    fn default() -> Self {
        Self {
            issuers: Vec::new(),
            audiences: Vec::new(),
            tenants: Vec::new(),
            tenant_claim: "tenant_id".into(),
            permissions_claim: "permissions".into(),
            leeway: Duration::ZERO,
            max_token_bytes: 8192,
        }
    }
}

/// Claims of a token. A duplicate claim is rejected: different readers could use different values.
pub(crate) struct Claims(Map<String, Value>);

/// Result of the validation of claims.
#[derive(Debug)]
pub(crate) struct AcceptedClaims {
    pub(crate) principal: Principal,
    pub(crate) valid_from: Timestamp,
}

impl<'de> Deserialize<'de> for Claims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match UniqueJson::deserialize(deserializer)?.0 {
            Value::Object(claims) => Ok(Self(claims)),
            _ => Err(D::Error::custom("must be a JSON object of claims")),
        }
    }
}

fn invalid(claim: impl Into<Cow<'static, str>>, rule: impl Into<String>) -> AuthError {
    AuthError::Claim { claim: claim.into(), rule: rule.into() }
}

impl Claims {
    /// Checks every rule except the validity window.
    pub(crate) fn check(
        &self,
        rules: &TokenRules,
        now: Timestamp,
    ) -> Result<AcceptedClaims, AuthError> {
        let issuer = self.text("iss")?.ok_or_else(|| invalid("iss", "is required"))?;
        if !rules.issuers.iter().any(|accepted| accepted == issuer) {
            return Err(invalid("iss", "is not an accepted issuer"));
        }
        self.check_audience(&rules.audiences)?;
        let expires_at = self.date("exp")?.ok_or_else(|| invalid("exp", "is required"))?;
        if self.date("iat")?.is_some_and(|issued_at| issued_at > now.plus(rules.leeway)) {
            return Err(invalid("iat", "is in the future"));
        }
        let tenant = self.name(&rules.tenant_claim)?;
        if tenant == ANY_TENANT {
            let rule = "must not be `*`, which stands for every tenant in permissions";
            return Err(invalid(rules.tenant_claim.clone(), rule));
        }
        if !rules.tenants.is_empty() && !rules.tenants.contains(&tenant) {
            return Err(invalid(rules.tenant_claim.clone(), "is not an accepted tenant"));
        }
        Ok(AcceptedClaims {
            principal: Principal {
                tenant,
                user: self.name("sub")?,
                permissions: self.permissions(&rules.permissions_claim)?,
                expires_at,
            },
            valid_from: self.date("nbf")?.unwrap_or(Timestamp::from_millis(i64::MIN)),
        })
    }

    /// Returns the claim with the given name, or otherwise the claim at the given dot-separated path through
    /// objects.
    fn get(&self, name: &str) -> Option<&Value> {
        if let Some(value) = self.0.get(name) {
            return Some(value);
        }
        let mut parts = name.split('.');
        let first = self.0.get(parts.next()?)?;
        parts.try_fold(first, |value, part| value.get(part))
    }

    fn text(&self, name: &str) -> Result<Option<&str>, AuthError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(name.to_owned(), "must be a string")),
        }
    }

    /// Returns a claim that is a NumericDate of RFC 7519: seconds since the Unix epoch, possibly with a fraction.
    fn date(&self, name: &'static str) -> Result<Option<Timestamp>, AuthError> {
        match self.0.get(name) {
            None => Ok(None),
            Some(Value::Number(seconds)) => Ok(seconds.as_f64().map(|seconds| {
                // `as` saturates, which is correct for a date beyond the range.
                #[expect(clippy::cast_possible_truncation, reason = "saturates")]
                let millis = (seconds * 1000.0) as i64;
                Timestamp::from_millis(millis)
            })),
            Some(_) => Err(invalid(name, "must be a number of seconds")),
        }
    }

    fn check_audience(&self, accepted: &[String]) -> Result<(), AuthError> {
        let is_accepted = |value: &Value| accepted.iter().any(|one| value.as_str() == Some(one));
        let is_addressed = match self.0.get("aud") {
            None => return Err(invalid("aud", "is required")),
            Some(Value::Array(many)) if many.iter().all(Value::is_string) => {
                many.iter().any(is_accepted)
            }
            Some(one @ Value::String(_)) => is_accepted(one),
            Some(_) => return Err(invalid("aud", "must be a string, or an array of strings")),
        };
        if is_addressed {
            Ok(())
        } else {
            Err(invalid("aud", "does not contain an accepted audience"))
        }
    }

    fn name(&self, claim: &str) -> Result<String, AuthError> {
        let invalid = |rule: String| invalid(claim.to_owned(), rule);
        let value = self.text(claim)?.ok_or_else(|| invalid("is required".into()))?;
        let length = value.chars().count();
        if length == 0 || length > MAX_NAME_CHARS {
            return Err(invalid(format!(
                "must have 1 to {MAX_NAME_CHARS} characters, has {length}"
            )));
        }
        if value.chars().any(char::is_control) {
            return Err(invalid("must not have control characters".into()));
        }
        Ok(value.to_owned())
    }

    fn permissions(&self, claim: &str) -> Result<Vec<String>, AuthError> {
        let list = match self.get(claim) {
            None => return Ok(Vec::new()),
            Some(Value::String(text)) => {
                let names = text.split(' ').filter(|name| !name.is_empty());
                return Ok(names.map(str::to_owned).collect());
            }
            Some(Value::Array(list)) => list,
            Some(_) => return Err(invalid(claim.to_owned(), PERMISSIONS_RULE)),
        };
        let name = |value: &Value| value.as_str().map(str::to_owned);
        let names: Option<Vec<_>> = list.iter().map(name).collect();
        names.ok_or_else(|| invalid(claim.to_owned(), PERMISSIONS_RULE))
    }
}

const PERMISSIONS_RULE: &str = "must be an array of strings, or a space-separated string";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules() -> TokenRules {
        let (issuers, audiences) = (vec!["i".into()], vec!["a".into()]);
        TokenRules { issuers, audiences, ..TokenRules::default() }
    }

    fn check(
        rules: &TokenRules,
        change: impl FnOnce(&mut Value),
    ) -> Result<AcceptedClaims, AuthError> {
        let mut claims = json!({"iss": "i", "aud": "a", "sub": "ann", "exp": 99});
        claims["tenant_id"] = "acme".into();
        change(&mut claims);
        let claims: Claims = serde_json::from_value(claims).unwrap();
        claims.check(rules, Timestamp::from_millis(10_000))
    }

    fn permissions(rules: &TokenRules, change: impl FnOnce(&mut Value)) -> Vec<String> {
        check(rules, change).unwrap().principal.permissions
    }

    #[test]
    fn claim_names_can_be_configured() {
        let named = |tenant: &str, permissions: &str| TokenRules {
            tenant_claim: tenant.into(),
            permissions_claim: permissions.into(),
            ..rules()
        };
        let with_url = named("https://example.com/tenant", "scope");
        let accepted = check(&with_url, |claims| {
            claims["https://example.com/tenant"] = "globex".into();
            claims["scope"] = "requests:read  worker:*".into();
        });
        let principal = accepted.unwrap().principal;
        assert_eq!(principal.tenant, "globex");
        assert_eq!(principal.permissions, ["requests:read", "worker:*"]);
        let nested = named("organization.id", "realm_access.roles");
        let accepted = check(&nested, |claims| {
            claims["organization"] = json!({"id": "initech"});
            claims["realm_access"] = json!({"roles": ["requests:write"]});
        });
        let principal = accepted.unwrap().principal;
        assert_eq!((&*principal.tenant, &*principal.permissions[0]), ("initech", "requests:write"));
        let missing = check(&nested, |_| {}).unwrap_err();
        assert_eq!(missing.to_string(), "claim organization.id is required");
    }

    #[test]
    fn permissions_come_only_from_the_configured_claim() {
        assert!(permissions(&rules(), |_| {}).is_empty());
        let scope = permissions(&rules(), |claims| claims["scope"] = "*".into());
        assert!(scope.is_empty(), "the claim is not configured");
        for wrong in [json!(5), json!([1]), json!(null), json!({"a": "b"}), json!([["x"]])] {
            let result = check(&rules(), |claims| claims["permissions"] = wrong.clone());
            assert!(matches!(result, Err(AuthError::Claim { .. })), "{wrong}: {result:?}");
        }
    }

    #[test]
    fn tenants_can_be_restricted_and_none_is_a_wildcard() {
        let listed = TokenRules { tenants: vec!["acme".into(), "*".into()], ..rules() };
        assert!(check(&listed, |_| {}).is_ok());
        for (rules, tenant) in [(&listed, "globex"), (&listed, "*"), (&rules(), "*")] {
            let result = check(rules, |claims| claims["tenant_id"] = tenant.into());
            assert!(matches!(result, Err(AuthError::Claim { .. })), "{tenant}: {result:?}");
        }
    }

    #[test]
    fn a_token_that_is_issued_in_the_future_is_rejected() {
        assert!(check(&rules(), |claims| claims["iat"] = 10.into()).is_ok());
        let error = check(&rules(), |claims| claims["iat"] = json!(10.5)).unwrap_err();
        assert_eq!(error.to_string(), "claim iat is in the future");
        let tolerant = TokenRules { leeway: Duration::from_secs(1), ..rules() };
        assert!(check(&tolerant, |claims| claims["iat"] = json!(10.5)).is_ok());
        assert!(check(&rules(), |claims| claims["iat"] = "10".into()).is_err());
    }

    #[test]
    fn duplicate_claims_are_rejected() {
        let twice = r#"{"sub": "ann", "sub": "bob"}"#;
        let error = serde_json::from_str::<Claims>(twice).err().unwrap();
        assert!(error.to_string().contains("\"sub\" occurs twice"), "{error}");
        assert!(serde_json::from_str::<Claims>("[]").is_err());
    }
}
