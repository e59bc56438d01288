//! Who a command is, and how it prints.

use std::{
    io::{IsTerminal, Write},
    net::IpAddr,
    time::Duration,
};

use streamer_auth::{DevKey, NewToken};
use streamer_client::Api;
use streamer_core::{Clock, SystemClock};

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
        if !self.is_local() {
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

    fn is_local(&self) -> bool {
        // The whole host: a token must not go to `localhost.example.com`.
        let uri = self.server.parse::<http::Uri>().ok();
        let host = uri.as_ref().and_then(http::Uri::host);
        host.is_some_and(|host| {
            let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
            host == "localhost" || address.is_ok_and(|address| address.is_loopback())
        })
    }

    pub(crate) fn api(&self) -> anyhow::Result<Api> {
        Ok(Api::new(&self.server, &self.find_token())?)
    }

    /// Whether a program reads what is printed.
    pub(crate) fn prints_json(&self) -> bool {
        self.json || !std::io::stdout().is_terminal()
    }
}

/// Prints a line at once, so that a reader at the other end of a pipe sees it.
pub(crate) fn print_line(line: impl std::fmt::Display) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
