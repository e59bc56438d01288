//! Limits of individual tenants, as configured. `tenants.rs` reads them.

use std::collections::BTreeMap;

use crate::setting::Setting;

/// Name of the section.
pub(crate) const SECTION: &str = "tenants";
/// Description of the section in the default file.
const EXAMPLE: &str = "
# Limits of individual tenants; they override the options of section limits whose names end in _per_tenant or
# _per_user. Both sections are reloaded on SIGHUP.
#[tenants.\"acme\"]
#queued_requests_per_tenant = 500000
";

/// Options of section `limits` that are overridden, by tenant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TenantOverrides(pub(crate) BTreeMap<String, BTreeMap<String, u64>>);

impl TenantOverrides {
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
