//! Names of actions as label values.

use std::{collections::HashSet, sync::Arc};

use parking_lot::RwLock;

/// Label value of all actions beyond the limit.
const OTHER: &str = "_other";

/// Default of `server.metrics_max_actions`.
const DEFAULT_LIMIT: usize = 100;

/// Names of actions that are label values. Their number is limited, because each name has its own series and tenants
/// can declare any number of actions.
#[derive(Clone)]
pub(crate) struct ActionLabels {
    names: Arc<RwLock<HashSet<Arc<str>>>>,
    limit: usize,
    other: Arc<str>,
}

impl Default for ActionLabels {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl ActionLabels {
    pub(crate) fn new(limit: usize) -> Self {
        Self { names: Arc::default(), limit, other: OTHER.into() }
    }

    /// Returns the label value of an action: its name, or `_other` if the limit was reached before it was first seen.
    pub(crate) fn of(&self, action: &str) -> Arc<str> {
        let names = self.names.read();
        if let Some(name) = names.get(action) {
            return name.clone();
        }
        if names.len() >= self.limit {
            return self.other.clone();
        }
        drop(names);
        let mut names = self.names.write();
        if names.len() >= self.limit && !names.contains(action) {
            return self.other.clone();
        }
        let name: Arc<str> = action.into();
        names.insert(name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_beyond_the_limit_share_a_label() {
        let labels = ActionLabels::new(2);
        assert_eq!(
            [labels.of("a"), labels.of("b"), labels.of("c")].map(|name| name.to_string()),
            ["a", "b", "_other"]
        );
        assert_eq!(&*labels.of("a"), "a");
    }
}
