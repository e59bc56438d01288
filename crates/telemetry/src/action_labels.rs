//! Names of actions as label values.

use std::{collections::HashMap, sync::Arc};

use parking_lot::RwLock;
use prometheus_client::encoding::EncodeLabelSet;

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

/// Label of metrics by action.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ActionLabel {
    action: Arc<str>,
}

/// Label of an action, with its index among the labels.
#[derive(Clone, Debug)]
pub struct IndexedActionLabel {
    /// The label.
    pub label: ActionLabel,
    /// Index below [`Metrics::action_label_count`](crate::Metrics::action_label_count).
    pub index: usize,
}

/// Names of actions that are label values. Their number is limited, because each name has its own series. Actions of
/// single tenants are counted separately, so that a tenant cannot use up the values for actions of all tenants.
#[derive(Clone)]
pub(crate) struct ActionLabels {
    of_all_tenants: Arc<Names>,
    of_one_tenant: Arc<Names>,
    other: IndexedActionLabel,
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
            of_all_tenants: Arc::new(Names::new(limit, 1)),
            of_one_tenant: Arc::new(Names::new(tenant_limit, limit.saturating_add(1))),
            other: IndexedActionLabel { label: ActionLabel { action: OTHER.into() }, index: 0 },
        }
    }

    /// Returns the maximum number of labels.
    pub(crate) fn count(&self) -> usize {
        let limits = self.of_all_tenants.limit.saturating_add(self.of_one_tenant.limit);
        limits.saturating_add(1)
    }

    /// Returns the label value of an action: its name, or `_other` if names of its scope are not label values, or if
    /// their limit was reached before it was first seen.
    pub(crate) fn of(&self, action: &str, scope: ActionScope) -> IndexedActionLabel {
        let names = match scope {
            ActionScope::AllTenants => &self.of_all_tenants,
            ActionScope::OneTenant => &self.of_one_tenant,
        };
        names.get_or_add(action).unwrap_or_else(|| self.other.clone())
    }

    /// Returns `_other`.
    pub(crate) fn other(&self) -> IndexedActionLabel {
        self.other.clone()
    }
}

/// Set of names with a maximum size.
struct Names {
    labels: RwLock<HashMap<Arc<str>, IndexedActionLabel>>,
    limit: usize,
    /// Index of the first name.
    first_index: usize,
}

impl Names {
    fn new(limit: usize, first_index: usize) -> Self {
        Self { labels: RwLock::default(), limit, first_index }
    }

    /// Returns the label of the name, which is added if it is new; `None` if the set is full.
    fn get_or_add(&self, name: &str) -> Option<IndexedActionLabel> {
        let labels = self.labels.read();
        if let Some(label) = labels.get(name) {
            return Some(label.clone());
        }
        if labels.len() >= self.limit {
            return None;
        }
        drop(labels);
        let mut labels = self.labels.write();
        if let Some(label) = labels.get(name) {
            return Some(label.clone());
        }
        if labels.len() >= self.limit {
            return None;
        }
        let name: Arc<str> = name.into();
        let index = self.first_index + labels.len();
        let label = IndexedActionLabel { label: ActionLabel { action: name.clone() }, index };
        labels.insert(name, label.clone());
        Some(label)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        ActionScope::{AllTenants, OneTenant},
        *,
    };

    fn values(labels: &ActionLabels, scope: ActionScope, actions: &[&str]) -> Vec<String> {
        let value = |action: &&str| labels.of(action, scope).label.action.to_string();
        actions.iter().map(value).collect()
    }

    #[test]
    fn each_label_has_an_index() {
        let options = ActionLabelOptions { limit: 2, has_tenant_actions: true };
        let labels = ActionLabels::new(options);
        let index = |action, scope| labels.of(action, scope).index;
        let of_all_tenants = ["a", "b", "c", "a"].map(|action| index(action, AllTenants));
        let of_one_tenant = ["a", "b", "c", "a"].map(|action| index(action, OneTenant));
        assert_eq!((of_all_tenants, of_one_tenant), ([1, 2, 0, 1], [3, 4, 0, 3]));
        assert_eq!((labels.other().index, labels.count()), (0, 5));
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
