//! Types of option values.

use std::{cmp::Ordering, fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

/// Type of an option value.
pub(crate) trait Setting: Sized {
    /// Converts a value from the configuration file.
    fn from_toml(value: &toml::Value) -> Result<Self, String>;
    /// Parses the text of an environment variable or a flag.
    fn from_text(text: &str) -> Result<Self, String>;
    /// Formats the value for the configuration file.
    fn to_toml(&self) -> String;
}

/// Verifies that a value is in the range of its option. The bounds have the format of the configuration file.
pub(crate) fn check_range<T: Setting + PartialOrd>(
    value: &T,
    low: impl fmt::Display,
    high: impl fmt::Display,
) -> Result<(), String> {
    let bound = |text: String| T::from_text(&text).ok();
    let is_in_range = match (bound(low.to_string()), bound(high.to_string())) {
        (Some(low), Some(high)) => {
            value.partial_cmp(&low).is_some_and(Ordering::is_ge)
                && value.partial_cmp(&high).is_some_and(Ordering::is_le)
        }
        _ => false,
    };
    if is_in_range {
        return Ok(());
    }
    let text = value.to_toml();
    Err(format!("must be {low} to {high}, is {}", text.trim_matches('"')))
}

/// Number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const BYTE_UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl ByteSize {
    /// Returns a size of `number` KiB.
    #[must_use]
    pub const fn kib(number: u64) -> Self {
        Self(number << 10)
    }

    /// Returns a size of `number` MiB.
    #[must_use]
    pub const fn mib(number: u64) -> Self {
        Self(number << 20)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_multiple = |shift: u32| self.0 > 0 && self.0.is_multiple_of(1 << shift);
        match BYTE_UNITS.into_iter().find(|(_, shift)| is_multiple(*shift)) {
            Some((unit, shift)) => write!(formatter, "{}{unit}", self.0 >> shift),
            None => write!(formatter, "{}", self.0),
        }
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rule = || "must be a size in bytes, like 65536, 512KiB or 4MiB".to_owned();
        let (number, shift) = BYTE_UNITS
            .into_iter()
            .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)))
            .unwrap_or((text.strip_suffix('B').unwrap_or(text), 0));
        let number: u64 = number.trim_end().parse().map_err(|_| rule())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(rule)
    }
}

impl Setting for ByteSize {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        match value {
            toml::Value::Integer(_) => u64::from_toml(value).map(Self),
            toml::Value::String(text) => text.parse(),
            _ => Err("must be an integer or a size like \"4MiB\"".into()),
        }
    }

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse()
    }

    fn to_toml(&self) -> String {
        let is_plain = BYTE_UNITS.iter().all(|(unit, _)| !self.to_string().ends_with(unit));
        if is_plain { self.to_string() } else { self.to_string().to_toml() }
    }
}

const DURATION_UNITS: [&str; 7] = ["ms", "s", "m", "h", "d", "day", "days"];

impl Setting for Duration {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        let text = value.as_str().ok_or("must be a duration with its unit, like \"10s\"")?;
        Self::from_text(text)
    }

    fn from_text(text: &str) -> Result<Self, String> {
        // Humantime also accepts months and years, of which `M` is easily mistaken for minutes.
        let units = text.split(|c: char| !c.is_ascii_alphabetic()).filter(|unit| !unit.is_empty());
        if let Some(unit) = units.into_iter().find(|unit| !DURATION_UNITS.contains(unit)) {
            let known = DURATION_UNITS.join(", ");
            return Err(format!("must be a duration in {known}, has unit {unit:?}"));
        }
        let duration = humantime::parse_duration(text);
        let duration = duration.map_err(|error| {
            format!("must be a duration like 500ms, 10s or 1h 30m, is {text:?} ({error})")
        })?;
        Ok(duration)
    }

    fn to_toml(&self) -> String {
        humantime::format_duration(*self).to_string().to_toml()
    }
}

/// Declares an option type with named values.
macro_rules! named_values {
    ($(#[$attribute:meta])* $Type:ident { $($(#[doc = $doc:literal])+ $Variant:ident = $name:literal,)+ }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $Type {
            $($(#[doc = $doc])+ $Variant,)+
        }

        impl Setting for $Type {
            fn from_toml(value: &toml::Value) -> Result<Self, String> {
                Self::from_text(&String::from_toml(value)?)
            }

            fn from_text(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok(Self::$Variant),)+
                    _ => Err(format!("must be {}, is {text:?}", [$($name),+].join(" or "))),
                }
            }

            fn to_toml(&self) -> String {
                match self {
                    $(Self::$Variant => $name.to_owned().to_toml(),)+
                }
            }
        }
    };
}

