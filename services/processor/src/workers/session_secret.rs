//! Secret that binds attempts to a worker: to resume an attempt, a worker needs the secret from its first `welcome`,
//! and a token of the same tenant and user.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use streamer_core::hex;
use streamer_store::Owner;

/// Length of a secret, in bytes: equal to that of the stored hash.
pub(crate) const SECRET_BYTES: usize = 32;

/// Secret of one worker. `welcome` contains the secret, and the worker sends it on each later stream. Never stored or
/// logged.
pub(crate) struct SessionSecret([u8; SECRET_BYTES]);

impl SessionSecret {
    /// Generates a secret.
    ///
    /// # Errors
    /// Fails if the operating system does not return random bytes.
    pub(crate) fn generate() -> Result<Self, getrandom::Error> {
        let mut secret = [0; SECRET_BYTES];
        getrandom::fill(&mut secret)?;
        Ok(Self(secret))
    }

    /// Parses the secret that a worker sends; returns `None` if its length is wrong.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }

    /// Returns the identity of the worker, which leases store: the SHA-256 of the secret, the tenant and the user, in
    /// hexadecimal digits.
    pub(crate) fn identity(&self, principal: &Owner) -> String {
        let hash = Sha256::new_with_prefix(self.0)
            // Without the length, tenant `ab` with user `c` would equal tenant `a` with user `bc`.
            .chain_update((principal.tenant.len() as u64).to_be_bytes())
            .chain_update(&principal.tenant)
            .chain_update(&principal.user)
            .finalize();
        hex(&hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(tenant: &str, user: &str) -> Owner {
        Owner { tenant: tenant.into(), user: user.into() }
    }

    #[test]
    fn an_identity_depends_on_secret_tenant_and_user() {
        let secret = SessionSecret::from_bytes(&[7; SECRET_BYTES]).unwrap();
        let identity = secret.identity(&owner("ab", "c"));
        assert_eq!(identity.len(), 2 * SECRET_BYTES);
        let same = SessionSecret::from_bytes(&secret.to_bytes()).unwrap();
        assert_eq!(same.identity(&owner("ab", "c")), identity);
        for other in [owner("a", "bc"), owner("ab", "d"), owner("x", "c"), owner("abc", "")] {
            assert_ne!(secret.identity(&other), identity, "{other:?}");
        }
        let other = SessionSecret::generate().unwrap();
        assert_ne!(other.identity(&owner("ab", "c")), identity);
        assert!(SessionSecret::from_bytes(&[7; 31]).is_none());
    }
}
