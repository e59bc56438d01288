//! Where the tokens of clients and workers come from.

use std::path::PathBuf;

use async_trait::async_trait;

/// A token cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("no token for the server: {0}")]
pub struct TokenError(
    /// Why.
    pub String,
);

/// Gives tokens: a `String` or `&str` for one that lasts, an implementation of your own for one that
/// is renewed.
#[async_trait]
pub trait TokenSource: Send + Sync + 'static {
    /// A token that is valid now. Asked for at each connection, and again when, or a while before, the one
    /// in use expires.
    ///
    /// # Errors
    /// When there is none; at a connection this ends the client or worker.
    async fn token(&self) -> Result<String, TokenError>;

    /// Whether it always gives the same one: a worker then hands back what it runs before that one
    /// expires, and ends.
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

/// Reads the token from a file each time: for one that is kept fresh by others, such as a sidecar or a
/// mounted secret.
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
