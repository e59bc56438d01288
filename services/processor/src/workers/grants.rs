//! Actions that a token allows a worker to run.

use std::collections::{BTreeSet, HashMap};

use streamer_auth::Principal;

/// Actions and tenants that a token allows, from the permissions `worker:<action>` (for the token's own tenant),
/// `worker:<action>@<tenant>` and `worker:<action>@*`. The action `*` stands for every action.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Grants {
    every_action: Tenants,
    by_action: HashMap<String, Tenants>,
}

/// Tenants for which an action may be run. The wildcard has a separate field, so that a tenant named `*` is not a
/// wildcard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tenants {
    all: bool,
    named: BTreeSet<String>,
}

impl Tenants {
    fn contains(&self, tenant: &str) -> bool {
        self.all || self.named.contains(tenant)
    }

    fn is_empty(&self) -> bool {
        !self.all && self.named.is_empty()
    }
}

impl Grants {
    pub(crate) fn from_principal(principal: &Principal) -> Self {
        let mut grants = Self::default();
        for permission in &principal.permissions {
            // The permission `*` allows every action for the token's own tenant.
            let grant = match permission.as_str() {
                "*" => "*",
                other => match other.strip_prefix("worker:") {
                    Some(grant) => grant,
                    None => continue,
                },
            };
            // No action name contains `@`; a tenant's name may.
            let (action, tenant) = match grant.split_once('@') {
                Some((action, tenant)) => (action, Some(tenant)),
                None => (grant, None),
            };
            let tenants = match action {
                "*" => &mut grants.every_action,
                action => grants.by_action.entry(action.to_owned()).or_default(),
            };
            match tenant {
                Some("*") => tenants.all = true,
                // No tenant has an empty name.
                Some("") => {}
                Some(tenant) => drop(tenants.named.insert(tenant.to_owned())),
                None => drop(tenants.named.insert(principal.tenant.clone())),
            }
        }
        grants
    }

    fn tenants_of(&self, action: &str) -> impl Iterator<Item = &Tenants> {
        self.by_action.get(action).into_iter().chain([&self.every_action])
    }

    /// Returns whether the worker may run the given action for at least one tenant.
    pub(crate) fn allows_any_tenant(&self, action: &str) -> bool {
        self.tenants_of(action).any(|tenants| !tenants.is_empty())
    }

    /// Returns whether the worker may run the given action for every tenant.
    pub(crate) fn allows_all_tenants(&self, action: &str) -> bool {
        self.tenants_of(action).any(|tenants| tenants.all)
    }

    /// Returns the tenants for which the worker may run the given action; `None` for all tenants.
    pub(crate) fn tenants(&self, action: &str) -> Option<BTreeSet<&str>> {
        if self.allows_all_tenants(action) {
            return None;
        }
        let named = self.tenants_of(action).flat_map(|tenants| &tenants.named);
        Some(named.map(String::as_str).collect())
    }

    /// Returns whether the worker may run the given action for the given tenant.
    pub(crate) fn allows(&self, action: &str, tenant: &str) -> bool {
        self.tenants_of(action).any(|tenants| tenants.contains(tenant))
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::Timestamp;

    use super::*;

    fn grants_in(tenant: &str, permissions: &[&str]) -> Grants {
        Grants::from_principal(&Principal {
            tenant: tenant.into(),
            user: "worker".into(),
            permissions: permissions.iter().map(ToString::to_string).collect(),
            expires_at: Timestamp::default(),
        })
    }

    fn grants(permissions: &[&str]) -> Grants {
        grants_in("acme", permissions)
    }

    #[test]
    fn a_token_allows_named_actions_of_named_tenants_only() {
        let some = grants(&["worker:report", "worker:resize@other", "requests:read"]);
        assert!(some.allows("report", "acme") && !some.allows("report", "other"));
        assert!(some.allows("resize", "other") && !some.allows("resize", "acme"));
        assert!(!some.allows_any_tenant("echo") && !some.allows("echo", "acme"));
    }

    #[test]
    fn wildcards_allow_every_action_or_tenant() {
        assert!(grants(&["worker:*"]).allows("any", "acme"));
        assert!(!grants(&["worker:*"]).allows("any", "other"));
        assert!(grants(&["worker:*@*"]).allows("any", "other"));
        assert!(grants(&["worker:report@*"]).allows("report", "other"));
        assert!(grants(&["*"]).allows("any", "acme") && !grants(&["*"]).allows("any", "other"));
        assert!(!grants(&[]).allows_any_tenant("any"));
    }

    #[test]
    fn names_are_not_parsed_as_wildcards_or_separators() {
        let names = ["*", "*@*", "acme", "acme@other", "@", "worker:*", "worker:x@*", ":", "a b"];
        for own in names {
            for permissions in [&["worker:*"][..], &["*"], &["worker:report"]] {
                let grants = grants_in(own, permissions);
                assert_eq!(grants.tenants("report"), Some(BTreeSet::from([own])), "{own:?}");
                for tenant in names {
                    assert_eq!(
                        grants.allows("report", tenant),
                        own == tenant,
                        "{own:?} {tenant:?}"
                    );
                }
            }
            let named = format!("worker:report@{own}");
            let grants = grants(&[&named]);
            for tenant in names {
                let is_allowed = own == "*" || own == tenant;
                assert_eq!(grants.allows("report", tenant), is_allowed, "{named:?} {tenant:?}");
            }
        }
        let no_tenant = grants(&["worker:report@"]);
        assert!(!no_tenant.allows_any_tenant("report") && !no_tenant.allows("report", ""));
    }
}
