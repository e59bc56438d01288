//! Registry of handlers.

use std::{
    collections::{BTreeMap, btree_map},
    sync::Arc,
};

use streamer_core::ActionSpec;

use crate::DynHandler;

/// Handlers, indexed by the name of their action.
#[derive(Clone, Default)]
pub struct Handlers {
    by_action: BTreeMap<String, (Arc<ActionSpec>, Arc<dyn DynHandler>)>,
}

impl Handlers {
    /// Creates an empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a handler, which replaces any earlier handler for the same action.
    #[must_use]
    pub fn with(mut self, handler: impl DynHandler) -> Self {
        let spec = handler.spec();
        self.by_action.insert(spec.name.clone(), (Arc::new(spec), Arc::new(handler)));
        self
    }

    /// Returns the declaration and the handler of the given action.
    #[must_use]
    pub fn get(&self, action: &str) -> Option<(&Arc<ActionSpec>, &Arc<dyn DynHandler>)> {
        self.by_action.get(action).map(|(spec, handler)| (spec, handler))
    }

    /// Returns whether the registry is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_action.is_empty()
    }

    /// Keeps only the handlers of the given actions.
    #[must_use]
    pub fn only(mut self, actions: &[impl AsRef<str>]) -> Self {
        self.by_action.retain(|name, _| actions.iter().any(|wanted| wanted.as_ref() == name));
        self
    }

    /// Returns the declarations of the actions, sorted by name.
    pub fn specs(&self) -> impl Iterator<Item = &Arc<ActionSpec>> {
        self.by_action.values().map(|(spec, _)| spec)
    }
}

impl IntoIterator for Handlers {
    type Item = (Arc<ActionSpec>, Arc<dyn DynHandler>);
    type IntoIter = btree_map::IntoValues<String, Self::Item>;

    /// Iterates over the declarations and the handlers, sorted by the name of the action.
    fn into_iter(self) -> Self::IntoIter {
        self.by_action.into_values()
    }
}
