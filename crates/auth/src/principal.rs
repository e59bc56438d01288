//! The verified caller.

use streamer_core::Timestamp;

/// Permissions that Streamer itself asks for. Actions may ask for others.
pub mod permissions {
    /// See the requests of everybody in the tenant.
    pub const REQUESTS_READ: &str = "requests:read";
    /// Cancel, redrive and delete the requests of everybody in the tenant.
    pub const REQUESTS_WRITE: &str = "requests:write";
    /// List the tenant's connections.
    pub const CONNECTIONS_READ: &str = "connections:read";
    /// Send to the tenant's connections.
    pub const CONNECTIONS_SEND: &str = "connections:send";
    /// Operate the whole system: see what belongs to other tenants, and the metrics. Neither `*` nor
    /// any other permission implies it.
    pub const OPERATOR: &str = "operator";
    /// Close the tenant's connections.
    pub const CONNECTIONS_DISCONNECT: &str = "connections:disconnect";
}

/// Who is calling, as a valid token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// Claim `tenant_id`.
    pub tenant: String,
    /// Claim `sub`.
    pub user: String,
    /// Claim `permissions`.
    pub permissions: Vec<String>,
    /// Claim `exp`.
    pub expires_at: Timestamp,
}

impl Principal {
    /// Whether the permission was given: by name, by `area:*`, or by `*`; [`permissions::OPERATOR`]
    /// by name only.
    #[must_use]
    pub fn may(&self, permission: &str) -> bool {
        if permission == permissions::OPERATOR {
            return self.permissions.iter().any(|given| given == permission);
        }
        let area = permission.split_once(':').map(|(area, _)| area);
        self.permissions.iter().any(|given| {
            given == "*"
                || given == permission
                || given.strip_suffix(":*").is_some_and(|given_area| Some(given_area) == area)
        })
    }

    /// Whether it may see what this owner has.
    #[must_use]
    pub fn may_read(&self, tenant: &str, user: &str) -> bool {
        self.tenant == tenant && (self.user == user || self.may(permissions::REQUESTS_READ))
    }

    /// Whether it may change what this owner has.
    #[must_use]
    pub fn may_write(&self, tenant: &str, user: &str) -> bool {
        self.tenant == tenant && (self.user == user || self.may(permissions::REQUESTS_WRITE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(permissions: &[&str]) -> Principal {
        Principal {
            tenant: "acme".into(),
            user: "ann".into(),
            permissions: permissions.iter().map(ToString::to_string).collect(),
            expires_at: Timestamp::default(),
        }
    }

    #[test]
    fn permissions_match_by_name_area_and_star() {
        assert!(with(&["reports:run"]).may("reports:run"));
        assert!(with(&["reports:*"]).may("reports:run"));
        assert!(with(&["*"]).may("reports:run"));
        assert!(!with(&["reports"]).may("reports:run"));
        assert!(!with(&["report:*"]).may("reports:run"));
        assert!(!with(&[]).may("reports:run"));
    }

    #[test]
    fn operators_are_named_and_nothing_else_makes_one() {
        for others in [&["*"][..], &["operator:*"], &["*:*"], &["Operator"], &["operators"], &[]] {
            assert!(!with(others).may("operator"), "{others:?}");
        }
        assert!(with(&["operator"]).may("operator"));
        assert!(!with(&["operator"]).may("requests:read"));
        assert!(!with(&["operator"]).may_read("acme", "bob"));
    }

    #[test]
    fn no_permission_reaches_another_tenant() {
        assert!(with(&[]).may_read("acme", "ann"));
        assert!(!with(&[]).may_read("acme", "bob"));
        assert!(with(&["requests:read"]).may_read("acme", "bob"));
        assert!(!with(&["requests:read"]).may_write("acme", "bob"));
        assert!(!with(&["*"]).may_read("other", "ann"));
    }
}
