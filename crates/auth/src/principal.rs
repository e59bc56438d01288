//! Verified caller and its permissions.

use streamer_core::Timestamp;

/// Permissions that Streamer itself requires. Actions may require other permissions.
pub mod permissions {
    /// Read the requests of all users of the tenant.
    pub const REQUESTS_READ: &str = "requests:read";
    /// Cancel, redrive and delete the requests of all users of the tenant.
    pub const REQUESTS_WRITE: &str = "requests:write";
    /// List the tenant's connections.
    pub const CONNECTIONS_READ: &str = "connections:read";
    /// Send messages to the tenant's connections.
    pub const CONNECTIONS_SEND: &str = "connections:send";
    /// Operate the whole system: read the resources of all tenants and the metrics, and back up the store. Neither
    /// `*` nor any other permission includes it.
    pub const OPERATOR: &str = "operator";
    /// Close the tenant's connections.
    pub const CONNECTIONS_DISCONNECT: &str = "connections:disconnect";
}

/// Caller, as identified by a valid token.
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
    /// Returns whether the permission is granted: by name, by `area:*`, or by `*`;
    /// [`permissions::OPERATOR`] is granted by name only.
    #[must_use]
    pub fn has_permission(&self, permission: &str) -> bool {
        if permission == permissions::OPERATOR {
            return self.permissions.iter().any(|granted| granted == permission);
        }
        let area = permission.split_once(':').map(|(area, _)| area);
        self.permissions.iter().any(|granted| {
            granted == "*"
                || granted == permission
                || granted.strip_suffix(":*").is_some_and(|granted_area| Some(granted_area) == area)
        })
    }

    /// Returns whether the caller may read the requests of the given owner.
    #[must_use]
    pub fn can_read(&self, tenant: &str, user: &str) -> bool {
        self.tenant == tenant
            && (self.user == user || self.has_permission(permissions::REQUESTS_READ))
    }

    /// Returns whether the caller may change the requests of the given owner.
    #[must_use]
    pub fn can_write(&self, tenant: &str, user: &str) -> bool {
        self.tenant == tenant
            && (self.user == user || self.has_permission(permissions::REQUESTS_WRITE))
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
    fn permissions_match_by_name_area_and_wildcard() {
        assert!(with(&["reports:run"]).has_permission("reports:run"));
        assert!(with(&["reports:*"]).has_permission("reports:run"));
        assert!(with(&["*"]).has_permission("reports:run"));
        assert!(!with(&["reports"]).has_permission("reports:run"));
        assert!(!with(&["report:*"]).has_permission("reports:run"));
        assert!(!with(&[]).has_permission("reports:run"));
    }

    #[test]
    fn only_the_exact_name_grants_operator() {
        for others in [&["*"][..], &["operator:*"], &["*:*"], &["Operator"], &["operators"], &[]] {
            assert!(!with(others).has_permission("operator"), "{others:?}");
        }
        assert!(with(&["operator"]).has_permission("operator"));
        assert!(!with(&["operator"]).has_permission("requests:read"));
        assert!(!with(&["operator"]).can_read("acme", "bob"));
    }

    #[test]
    fn no_permission_grants_access_to_other_tenants() {
        assert!(with(&[]).can_read("acme", "ann"));
        assert!(!with(&[]).can_read("acme", "bob"));
        assert!(with(&["requests:read"]).can_read("acme", "bob"));
        assert!(!with(&["requests:read"]).can_write("acme", "bob"));
        assert!(!with(&["*"]).can_read("other", "ann"));
    }
}
