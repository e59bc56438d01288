//! Arguments that commands have in common.

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    time::Duration,
};

use clap::Args;

/// Arguments for the server and the credentials.
#[derive(Args, Clone, Debug)]
pub(crate) struct CommonArguments {
    /// URL of the server.
    #[arg(
        long,
        env = "STREAMER_SERVER",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    pub(crate) server: String,
    /// Token of the caller. By default, a token for a server on this machine is signed with the
    /// development key in the data folder.
    #[arg(long, env = "STREAMER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) token: Option<String>,
    /// File that contains the token; read for each connection and when the token expires.
    #[arg(long, env = "STREAMER_TOKEN_FILE", value_name = "FILE", conflicts_with = "token")]
    pub(crate) token_file: Option<PathBuf>,
    /// Data folder of the server, which contains the development key.
    #[arg(long, env = "STREAMER_DATA", default_value = "./streamer-data", value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// Print one JSON object per line, even on a terminal.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Sources of the configuration.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ConfigSources {
    /// Configuration file [default: streamer.toml, if it exists].
    #[arg(long, env = "STREAMER_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Set a configuration option; may be repeated.
    #[arg(long = "set", value_name = "SECTION.OPTION=VALUE")]
    pub(crate) set: Vec<String>,
}

impl CommonArguments {
    /// Returns whether to print JSON: if requested, or if standard output is not a terminal.
    pub(crate) fn prints_json(&self) -> bool {
        self.json || !io::stdout().is_terminal()
    }
}

/// Parses a duration as a number and a unit: `90s`, `15m`, `1h`, `7d`; a number without a unit is in seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let number: u64 = number.parse().map_err(|_| "must begin with a number".to_owned())?;
    let seconds = match unit {
        "s" => Some(number),
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3600),
        "d" => number.checked_mul(86_400),
        _ => return Err("must end in s, m, h or d".into()),
    };
    match seconds {
        Some(seconds) if (1..=10 * 366 * 86_400).contains(&seconds) => {
            Ok(Duration::from_secs(seconds))
        }
        _ => Err("must be 1 second to 10 years".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        for bad in ["", "h", "1w", "0", "-1h", "99999999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
