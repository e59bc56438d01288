//! Who a command is, and how it prints.

use std::{
    io::{IsTerminal, Write},
    time::Duration,
};

use streamer_auth::{DevKey, NewToken};
use streamer_client::Api;
use streamer_core::{Clock, SystemClock, is_loopback_host};

use crate::arguments::Common;

/// Tokens that commands make for themselves are valid for so long.
const OWN_TOKEN: Duration = Duration::from_secs(24 * 3600);

impl Common {
    /// The token that was given, or one made with the development key of a server on this machine.
    #[must_use]
    pub fn find_token(&self) -> String {
        if let Some(token) = &self.token {
            return token.clone();
        }
        if !is_on_this_machine(&self.server) {
            return String::new();
        }
        let token = NewToken {
            user: "dev".into(),
            tenant: "dev".into(),
            permissions: vec!["*".into()],
            expires_in: OWN_TOKEN,
        };
        let signed = DevKey::load(&self.data).and_then(|key| key.sign(&token, SystemClock.now()));
        signed.unwrap_or_default()
    }

    pub(crate) fn api(&self) -> anyhow::Result<Api> {
        Ok(Api::new(&self.server, &self.find_token())?)
    }

    /// Whether a program reads what is printed.
    pub(crate) fn prints_json(&self) -> bool {
        self.json || !std::io::stdout().is_terminal()
    }
}

/// Returns whether the host of a URL is this machine.
fn is_on_this_machine(url: &str) -> bool {
    let uri = url.parse::<http::Uri>().ok();
    uri.as_ref().and_then(http::Uri::host).is_some_and(is_loopback_host)
}

/// Prints a line at once, so that a reader at the other end of a pipe sees it.
pub(crate) fn print_line(line: impl std::fmt::Display) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
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
