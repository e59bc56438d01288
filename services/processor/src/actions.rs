//! Actions that this processor knows: those of handlers in this process, those that workers offer, and saved
//! declarations of workers that have disconnected.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{ActionSpec, Clock, Timestamp, Violations, saturate};
use streamer_handler::{DynHandler, Handlers};
use streamer_proto::{common::v1::Action, internal::v1::ActionDeclaration};
use streamer_rpc::{action_from_proto, action_to_proto};
use streamer_store::{DeclaredAction, Store, StoreError};
use tokio::sync::watch;

use crate::{
    declaration::{ActionKey, Declaration},
    workers::worker_pool::{WorkerPool, WorkerSlotPermit},
};

/// Maximum number of saved declarations for one tenant, or of those that apply to all tenants.
const MAX_DECLARATIONS: usize = 1000;
/// Maximum total size of the schemas and descriptions of these declarations, in bytes.
pub(crate) const MAX_DECLARATION_BYTES: usize = 1024 * 1024;
/// Age at which a declaration is saved again.
const SAVE_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// Time after which a saved declaration expires unless it is saved again.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);

pub(crate) struct Actions {
    /// Handlers in this process, by action.
    local: HashMap<String, LocalAction>,
    pub(crate) workers: Arc<WorkerPool>,
    sync_threshold: Duration,
    saved: Mutex<SavedDeclarations>,
    /// Lock that serializes saves, so that concurrent saves count towards the same limits.
    save_lock: tokio::sync::Mutex<()>,
    loaded: watch::Sender<bool>,
}

/// Handler in this process, and the declaration of its action.
struct LocalAction {
    declared: Arc<Declaration>,
    handler: Arc<dyn DynHandler>,
}

/// Declarations of workers that are saved in the store.
#[derive(Default)]
struct SavedDeclarations {
    specs: BTreeMap<ActionKey, Arc<ActionSpec>>,
    /// Time at which this process last saved each declaration.
    saved_at: HashMap<ActionKey, Timestamp>,
}

/// Error that occurs when declarations are saved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SaveDeclarationsError {
    /// An operation of the store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The declarations for a tenant, or for all tenants, exceed a limit.
    #[error(
        "the declarations for {0} exceed the limit of {MAX_DECLARATIONS} actions or \
         {MAX_DECLARATION_BYTES} bytes of schemas and descriptions"
    )]
    TooMany(String),
}

impl SavedDeclarations {
    /// Checks that the saved declarations, together with `unsaved`, do not exceed the limits.
    fn check_capacity(
        &self,
        unsaved: &[(ActionKey, Arc<ActionSpec>)],
    ) -> Result<(), SaveDeclarationsError> {
        let bytes = |spec: &ActionSpec| {
            spec.description.len() + spec.payload_schema.as_ref().map_or(0, String::len)
        };
        let tenants: HashSet<&Option<String>> =
            unsaved.iter().map(|(key, _)| &key.tenant).collect();
        for tenant in tenants {
            let mut all: BTreeMap<&str, usize> = BTreeMap::new();
            let kept = self.specs.iter().chain(unsaved.iter().map(|(key, spec)| (key, spec)));
            for (key, spec) in kept.filter(|(key, _)| key.tenant == *tenant) {
                all.insert(&key.action, bytes(spec));
            }
            if all.len() > MAX_DECLARATIONS || all.values().sum::<usize>() > MAX_DECLARATION_BYTES {
                let name =
                    tenant.as_ref().map_or("all tenants".into(), |t| format!("tenant {t:?}"));
                return Err(SaveDeclarationsError::TooMany(name));
            }
        }
        Ok(())
    }
}

/// Runner of an attempt: a handler in this process or a worker.
pub(crate) enum Runner {
    /// A handler in this process.
    Local(Arc<dyn DynHandler>),
    /// A slot of a worker.
    Remote(WorkerSlotPermit),
}

impl Actions {
    pub(crate) fn new(local: Handlers, workers: Arc<WorkerPool>, sync_threshold: Duration) -> Self {
        let loaded = watch::Sender::new(false);
        let save_lock = tokio::sync::Mutex::default();
        let local = local.into_iter().map(|(spec, handler)| {
            let name = spec.name.clone();
            let key = ActionKey { action: name.clone(), tenant: None };
            (name, LocalAction { declared: Arc::new(Declaration::new(key, spec)), handler })
        });
        let local = local.collect();
        Self { local, workers, sync_threshold, saved: Mutex::default(), save_lock, loaded }
    }

    /// Loads the saved declarations from the store.
    pub(crate) async fn load(
        &self,
        store: &dyn Store,
        clock: &dyn Clock,
    ) -> Result<(), StoreError> {
        let declared = store.list_actions(clock.now().minus(RETENTION)).await?;
        {
            let mut saved = self.saved.lock();
            for DeclaredAction { tenant, action } in declared {
                // The action was validated when it was declared.
                let spec = action_from_proto(&action, "action", &mut Violations::default());
                let key = ActionKey { action: action.name, tenant };
                saved.specs.entry(key).or_insert_with(|| Arc::new(spec));
            }
        }
        self.loaded.send_replace(true);
        Ok(())
    }

