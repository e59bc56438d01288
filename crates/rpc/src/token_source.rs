//! Sources of the tokens of clients and workers.

use std::path::PathBuf;

use async_trait::async_trait;

/// No token is available.
#[derive(Debug, thiserror::Error)]
#[error("no token available: {0}")]
pub struct TokenError(
    /// Reason.
    pub String,
);

/// Source of tokens: a `String` or `&str` for a fixed token, a custom implementation for one that is
/// renewed.
#[async_trait]
pub trait TokenSource: Send + Sync + 'static {
    /// Returns a currently valid token. Called for each connection, and again when the token in use has expired
    /// or is about to expire.
    ///
    /// # Errors
    /// Returns an error if no token is available; when connecting, this ends the client or worker.
    async fn token(&self) -> Result<String, TokenError>;

    /// Returns whether the token is always the same: a worker then releases its running attempts before
    /// the token expires, and exits.
    fn is_fixed(&self) -> bool {
        false
    }
}

#[async_trait]
impl TokenSource for String {
    async fn token(&self) -> Result<String, TokenError> {
        Ok(self.clone())
    }

    fn is_fixed(&self) -> bool {
        true
    }
}

#[async_trait]
impl TokenSource for &'static str {
    async fn token(&self) -> Result<String, TokenError> {
        Ok((*self).to_owned())
    }

    fn is_fixed(&self) -> bool {
        true
    }
}

/// Reads the token from a file each time: for a token that is renewed by a different process, such as a
/// sidecar, or a mounted secret.
#[derive(Clone, Debug)]
pub struct TokenFile(pub PathBuf);

#[async_trait]
impl TokenSource for TokenFile {
    async fn token(&self) -> Result<String, TokenError> {
        let Self(path) = self;
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) => Err(TokenError(format!("{}: {error}", path.display()))),
        }
    }
}
