//! Configuration of every Streamer process.
//!
//! Binaries read the configuration once, at start, from the following sources, in which later sources override
//! earlier ones: defaults, `streamer.toml`, environment (`OTEL_*` for section `trace`, then
//! `STREAMER_<SECTION>_<OPTION>`), flags. All invalid values are reported together. The committed
//! `streamer.toml` lists every option with its default and is the documentation; a test compares it with
//! the code.
#![allow(rustdoc::bare_urls, reason = "descriptions of options are also the text of the file")]

mod opentelemetry;
mod options;
mod setting;
mod tenant_overrides;
mod tenants;
mod validation;

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

pub use options::{
    Auth, Cloudwatch, Config, Dynamodb, Execution, Gateway, Limits, Log, Peers, Server, Store,
    Trace,
};
pub use setting::{ByteSize, LogFormat, StoreEngine};
pub use tenant_overrides::TenantOverrides;

/// Sources of options, other than the defaults.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Configuration file; `None` for `streamer.toml` in the working folder, if it exists.
    pub file: Option<PathBuf>,
    /// Environment variables.
    pub environment: Vec<(String, String)>,
    /// Options set by flags, as `section.option` and value.
    pub flags: Vec<(String, String)>,
}

impl Sources {
    /// Returns the path of the configuration file; `None` if there is none.
    #[must_use]
    pub fn existing_file(&self) -> Option<&Path> {
        let default = Path::new(DEFAULT_FILE);
        self.file.as_deref().or_else(|| default.exists().then_some(default))
    }

    /// Returns the names of the environment variables that set options.
    #[must_use]
    pub fn variables(&self) -> Vec<&str> {
        let variables = self.environment.iter();
        let options = variables.filter(|(name, value)| option_of_variable(name, value).is_some());
        options.map(|(name, _)| name.as_str()).collect()
    }
}

/// All errors in a configuration.
#[derive(Debug, thiserror::Error)]
pub struct ConfigError {
    problems: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the configuration has {} error(s):", self.problems.len())?;
        self.problems.iter().try_for_each(|problem| write!(formatter, "\n  {problem}"))
    }
}

/// Name of the configuration file that is read from the working folder, if it exists and no file is specified.
pub const DEFAULT_FILE: &str = "streamer.toml";
const PREFIX: &str = "STREAMER_";
/// Environment variables of the command line, which are not configuration options.
const CLI_VARIABLES: [&str; 6] = [
    "STREAMER_CONFIG",
    "STREAMER_DATA",
    "STREAMER_SERVER",
    "STREAMER_SLOTS",
    "STREAMER_TOKEN",
    "STREAMER_TOKEN_FILE",
];

impl Config {
    /// Reads the configuration from its sources.
    ///
    /// # Errors
    /// Returns an error that lists all invalid options.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        let mut problems = Vec::new();
        read_file(&mut config, sources.file.as_deref(), &mut problems);
        opentelemetry::read(&mut config, &sources.environment, &mut problems);
        for (name, value) in &sources.environment {
            read_variable(&mut config, name, value, &mut problems);
        }
        for (name, value) in &sources.flags {
            let Some((section, option)) = name.split_once('.') else {
                problems.push(format!("--set {name}: must be section.option=value"));
                continue;
            };
            if let Err(problem) = config.set_text(section, option, value) {
                problems.push(format!("--set {name}: {problem}"));
            }
        }
        config.validate(&mut problems);
        if problems.is_empty() { Ok(config) } else { Err(ConfigError { problems }) }
    }
}

impl Trace {
    /// Reads the standard OpenTelemetry variables, for a process without a configuration file.
    ///
    /// # Errors
    /// Returns an error that lists all invalid variables.
    pub fn from_environment(environment: &[(String, String)]) -> Result<Self, ConfigError> {
        let mut config = Config::default();
        let mut problems = Vec::new();
        opentelemetry::read(&mut config, environment, &mut problems);
        config.trace.check(&mut problems);
        if problems.is_empty() { Ok(config.trace) } else { Err(ConfigError { problems }) }
    }
}

fn read_file(config: &mut Config, file: Option<&Path>, problems: &mut Vec<String>) {
    let path = file.unwrap_or(Path::new(DEFAULT_FILE));
    let shown = path.display();
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if file.is_none() && error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return problems.push(format!("{shown}: {error}")),
    };
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => return problems.push(format!("{shown}: {error}")),
    };
    for (section, options) in table {
        let toml::Value::Table(options) = options else {
            problems.push(format!("{shown}: {section}: must be a section, [{section}]"));
            continue;
        };
        if section == tenant_overrides::SECTION {
            config.tenants.read(options, &shown.to_string(), problems);
            continue;
        }
        for (option, value) in options {
            if let Err(problem) = config.set_toml(&section, &option, &value) {
                problems.push(format!("{shown}: {section}.{option}: {problem}"));
            }
        }
    }
}

/// Returns the option that an environment variable sets, as `section_option`; `None` if it sets none.
fn option_of_variable(name: &str, value: &str) -> Option<String> {
    let rest = name.strip_prefix(PREFIX)?;
    if CLI_VARIABLES.contains(&name) {
        return None;
    }
    let rest = rest.to_lowercase();
    // Kubernetes sets such variables in the pods of a namespace for each service whose name starts with `streamer`.
    let is_address = ["tcp://", "udp://", "sctp://"].iter().any(|kind| value.starts_with(kind));
    let is_from_kubernetes = ((rest == "port" || rest.ends_with("_port")) && is_address)
        || rest.starts_with("port_")
        || rest.starts_with("service_")
        || ["_port_", "_service_host", "_service_port"].iter().any(|part| rest.contains(part));
    (!is_from_kubernetes).then_some(rest)
}

fn read_variable(config: &mut Config, name: &str, value: &str, problems: &mut Vec<String>) {
    let Some(rest) = option_of_variable(name, value) else { return };
    let outcome = match rest.split_once('_') {
        None if rest == "log" => config.set_text("log", "filter", value),
        None => Err("unknown option".to_owned()),
        Some((section, option)) => config.set_text(section, option, value),
    };
    if let Err(problem) = outcome {
        problems.push(format!("environment variable {name}: {problem}"));
    }
}

#[cfg(test)]
mod tests;
