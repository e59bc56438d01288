//! Command `streamer token`.

use std::time::Duration;

use streamer_auth::{DevKey, NewToken};
use streamer_core::{Clock, SystemClock};

use crate::{Exit, arguments::TokenArguments};

pub(crate) fn print(arguments: &TokenArguments) -> anyhow::Result<Exit> {
    let key = DevKey::load_or_create(&arguments.data)?;
    let permissions = arguments.permissions.iter().filter(|name| !name.is_empty()).cloned();
    let token = NewToken {
        user: arguments.user.clone(),
        tenant: arguments.tenant.clone(),
        permissions: permissions.collect(),
        expires_in: arguments.expires,
    };
    println!("{}", key.sign(&token, SystemClock.now())?);
    Ok(Exit::Done)
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
