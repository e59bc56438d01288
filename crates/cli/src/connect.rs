//! Who a command is, and how it prints.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use streamer_auth::{DevKey, NewToken};
use streamer_client::{Api, TokenError, TokenFile, TokenSource};
use streamer_core::{Clock, SystemClock, is_loopback_host};

use crate::arguments::Common;

/// Tokens that commands make for themselves are valid for so long.
const OWN_TOKEN: Duration = Duration::from_secs(24 * 3600);

/// Tokens of a command.
#[derive(Clone, Debug)]
pub enum Tokens {
    /// As it was given; none if it is empty.
    Given(String),
    /// What stands in this file when it is asked for.
    File(TokenFile),
    /// Made with the development key in this data folder, if there is one.
    Own(PathBuf),
}

#[async_trait]
impl TokenSource for Tokens {
    async fn token(&self) -> Result<String, TokenError> {
        match self {
            Self::Given(token) => Ok(token.clone()),
            Self::File(file) => file.token().await,
            Self::Own(data) => Ok(own_token(data)),
        }
    }

    fn is_fixed(&self) -> bool {
        matches!(self, Self::Given(_))
    }
}

impl Common {
    /// Where the tokens come from: as it was given, or the development key of a server on this machine.
    #[must_use]
    pub fn tokens(&self) -> Tokens {
        match (&self.token, &self.token_file) {
            (Some(token), _) => Tokens::Given(token.clone()),
            (None, Some(path)) => Tokens::File(TokenFile(path.clone())),
            (None, None) if is_on_this_machine(&self.server) => Tokens::Own(self.data.clone()),
            (None, None) => Tokens::Given(String::new()),
        }
    }

    pub(crate) async fn api(&self) -> anyhow::Result<Api> {
        Ok(Api::with_tokens(&self.server, Arc::new(self.tokens())).await?)
    }

    /// Whether a program reads what is printed.
    pub(crate) fn prints_json(&self) -> bool {
        self.json || !std::io::stdout().is_terminal()
    }
}

fn own_token(data: &Path) -> String {
    let token = NewToken {
        user: "dev".into(),
        tenant: "dev".into(),
        permissions: vec!["*".into()],
        expires_in: OWN_TOKEN,
    };
    // Without a key the server says that a token is required.
    let signed = DevKey::load(data).and_then(|key| key.sign(&token, SystemClock.now()));
    signed.unwrap_or_default()
}

/// Returns whether the host of a URL is this machine.
fn is_on_this_machine(url: &str) -> bool {
    let uri = url.parse::<http::Uri>().ok();
    uri.as_ref().and_then(http::Uri::host).is_some_and(is_loopback_host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_hosts_are_on_this_machine() {
        for host in ["localhost", "127.0.0.1", "127.19.28.3", "[::1]"] {
            assert!(is_on_this_machine(&format!("http://{host}:8080")), "{host}");
        }
        for host in ["localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "[::2]"] {
            assert!(!is_on_this_machine(&format!("http://{host}:8080")), "{host}");
        }
        assert!(!is_on_this_machine("no URL"));
    }
}
