//! Binds a worker's attempts to it: only who got the secret of its first `welcome`, and has a token of the
//! same tenant and user, can go on with them.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use streamer_store::Owner;

/// As long as the hash that is stored.
pub(crate) const SECRET_BYTES: usize = 32;

/// Sent to a worker once; the worker repeats it on each later stream. It is never stored
/// and never logged.
pub(crate) struct SessionSecret([u8; SECRET_BYTES]);

impl SessionSecret {
    /// A new one.
    ///
    /// # Errors
    /// When the operating system gives no random bytes.
    pub(crate) fn generate() -> Result<Self, getrandom::Error> {
        let mut secret = [0; SECRET_BYTES];
        getrandom::fill(&mut secret)?;
        Ok(Self(secret))
    }

    /// The one that a worker repeats; `None` when its length is wrong.
    pub(crate) fn repeated(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }

    /// What leases store: SHA-256 of the secret with tenant and user, in hexadecimal digits.
    pub(crate) fn identity(&self, principal: &Owner) -> String {
        let hash = Sha256::new_with_prefix(self.0)
            // Else tenant `ab` with user `c` would be tenant `a` with user `bc`.
            .chain_update((principal.tenant.len() as u64).to_be_bytes())
            .chain_update(&principal.tenant)
            .chain_update(&principal.user)
            .finalize();
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(tenant: &str, user: &str) -> Owner {
        Owner { tenant: tenant.into(), user: user.into() }
    }

    #[test]
    fn an_identity_needs_the_secret_the_tenant_and_the_user() {
        let secret = SessionSecret::repeated(&[7; SECRET_BYTES]).unwrap();
        let identity = secret.identity(&owner("ab", "c"));
        assert_eq!(identity.len(), 2 * SECRET_BYTES);
        let same = SessionSecret::repeated(&secret.to_bytes()).unwrap();
        assert_eq!(same.identity(&owner("ab", "c")), identity);
        for other in [owner("a", "bc"), owner("ab", "d"), owner("x", "c"), owner("abc", "")] {
            assert_ne!(secret.identity(&other), identity, "{other:?}");
        }
        let other = SessionSecret::generate().unwrap();
        assert_ne!(other.identity(&owner("ab", "c")), identity);
        assert!(SessionSecret::repeated(&[7; 31]).is_none());
    }
}
