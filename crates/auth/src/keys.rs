//! Keys that verify tokens.

use std::{fs, path::Path};

use jsonwebtoken::{Algorithm, DecodingKey};

use crate::warn_if_readable_by_others;

/// Reason why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read key file {path}: {reason}")]
    Unreadable {
        /// Path of the file.
        path: String,
        /// Error of the operating system.
        reason: String,
    },
    /// The data is not a key of the configured algorithm.
    #[error("{path} is not a {algorithm} key: {reason}")]
    Malformed {
        /// Origin of the key.
        path: String,
        /// Configured algorithm.
        algorithm: String,
        /// Reason.
        reason: String,
    },
    /// The algorithm is not supported.
    #[error("algorithm {0} is not supported: use RS256, ES256, EdDSA or HS256")]
    Algorithm(String),
}

/// Key, with the only algorithm that it is used with.
#[derive(Clone)]
pub struct VerificationKey {
    pub(crate) id: Option<String>,
    pub(crate) algorithm: Algorithm,
    pub(crate) key: DecodingKey,
}

impl VerificationKey {
    /// Reads a public key from a PEM file (RS256, ES256, EdDSA), or a shared secret from a file of at
    /// least 32 bytes (HS256; trailing white space is dropped).
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or does not contain such a key.
    pub fn from_file(algorithm: &str, path: &Path) -> Result<Self, KeyError> {
        let shown = path.display().to_string();
        if algorithm == "HS256" {
            warn_if_readable_by_others(path);
        }
        let bytes = fs::read(path).map_err(|error| KeyError::Unreadable {
            path: shown.clone(),
            reason: error.to_string(),
        })?;
        Self::from_bytes(algorithm, &bytes, &shown)
    }

    /// Parses a key in the same way as [`Self::from_file`]. Errors contain `origin`, the source of the key.
    ///
    /// # Errors
    /// Returns an error if the bytes are not such a key.
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
                    // If the secret were a public key, anyone with that key could sign tokens.
                    return Err(malformed(
                        "the file contains a PEM key; set the algorithm of that key".into(),
                    ));
                }
                if secret.len() < 32 {
                    // RFC 7518 section 3.2: the key must be at least as large as the hash.
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
    fn a_public_key_is_rejected_as_a_shared_secret() {
        let pem = "\n-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n";
        let error = VerificationKey::from_bytes("HS256", pem.as_bytes(), "file").err().unwrap();
        assert!(error.to_string().contains("PEM"), "{error}");
    }
}
