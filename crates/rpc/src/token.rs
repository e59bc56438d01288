//! Where the tokens of clients and workers come from.

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
}

#[async_trait]
impl TokenSource for String {
    async fn token(&self) -> Result<String, TokenError> {
        Ok(self.clone())
    }
}

#[async_trait]
impl TokenSource for &'static str {
    async fn token(&self) -> Result<String, TokenError> {
        Ok((*self).to_owned())
    }
}
