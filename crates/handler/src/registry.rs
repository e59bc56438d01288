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
    ///
    /// # Panics
    /// Panics if the declaration of the action allows no attempt.
    #[must_use]
    pub fn with(mut self, handler: impl DynHandler) -> Self {
        let spec = handler.spec();
        // In the protocol, 0 stands for the default.
        assert!(spec.retry.max_attempts > 0, "{}: max_attempts must be at least 1", spec.name);
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use streamer_core::RetryPolicy;

    use super::*;
    use crate::{Context, HandlerError, async_trait};

    struct WithAttempts(u32);

    #[async_trait]
    impl DynHandler for WithAttempts {
        fn spec(&self) -> ActionSpec {
            let retry = RetryPolicy { max_attempts: self.0, ..RetryPolicy::default() };
            ActionSpec::new("a").retry(retry)
        }

        async fn run(&self, _: &Context, payload: Bytes) -> Result<Bytes, HandlerError> {
            Ok(payload)
        }
    }

    #[test]
    fn a_handler_has_at_least_one_attempt() {
        let handlers = Handlers::new().with(WithAttempts(1));
        assert_eq!(handlers.specs().count(), 1);
        assert_eq!(handlers.into_iter().count(), 1);
    }

    #[test]
    #[should_panic(expected = "a: max_attempts must be at least 1")]
    fn a_handler_without_attempts_is_refused() {
        let _handlers = Handlers::new().with(WithAttempts(0));
    }
}
