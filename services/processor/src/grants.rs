//! What a token lets a worker run.

use std::collections::{BTreeSet, HashMap};

use streamer_auth::Principal;

/// Which actions of which tenants a token allows: permissions `worker:<action>` (of the token's own
/// tenant), `worker:<action>@<tenant>` and `worker:<action>@*`; `*` stands for every action.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Grants {
    every_action: Tenants,
    by_action: HashMap<String, Tenants>,
}

/// For whom an action may be run. A wildcard is not a name: no tenant can be called like it.
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
    pub(crate) fn of(principal: &Principal) -> Self {
        let mut grants = Self::default();
        for permission in &principal.permissions {
            // `*` is everything, in the token's own tenant.
            let grant = match permission.as_str() {
                "*" => "*",
                other => match other.strip_prefix("worker:") {
                    Some(grant) => grant,
                    None => continue,
                },
            };
            // No name of an action contains `@`; one of a tenant may.
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
                // There is no such tenant.
                Some("") => {}
                Some(tenant) => drop(tenants.named.insert(tenant.to_owned())),
                None => drop(tenants.named.insert(principal.tenant.clone())),
            }
        }
        grants
    }

    fn of_action(&self, action: &str) -> impl Iterator<Item = &Tenants> {
        self.by_action.get(action).into_iter().chain([&self.every_action])
    }

    /// Whether it may run this action for any tenant.
    pub(crate) fn names(&self, action: &str) -> bool {
        self.of_action(action).any(|tenants| !tenants.is_empty())
    }

    /// Whether it may run this action for every tenant.
    pub(crate) fn is_for_all(&self, action: &str) -> bool {
        self.of_action(action).any(|tenants| tenants.all)
    }

    /// For which tenants it may run this action; `None` for all of them.
    pub(crate) fn tenants(&self, action: &str) -> Option<BTreeSet<&str>> {
        if self.is_for_all(action) {
            return None;
        }
        let named = self.of_action(action).flat_map(|tenants| &tenants.named);
        Some(named.map(String::as_str).collect())
    }

    /// Whether it may run this action for this tenant.
    pub(crate) fn allow(&self, action: &str, tenant: &str) -> bool {
        self.of_action(action).any(|tenants| tenants.contains(tenant))
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::Timestamp;

    use super::*;

    fn grants_in(tenant: &str, permissions: &[&str]) -> Grants {
        Grants::of(&Principal {
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
        assert!(some.allow("report", "acme") && !some.allow("report", "other"));
        assert!(some.allow("resize", "other") && !some.allow("resize", "acme"));
        assert!(!some.names("echo") && !some.allow("echo", "acme"));
    }

    #[test]
    fn stars_stand_for_all() {
        assert!(grants(&["worker:*"]).allow("any", "acme"));
        assert!(!grants(&["worker:*"]).allow("any", "other"));
        assert!(grants(&["worker:*@*"]).allow("any", "other"));
        assert!(grants(&["worker:report@*"]).allow("report", "other"));
        assert!(grants(&["*"]).allow("any", "acme") && !grants(&["*"]).allow("any", "other"));
        assert!(!grants(&[]).names("any"));
    }

    #[test]
    fn a_name_is_never_taken_for_a_wildcard_or_a_separator() {
        let names = ["*", "*@*", "acme", "acme@other", "@", "worker:*", "worker:x@*", ":", "a b"];
        for own in names {
            for permissions in [&["worker:*"][..], &["*"], &["worker:report"]] {
                let grants = grants_in(own, permissions);
                assert_eq!(grants.tenants("report"), Some(BTreeSet::from([own])), "{own:?}");
                for tenant in names {
                    assert_eq!(grants.allow("report", tenant), own == tenant, "{own:?} {tenant:?}");
                }
            }
            let named = format!("worker:report@{own}");
            let grants = grants(&[&named]);
            for tenant in names {
                let is_allowed = own == "*" || own == tenant;
                assert_eq!(grants.allow("report", tenant), is_allowed, "{named:?} {tenant:?}");
            }
        }
        let no_tenant = grants(&["worker:report@"]);
        assert!(!no_tenant.names("report") && !no_tenant.allow("report", ""));
    }
}
