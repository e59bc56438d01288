//! Token of a command that calls a server.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use streamer_auth::{DevKey, NewToken, permissions};
use streamer_client::{Api, TokenError, TokenFile, TokenSource};
use streamer_core::{Clock, SystemClock, is_loopback_host};

use crate::arguments::CommonArguments;

/// Lifetime of the tokens that commands sign with the development key. Commands renew them; a short lifetime limits the
/// use of a token that a different program on the port of a stopped server received.
const DEV_TOKEN_LIFETIME: Duration = Duration::from_secs(3600);

/// Token source of a command.
#[derive(Clone, Debug)]
pub(crate) enum CommandTokenSource {
    /// A fixed token; an empty one is not sent.
    Fixed(String),
    /// A file that is read for each token.
    File(TokenFile),
    /// The development key in the given data folder, if it exists. The tokens have the given permission.
    DevKey(PathBuf, &'static str),
}

#[async_trait]
impl TokenSource for CommandTokenSource {
    async fn token(&self) -> Result<String, TokenError> {
        match self {
            Self::Fixed(token) => Ok(token.clone()),
            Self::File(file) => file.token().await,
            Self::DevKey(data, permission) => Ok(dev_token(data, permission)),
        }
    }

    fn is_fixed(&self) -> bool {
        matches!(self, Self::Fixed(_))
    }
}

impl CommonArguments {
    /// Returns the token source: the token or token file from the arguments, or the development key of a server
    /// on this machine.
    #[must_use]
    pub(crate) fn tokens(&self) -> CommandTokenSource {
        self.tokens_with("*")
    }

    /// Like [`Self::tokens`]; tokens that are signed with the development key have the given permission.
    fn tokens_with(&self, permission: &'static str) -> CommandTokenSource {
        match (&self.token, &self.token_file) {
            (Some(token), _) => CommandTokenSource::Fixed(token.clone()),
            (None, Some(path)) => CommandTokenSource::File(TokenFile(path.clone())),
            (None, None) if is_local(&self.server) => {
                CommandTokenSource::DevKey(self.data.clone(), permission)
            }
            (None, None) => CommandTokenSource::Fixed(String::new()),
        }
    }

    pub(crate) async fn api(&self) -> anyhow::Result<Api> {
        Ok(Api::with_tokens(&self.server, Arc::new(self.tokens())).await?)
    }

    /// Like [`Self::api`], for calls that require permission `operator`, which `*` does not include.
    pub(crate) async fn operator_api(&self) -> anyhow::Result<Api> {
        let tokens = self.tokens_with(permissions::OPERATOR);
        Ok(Api::with_tokens(&self.server, Arc::new(tokens)).await?)
    }
}

fn dev_token(data: &Path, permission: &str) -> String {
    let token = NewToken {
        user: "dev".into(),
        tenant: "dev".into(),
        permissions: vec![permission.into()],
        expires_in: DEV_TOKEN_LIFETIME,
    };
    // Without a key, no token is sent, and the server responds that a token is required.
    let signed = DevKey::load(data).and_then(|key| key.sign(&token, SystemClock.now()));
    signed.unwrap_or_default()
}

/// Returns whether the host of a URL is a loopback host.
fn is_local(url: &str) -> bool {
    let uri = url.parse::<http::Uri>().ok();
    uri.as_ref().and_then(http::Uri::host).is_some_and(is_loopback_host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_hosts_are_local() {
        for host in ["localhost", "127.0.0.1", "127.19.28.3", "[::1]"] {
            assert!(is_local(&format!("http://{host}:8080")), "{host}");
        }
        for host in ["localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "[::2]"] {
            assert!(!is_local(&format!("http://{host}:8080")), "{host}");
        }
        assert!(!is_local("no URL"));
    }
}
