//! Section `tenants`: limits of individual tenants.

use std::collections::BTreeMap;

use crate::{ByteSize, Config, Limits, setting::Setting};

pub(crate) const SECTION: &str = "tenants";
/// Suffixes of the options of section `limits` that can be set for individual tenants.
const SUFFIXES: [&str; 2] = ["_per_tenant", "_per_user"];

/// Description of the section in the default file.
const EXAMPLE: &str = "
# Limits of individual tenants; they override the options of section limits whose names end in _per_tenant or
# _per_user. Both sections are reloaded on SIGHUP.
#[tenants.\"acme\"]
#queued_requests_per_tenant = 500000
";

/// Options of section `limits` that are overridden, by tenant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TenantOverrides(BTreeMap<String, BTreeMap<String, u64>>);

impl TenantOverrides {
    /// Reads the section, which contains one table for each tenant.
    pub(crate) fn read(&mut self, section: toml::Table, file: &str, problems: &mut Vec<String>) {
        for (tenant, options) in section {
            let toml::Value::Table(options) = options else {
                problems.push(format!(
                    "{file}: {SECTION}.{tenant}: must be a section, [{SECTION}.\"NAME\"]"
                ));
                continue;
            };
            let limits = self.0.entry(tenant.clone()).or_default();
            for (option, value) in options {
                match parse(&option, &value) {
                    Ok(value) => {
                        limits.insert(option, value);
                    }
                    Err(problem) => {
                        problems.push(format!("{file}: {SECTION}.{tenant}.{option}: {problem}"));
                    }
                }
            }
        }
    }

    /// Returns the tenants that override the given option, with their values.
    pub(crate) fn values(&self, option: &str) -> impl Iterator<Item = (&str, u64)> {
        self.0
            .iter()
            .filter_map(move |(tenant, limits)| Some((tenant.as_str(), *limits.get(option)?)))
    }

    /// Returns the number of tenants with overrides.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether no tenant has overrides.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns each tenant with its limits; limits without an override are taken from `common`.
    pub fn limits(&self, common: &Limits) -> impl Iterator<Item = (&str, Limits)> {
        self.0.iter().map(move |(tenant, options)| {
            let mut config = Config { limits: common.clone(), ..Config::default() };
            for (option, value) in options {
                // The values were validated when they were read.
                let set = config.set_text("limits", option, &value.to_string());
                debug_assert_eq!(set, Ok(()));
            }
            (tenant.as_str(), config.limits)
        })
    }

    pub(crate) fn write_toml(&self, text: &mut String) {
        text.push_str(EXAMPLE);
        for (tenant, options) in &self.0 {
            text.push_str(&format!("\n[{SECTION}.{}]\n", Setting::to_toml(tenant)));
            for (option, value) in options {
                text.push_str(&format!("{option} = {value}\n"));
            }
        }
    }
}

fn parse(option: &str, value: &toml::Value) -> Result<u64, String> {
    if !SUFFIXES.iter().any(|suffix| option.ends_with(suffix)) {
        return Err("cannot be set for a tenant".into());
    }
    Config::default().set_toml("limits", option, value)?;
    ByteSize::from_toml(value).map(|value| value.0)
}
