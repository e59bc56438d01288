//! Declaration of an action, and its key.

use std::sync::{Arc, OnceLock};

use streamer_core::ActionSpec;
use streamer_telemetry::{ActionScope, IndexedActionLabel};

/// Identifies the declaration of an action for one tenant or for all tenants. Declarations for different tenants are
/// independent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ActionKey {
    pub(crate) action: String,
    /// `None` for all tenants.
    pub(crate) tenant: Option<String>,
}

impl ActionKey {
    /// Returns for whom the action is declared.
    pub(crate) fn scope(&self) -> ActionScope {
        match self.tenant {
            None => ActionScope::AllTenants,
            Some(_) => ActionScope::OneTenant,
        }
    }
}

/// Declaration of an action that applies to the requests of a tenant.
pub(crate) struct Declaration {
    /// Key of the declaration.
    pub(crate) key: ActionKey,
    pub(crate) spec: Arc<ActionSpec>,
    /// Label of the action in metrics, after its first use.
    pub(crate) label: OnceLock<IndexedActionLabel>,
}

impl Declaration {
    pub(crate) fn new(key: ActionKey, spec: Arc<ActionSpec>) -> Self {
        Self { key, spec, label: OnceLock::new() }
    }
}
