//! Development key: created at the first start, so that local development needs no token issuer.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use ed25519_dalek::{
    SigningKey,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, EncodePublicKey, spki::der::pem::LineEnding},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;
use streamer_core::Timestamp;

use crate::{KeyError, VerificationKey, create_private_file, warn_if_readable_by_others};

/// Claim `iss` of development tokens.
pub const DEV_ISSUER: &str = "streamer-dev";
/// Claim `aud` of development tokens.
pub const DEV_AUDIENCE: &str = "streamer";

const FILE: &str = "dev-key.pem";

/// Error of the development key.
#[derive(Debug, thiserror::Error)]
pub enum DevKeyError {
    /// The file cannot be read or written.
    #[error("cannot {doing} the development key {path}: {reason}")]
    File {
        /// Operation: `read` or `write`.
        doing: &'static str,
        /// Path of the file.
        path: String,
        /// Error of the operating system.
        reason: String,
    },
    /// The file does not contain an Ed25519 private key.
    #[error("{path} is not an Ed25519 private key in PKCS#8 PEM: {reason}")]
    Malformed {
        /// Path of the file.
        path: String,
        /// Reason.
        reason: String,
    },
    /// A token cannot be signed.
    #[error("cannot sign a token: {0}")]
    Sign(String),
}

/// Content of a token to sign.
#[derive(Clone, Debug)]
pub struct NewToken {
    /// Claim `sub`.
    pub user: String,
    /// Claim `tenant_id`.
    pub tenant: String,
    /// Claim `permissions`.
    pub permissions: Vec<String>,
    /// Validity period.
    pub expires_in: Duration,
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    aud: &'a str,
    sub: &'a str,
    tenant_id: &'a str,
    permissions: &'a [String],
    iat: i64,
    exp: i64,
}

/// An Ed25519 key pair in the data folder, readable by its owner only.
pub struct DevKey {
    private: EncodingKey,
    public_pem: String,
    path: PathBuf,
}

impl DevKey {
    /// Loads the key from the folder `data`, or creates a key if none exists.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or written, or does not contain a key.
    pub fn load_or_create(data: &Path) -> Result<Self, DevKeyError> {
        warn_if_readable_by_others(&data.join(FILE));
        match Self::load(data) {
            Err(DevKeyError::File { .. }) if !data.join(FILE).exists() => {
                create(data)?;
                Self::load(data)
            }
            loaded => loaded,
        }
    }

    /// Loads the key from the folder `data`.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or does not contain a key.
    pub fn load(data: &Path) -> Result<Self, DevKeyError> {
        let path = data.join(FILE);
        let shown = path.display().to_string();
        let pem = fs::read_to_string(&path).map_err(|error| DevKeyError::File {
            doing: "read",
            path: shown.clone(),
            reason: error.to_string(),
        })?;
        let malformed = |reason: String| DevKeyError::Malformed { path: shown.clone(), reason };
        let signing =
            SigningKey::from_pkcs8_pem(&pem).map_err(|error| malformed(error.to_string()))?;
        let public_pem = signing
            .verifying_key()
            .to_public_key_pem(LineEnding::LF)
            .map_err(|error| malformed(error.to_string()))?;
        let private = EncodingKey::from_ed_pem(pem.as_bytes())
            .map_err(|error| malformed(error.to_string()))?;
        Ok(Self { private, public_pem, path })
    }

    /// Returns the public key, which verifies tokens that this key signs.
    ///
    /// # Errors
    /// Returns an error if the public key cannot be parsed, which cannot happen for a loaded key.
    pub fn verification_key(&self) -> Result<VerificationKey, KeyError> {
        let origin = self.path.display().to_string();
        VerificationKey::from_bytes("EdDSA", self.public_pem.as_bytes(), &origin)
    }

    /// Signs a token.
    ///
    /// # Errors
    /// Returns an error if signing fails.
    pub fn sign(&self, token: &NewToken, now: Timestamp) -> Result<String, DevKeyError> {
        let claims = Claims {
            iss: DEV_ISSUER,
            aud: DEV_AUDIENCE,
            sub: &token.user,
            tenant_id: &token.tenant,
            permissions: &token.permissions,
            iat: now.as_millis() / 1000,
            exp: now.plus(token.expires_in).as_millis() / 1000,
        };
        jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &self.private)
            .map_err(|error| DevKeyError::Sign(error.to_string()))
    }
}

fn create(data: &Path) -> Result<(), DevKeyError> {
    let path = data.join(FILE);
    let failed = |reason: String| DevKeyError::File {
        doing: "write",
        path: path.display().to_string(),
        reason,
    };
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| failed(error.to_string()))?;
    let pem = SigningKey::from_bytes(&seed)
        .to_pkcs8_pem(LineEnding::LF)
        .map_err(|error| failed(error.to_string()))?;
    create_private_file(&path, pem.as_bytes()).map_err(|error| failed(error.to_string()))
}