named_values! {
    /// Where requests and their logs are stored.
    StoreEngine {
        /// One file in the data folder, for a single process.
        Sqlite = "sqlite",
        /// Tables of DynamoDB, for any number of processes.
        Dynamodb = "dynamodb",
    }
}

named_values! {
    /// Format of log lines.
    LogFormat {
        /// Text.
        Text = "text",
        /// One JSON object per line.
        Json = "json",
    }
}

impl Setting for u64 {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        let number = value.as_integer().ok_or("must be an integer")?;
        Self::try_from(number).map_err(|_| "must not be negative".into())
    }

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "must be a non-negative integer".into())
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for f64 {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        let whole = value.as_integer().and_then(|number| i32::try_from(number).ok());
        value.as_float().or(whole.map(Self::from)).ok_or_else(|| "must be a number".into())
    }

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "must be a number".into())
    }

    fn to_toml(&self) -> String {
        toml::Value::Float(*self).to_string()
    }
}

impl Setting for bool {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| "must be true or false".into())
    }

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "must be true or false".into())
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for String {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        value.as_str().map(str::to_owned).ok_or_else(|| "must be a string".into())
    }

    fn from_text(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }

    fn to_toml(&self) -> String {
        toml::Value::String(self.clone()).to_string()
    }
}

impl Setting for PathBuf {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        String::from_toml(value).map(Self::from)
    }

    fn from_text(text: &str) -> Result<Self, String> {
        Ok(text.into())
    }

    fn to_toml(&self) -> String {
        self.display().to_string().to_toml()
    }
}

impl Setting for SocketAddr {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        Self::from_text(&String::from_toml(value)?)
    }

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "must be an address and a port, like 127.0.0.1:8080".into())
    }

    fn to_toml(&self) -> String {
        self.to_string().to_toml()
    }
}

/// A comma-separated list in the environment and in flags.
impl Setting for Vec<String> {
    fn from_toml(value: &toml::Value) -> Result<Self, String> {
        let list = value.as_array().ok_or("must be a list of strings")?;
        list.iter().map(String::from_toml).collect()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        Ok(items.map(str::to_owned).collect())
    }

    fn to_toml(&self) -> String {
        let items: Vec<_> = self.iter().map(Setting::to_toml).collect();
        format!("[{}]", items.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed_and_formatted_exactly() {
        for (text, bytes, formatted) in [
            ("0", 0, "0"),
            ("1000", 1000, "1000"),
            ("8B", 8, "8"),
            ("8KiB", 8192, "\"8KiB\""),
            ("1024 MiB", 1 << 30, "\"1GiB\""),
            ("16TiB", 1 << 44, "\"16TiB\""),
        ] {
            let size = ByteSize::from_text(text).unwrap();
            assert_eq!((size.0, size.to_toml().as_str()), (bytes, formatted));
        }
        for text in ["", "MiB", "1.5MiB", "-1", "4 mb", "99999999999999TiB"] {
            let error = ByteSize::from_text(text).unwrap_err();
            assert_eq!(error, "must be a size in bytes, like 65536, 512KiB or 4MiB", "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        let parse = Duration::from_text;
        assert_eq!(parse("1h 30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse("250ms").map(|duration| duration.to_toml()), Ok("\"250ms\"".into()));
        for text in ["", "10", "10 parsecs", "6M", "1year", "99999999999999999999s"] {
            assert!(parse(text).unwrap_err().starts_with("must be a duration"), "{text}");
        }
        assert!(parse("1us").unwrap_err().contains("has unit \"us\""));
        let week = Duration::from_secs(7 * 24 * 3600);
        assert_eq!(parse(week.to_toml().trim_matches('"')), Ok(week));
        let integer = Duration::from_toml(&toml::Value::Integer(10));
        assert_eq!(integer, Err("must be a duration with its unit, like \"10s\"".into()));
    }

    #[test]
    fn values_outside_their_range_are_reported_as_written() {
        let error = check_range(&Duration::from_millis(10), "1s", "1h");
        assert_eq!(error, Err("must be 1s to 1h, is 10ms".into()));
        assert_eq!(check_range(&ByteSize::kib(2), "1KiB", "2KiB"), Ok(()));
        assert_eq!(check_range(&7, 1, 6), Err("must be 1 to 6, is 7".into()));
        assert!(check_range(&f64::NAN, 0.0, 1.0).is_err());
    }
}
