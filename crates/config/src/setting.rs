//! Types of option values.

use std::{net::SocketAddr, path::PathBuf};

/// Type of an option value.
pub(crate) trait Setting: Sized {
    /// Converts a value from the configuration file.
    fn from_toml(value: &toml::Value) -> Result<Self, String>;
    /// Parses the text of an environment variable or a flag.
    fn from_text(text: &str) -> Result<Self, String>;
    /// Formats the value for the configuration file.
    fn to_toml(&self) -> String;
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
