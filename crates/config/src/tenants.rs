//! Reads and applies section `tenants`: limits of individual tenants.

use crate::{
    ByteSize, Config, Limits,
    setting::Setting,
    tenant_overrides::{SECTION, TenantOverrides},
};

/// Suffixes of the options of section `limits` that can be set for individual tenants.
const SUFFIXES: [&str; 2] = ["_per_tenant", "_per_user"];

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
}

fn parse(option: &str, value: &toml::Value) -> Result<u64, String> {
    if !SUFFIXES.iter().any(|suffix| option.ends_with(suffix)) {
        return Err("cannot be set for a tenant".into());
    }
    Config::default().set_toml("limits", option, value)?;
    ByteSize::from_toml(value).map(|value| value.0)
}