    /// Waits until [`Self::load`] has succeeded.
    pub(crate) async fn wait_until_loaded(&self) {
        // Cannot fail, because `self` owns the sender.
        drop(self.loaded.subscribe().wait_for(|loaded| *loaded).await);
    }

    /// Saves declarations to the store, except those that are already saved.
    pub(crate) async fn save(
        &self,
        declared: Vec<(ActionKey, Arc<ActionSpec>)>,
        store: &dyn Store,
        clock: &dyn Clock,
    ) -> Result<(), SaveDeclarationsError> {
        let now = clock.now();
        let _guard = self.save_lock.lock().await;
        let unsaved: Vec<_> = {
            let saved = self.saved.lock();
            let is_saved = |(key, spec): &(ActionKey, Arc<ActionSpec>)| {
                let saved_at = saved.saved_at.get(key);
                saved_at.is_some_and(|at| now.since(*at) < SAVE_INTERVAL)
                    && saved.specs.get(key) == Some(spec)
            };
            let unsaved: Vec<_> = declared.into_iter().filter(|one| !is_saved(one)).collect();
            saved.check_capacity(&unsaved)?;
            unsaved
        };
        if unsaved.is_empty() {
            return Ok(());
        }
        let actions = unsaved.iter().map(|(key, spec)| DeclaredAction {
            tenant: key.tenant.clone(),
            action: action_to_proto(spec, self.sync_threshold),
        });
        store.save_actions(actions.collect(), now).await?;
        let mut saved = self.saved.lock();
        for (key, spec) in unsaved {
            saved.saved_at.insert(key.clone(), now);
            saved.specs.insert(key, spec);
        }
        Ok(())
    }

    /// Returns the declaration of `action` for `tenant`: that of a handler in this process, or of a worker that offers
    /// the action now or has offered it before.
    pub(crate) fn find(&self, action: &str, tenant: &str) -> Option<Arc<Declaration>> {
        if let Some(local) = self.local.get(action) {
            return Some(local.declared.clone());
        }
        // A tenant's own declaration takes precedence over one for all tenants, as in the router's
        // catalog, even while none of its workers is connected.
        [Some(tenant.to_owned()), None].into_iter().find_map(|tenant| {
            let key = ActionKey { action: action.to_owned(), tenant };
            let present = self.workers.spec(&key);
            let spec = present.or_else(|| self.saved.lock().specs.get(&key).cloned())?;
            Some(Arc::new(Declaration::new(key, spec)))
        })
    }

    /// Returns whether a handler in this process runs the action.
    pub(crate) fn is_local(&self, action: &str) -> bool {
        self.local.contains_key(action)
    }

    /// Acquires a runner for an additional attempt of the given action and tenant; `None` if none is available.
    pub(crate) fn acquire_runner(&self, action: &str, tenant: &str) -> Option<Runner> {
        match self.local.get(action) {
            Some(local) => Some(Runner::Local(local.handler.clone())),
            None => {
                let declared = self.find(action, tenant)?;
                self.workers.acquire_slot(&declared.key, tenant).map(Runner::Remote)
            }
        }
    }

    /// Returns the number of attempts of the given action and tenant that can run concurrently, at most `limit`; 0 if
    /// no handler or worker is available.
    pub(crate) fn slots(&self, action: &str, tenant: &str, limit: u32) -> u32 {
        let Some(declared) = self.find(action, tenant) else { return 0 };
        let limit = declared.spec.max_concurrency.map_or(limit, |of_action| of_action.min(limit));
        if self.is_local(action) { limit } else { limit.min(self.workers.slots(&declared.key)) }
    }

    /// Returns the actions that handlers in this process run.
    pub(crate) fn local(&self) -> impl Iterator<Item = &Arc<ActionSpec>> {
        self.local.values().map(|local| &local.declared.spec)
    }

    /// Lists all actions, for routers.
    pub(crate) fn list(&self) -> Vec<ActionDeclaration> {
        let declare = |spec: &ActionSpec| action_to_proto(spec, self.sync_threshold);
        let mut all: BTreeMap<ActionKey, Action> = {
            let saved = self.saved.lock();
            saved.specs.iter().map(|(key, spec)| (key.clone(), declare(spec))).collect()
        };
        for (key, (spec, workers)) in self.workers.declarations() {
            let workers = saturate::to_i32(workers);
            all.insert(key, Action { workers, available: true, ..declare(&spec) });
        }
        // A handler in this process takes precedence over declarations of workers with the same action name.
        all.retain(|key, _| !self.is_local(&key.action));
        for spec in self.local() {
            let key = ActionKey { action: spec.name.clone(), tenant: None };
            all.insert(key, Action { available: true, ..declare(spec) });
        }
        let offer = |(key, action): (ActionKey, _)| ActionDeclaration {
            action: Some(action),
            tenant_id: key.tenant.unwrap_or_default(),
        };
        all.into_iter().map(offer).collect()
    }
}
