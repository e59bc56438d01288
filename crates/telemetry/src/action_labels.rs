//! Names of actions as label values.

use std::{collections::HashSet, sync::Arc};

use parking_lot::RwLock;

/// Label value of all actions without a value of their own.
const OTHER: &str = "_other";

/// Default of `server.metrics_max_actions`.
const DEFAULT_LIMIT: usize = 100;

/// For whom an action is declared, and therefore who chose its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActionScope {
    /// For all tenants: by a built-in handler, or by a worker with a permission for all tenants.
    AllTenants,
    /// For one tenant, which can declare any number of actions.
    OneTenant,
}

/// Actions that are label values; all others are `_other`.
#[derive(Clone, Copy, Debug)]
pub struct ActionLabelOptions {
    /// Maximum number of actions of all tenants, and of actions of single tenants.
    pub limit: usize,
    /// Whether actions of single tenants are label values.
    pub has_tenant_actions: bool,
}

impl Default for ActionLabelOptions {
    fn default() -> Self {
        Self { limit: DEFAULT_LIMIT, has_tenant_actions: false }
    }
}

/// Names of actions that are label values. Their number is limited, because each name has its own series. Actions of
/// single tenants are counted separately, so that a tenant cannot use up the values for actions of all tenants.
#[derive(Clone)]
pub(crate) struct ActionLabels {
    of_all_tenants: Arc<Names>,
    of_one_tenant: Arc<Names>,
    other: Arc<str>,
}

impl Default for ActionLabels {
    fn default() -> Self {
        Self::new(ActionLabelOptions::default())
    }
}

impl ActionLabels {
    pub(crate) fn new(options: ActionLabelOptions) -> Self {
        let ActionLabelOptions { limit, has_tenant_actions } = options;
        let tenant_limit = if has_tenant_actions { limit } else { 0 };
        Self {
            of_all_tenants: Arc::new(Names::new(limit)),
            of_one_tenant: Arc::new(Names::new(tenant_limit)),
            other: OTHER.into(),
        }
    }

    /// Returns the label value of an action: its name, or `_other` if names of its scope are not label values, or if
    /// their limit was reached before it was first seen.
    pub(crate) fn of(&self, action: &str, scope: ActionScope) -> Arc<str> {
        let names = match scope {
            ActionScope::AllTenants => &self.of_all_tenants,
            ActionScope::OneTenant => &self.of_one_tenant,
        };
        names.get_or_add(action).unwrap_or_else(|| self.other.clone())
    }

    /// Returns `_other`.
    pub(crate) fn other(&self) -> Arc<str> {
        self.other.clone()
    }
}

/// Set of names with a maximum size.
struct Names {
    names: RwLock<HashSet<Arc<str>>>,
    limit: usize,
}

impl Names {
    fn new(limit: usize) -> Self {
        Self { names: RwLock::default(), limit }
    }

    /// Returns the name, which is added if it is new; `None` if the set is full.
    fn get_or_add(&self, name: &str) -> Option<Arc<str>> {
        let names = self.names.read();
        if let Some(name) = names.get(name) {
            return Some(name.clone());
        }
        if names.len() >= self.limit {
            return None;
        }
        drop(names);
        let mut names = self.names.write();
        if let Some(name) = names.get(name) {
            return Some(name.clone());
        }
        if names.len() >= self.limit {
            return None;
        }
        let name: Arc<str> = name.into();
        names.insert(name.clone());
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        ActionScope::{AllTenants, OneTenant},
        *,
    };

    fn values(labels: &ActionLabels, scope: ActionScope, actions: &[&str]) -> Vec<String> {
        actions.iter().map(|action| labels.of(action, scope).to_string()).collect()
    }

    #[test]
    fn actions_beyond_the_limit_share_a_label() {
        let options = ActionLabelOptions { limit: 2, has_tenant_actions: false };
        let labels = ActionLabels::new(options);
        assert_eq!(values(&labels, AllTenants, &["a", "b", "c", "a"]), ["a", "b", "_other", "a"]);
    }

    #[test]
    fn actions_of_tenants_take_no_label_of_actions_of_all_tenants() {
        for (has_tenant_actions, expected) in
            [(false, ["_other", "_other", "_other"]), (true, ["a", "b", "_other"])]
        {
            let labels = ActionLabels::new(ActionLabelOptions { limit: 2, has_tenant_actions });
            assert_eq!(values(&labels, OneTenant, &["a", "b", "c"]), expected);
            assert_eq!(values(&labels, AllTenants, &["d", "e", "f"]), ["d", "e", "_other"]);
        }
    }
}
