//! Where a worker's tokens come from.

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
    /// A token that is valid now. Asked for at each connection and a while before one expires.
    ///
    /// # Errors
    /// When there is none; at a connection this ends the worker.
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
