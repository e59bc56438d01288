//! Keys that tokens are verified with.

use std::{fs, path::Path};

use jsonwebtoken::{Algorithm, DecodingKey};

use crate::warn_if_others_can_read;

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read key file {path}: {reason}")]
    Unreadable {
        /// Which.
        path: String,
        /// What the operating system said.
        reason: String,
    },
    /// It is not a key of this algorithm.
    #[error("{path} is not a {algorithm} key: {reason}")]
    Malformed {
        /// Where it came from.
        path: String,
        /// As configured.
        algorithm: String,
        /// What is wrong.
        reason: String,
    },
    /// The algorithm is not supported.
    #[error("algorithm {0} is not supported: use RS256, ES256, EdDSA or HS256")]
    Algorithm(String),
}

/// A key and the one algorithm it is used with.
#[derive(Clone)]
pub struct VerificationKey {
    pub(crate) id: Option<String>,
    pub(crate) algorithm: Algorithm,
    pub(crate) key: DecodingKey,
}

impl VerificationKey {
    /// A public key from a PEM file (RS256, ES256, EdDSA), or a shared secret from a file of at
    /// least 32 bytes (HS256; trailing line ends are dropped).
    ///
    /// # Errors
    /// When the file cannot be read or holds no such key.
    pub fn from_file(algorithm: &str, path: &Path) -> Result<Self, KeyError> {
        let shown = path.display().to_string();
        if algorithm == "HS256" {
            warn_if_others_can_read(path);
        }
        let bytes = fs::read(path).map_err(|error| KeyError::Unreadable {
            path: shown.clone(),
            reason: error.to_string(),
        })?;
        Self::from_bytes(algorithm, &bytes, &shown)
    }

    /// As [`Self::from_file`], from bytes that came from `origin`.
    ///
    /// # Errors
    /// When they hold no such key.
    pub fn from_bytes(algorithm: &str, bytes: &[u8], origin: &str) -> Result<Self, KeyError> {
        let malformed = |reason: String| KeyError::Malformed {
            path: origin.to_owned(),
            algorithm: algorithm.to_owned(),
            reason,
        };
        let (parsed, key) = match algorithm {
            "RS256" => (Algorithm::RS256, DecodingKey::from_rsa_pem(bytes)),
            "ES256" => (Algorithm::ES256, DecodingKey::from_ec_pem(bytes)),
            "EdDSA" => (Algorithm::EdDSA, DecodingKey::from_ed_pem(bytes)),
            "HS256" => {
                let secret = bytes.trim_ascii_end();
                if secret.trim_ascii_start().starts_with(b"-----BEGIN") {
                    // With a public key as the secret, everybody could sign.
                    return Err(malformed("it holds a PEM key; name the key's algorithm".into()));
                }
                if secret.len() < 32 {
                    // RFC 7518 section 3.2: a key of the size of the hash or larger.
                    return Err(malformed("the secret must have at least 32 bytes".into()));
                }
                (Algorithm::HS256, Ok(DecodingKey::from_secret(secret)))
            }
            other => return Err(KeyError::Algorithm(other.to_owned())),
        };
        let key = key.map_err(|error| malformed(error.to_string()))?;
        Ok(Self { id: None, algorithm: parsed, key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_key_is_no_shared_secret() {
        let pem = "\n-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n";
        let refused = VerificationKey::from_bytes("HS256", pem.as_bytes(), "file").err().unwrap();
        assert!(refused.to_string().contains("PEM"), "{refused}");
    }
}
