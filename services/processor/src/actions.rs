//! What can be asked for: handlers in this process, what workers offer, and what they offered before
//! they left.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::{ActionSpec, Clock, Timestamp, Violations};
use streamer_handler::{DynHandler, Handlers};
use streamer_proto::{common::v1::Action, internal::v1::OfferedAction};
use streamer_rpc::{action_from_proto, action_to_proto};
use streamer_store::{DeclaredAction, Store, StoreError};
use tokio::sync::watch;

use crate::workers::{Key, Seat, Workers};

/// Declarations that are kept for one tenant, or for all tenants together, at most.
const MAX_KEPT: usize = 1000;
/// Bytes of their schemas and descriptions at most.
pub(crate) const MAX_KEPT_BYTES: usize = 1024 * 1024;
/// Declarations are saved again when they were saved so long ago.
const SAVE_AGAIN: Duration = Duration::from_secs(24 * 3600);
/// An action that nobody has offered for so long is forgotten.
const MEMORY: Duration = Duration::from_secs(30 * 24 * 3600);

pub(crate) struct Actions {
    local: Handlers,
    pub(crate) workers: Arc<Workers>,
    sync_threshold: Duration,
    remembered: Mutex<Remembered>,
    /// Held while declarations are saved: of several at once, each counts what the others bring.
    saving: tokio::sync::Mutex<()>,
    loaded: watch::Sender<bool>,
}

/// What workers have declared, kept in the store.
#[derive(Default)]
struct Remembered {
    specs: BTreeMap<Key, Arc<ActionSpec>>,
    /// When those that this process saved were saved.
    saved: HashMap<Key, Timestamp>,
}

/// Why a declaration is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RememberError {
    /// It cannot be kept now.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The tenant has too much.
    #[error(
        "more than {MAX_KEPT} actions, or {MAX_KEPT_BYTES} bytes of schemas and descriptions, are \
         declared for {0}"
    )]
    TooMuch(String),
}

impl Remembered {
    /// Whether all of this can be kept too.
    fn check_room(&self, news: &[(Key, Arc<ActionSpec>)]) -> Result<(), RememberError> {
        let bytes = |spec: &ActionSpec| {
            spec.description.len() + spec.payload_schema.as_ref().map_or(0, String::len)
        };
        let tenants: HashSet<&Option<String>> = news.iter().map(|(key, _)| &key.tenant).collect();
        for tenant in tenants {
            let mut all: BTreeMap<&str, usize> = BTreeMap::new();
            let kept = self.specs.iter().chain(news.iter().map(|(key, spec)| (key, spec)));
            for (key, spec) in kept.filter(|(key, _)| key.tenant == *tenant) {
                all.insert(&key.action, bytes(spec));
            }
            if all.len() > MAX_KEPT || all.values().sum::<usize>() > MAX_KEPT_BYTES {
                let name =
                    tenant.as_ref().map_or("all tenants".into(), |t| format!("tenant {t:?}"));
                return Err(RememberError::TooMuch(name));
            }
        }
        Ok(())
    }
}

/// What is declared of an action, for a tenant that asks for it.
#[derive(Clone)]
pub(crate) struct Declared {
    /// Names the declaration.
    pub(crate) key: Key,
    pub(crate) spec: Arc<ActionSpec>,
}

/// Who runs an attempt.
pub(crate) enum Runner {
    /// A handler in this process.
    Local(Arc<dyn DynHandler>),
    /// A worker, in this slot of its.
    Remote(Seat),
}

impl Actions {
    pub(crate) fn new(local: Handlers, workers: Arc<Workers>, sync_threshold: Duration) -> Self {
        let loaded = watch::Sender::new(false);
        let saving = tokio::sync::Mutex::default();
        Self { local, workers, sync_threshold, remembered: Mutex::default(), saving, loaded }
    }

    /// Reads what was declared before this process was started.
    pub(crate) async fn load(
        &self,
        store: &dyn Store,
        clock: &dyn Clock,
    ) -> Result<(), StoreError> {
        let declared = store.list_actions(clock.now().minus(MEMORY)).await?;
        {
            let mut remembered = self.remembered.lock();
            for DeclaredAction { tenant, action } in declared {
                // It was checked when it was declared.
                let spec = action_from_proto(&action, "action", &mut Violations::default());
                let key = Key { action: action.name, tenant };
                remembered.specs.entry(key).or_insert_with(|| Arc::new(spec));
            }
        }
        self.loaded.send_replace(true);
        Ok(())
    }

    /// Returns once [`Self::load`] has succeeded.
    pub(crate) async fn loaded(&self) {
        // The sender lives as long as `self`.
        drop(self.loaded.subscribe().wait_for(|loaded| *loaded).await);
    }

    /// Keeps what a worker declares, durably, unless it is kept already.
    pub(crate) async fn remember(
        &self,
        declared: Vec<(Key, Arc<ActionSpec>)>,
        store: &dyn Store,
        clock: &dyn Clock,
    ) -> Result<(), RememberError> {
        let now = clock.now();
        let _saving = self.saving.lock().await;
        let news: Vec<_> = {
            let remembered = self.remembered.lock();
            let is_kept = |(key, spec): &(Key, Arc<ActionSpec>)| {
                let saved = remembered.saved.get(key);
                saved.is_some_and(|at| now.since(*at) < SAVE_AGAIN)
                    && remembered.specs.get(key) == Some(spec)
            };
            let news: Vec<_> = declared.into_iter().filter(|one| !is_kept(one)).collect();
            remembered.check_room(&news)?;
            news
        };
        if news.is_empty() {
            return Ok(());
        }
        let actions = news.iter().map(|(key, spec)| DeclaredAction {
            tenant: key.tenant.clone(),
            action: action_to_proto(spec, self.sync_threshold),
        });
        store.save_actions(actions.collect(), now).await?;
        let mut remembered = self.remembered.lock();
        for (key, spec) in news {
            remembered.saved.insert(key.clone(), now);
            remembered.specs.insert(key, spec);
        }
        Ok(())
    }

    /// What is declared of this action for this tenant, by whoever offers it now or did so before.
    pub(crate) fn find(&self, action: &str, tenant: &str) -> Option<Declared> {
        if let Some((spec, _)) = self.local.get(action) {
            let key = Key { action: action.to_owned(), tenant: None };
            return Some(Declared { key, spec: spec.clone() });
        }
        // A tenant's own declaration comes before one for all, as in the router's catalog, whether its
        // workers are there or not.
        [Some(tenant.to_owned()), None].into_iter().find_map(|tenant| {
            let key = Key { action: action.to_owned(), tenant };
            let present = self.workers.spec(&key);
            let spec = present.or_else(|| self.remembered.lock().specs.get(&key).cloned())?;
            Some(Declared { key, spec })
        })
    }

    /// Whether a handler in this process runs it.
    pub(crate) fn is_local(&self, action: &str) -> bool {
        self.local.get(action).is_some()
    }

    /// Whoever can run one more of this action for this tenant now.
    pub(crate) fn runner(&self, action: &str, tenant: &str) -> Option<Runner> {
        match self.local.get(action) {
            Some((_, handler)) => Some(Runner::Local(handler.clone())),
            None => {
                let declared = self.find(action, tenant)?;
                self.workers.seat(&declared.key, tenant).map(Runner::Remote)
            }
        }
    }

    /// How many of this action of this tenant can run at once, when at most `limit` may; none when
    /// nobody offers it.
    pub(crate) fn slots(&self, action: &str, tenant: &str, limit: u32) -> u32 {
        let Some(Declared { key, spec }) = self.find(action, tenant) else { return 0 };
        let limit = spec.max_concurrency.map_or(limit, |of_action| of_action.min(limit));
        if self.is_local(action) { limit } else { limit.min(self.workers.slots(&key)) }
    }

    /// What handlers in this process run.
    pub(crate) fn local(&self) -> impl Iterator<Item = &Arc<ActionSpec>> {
        self.local.specs()
    }

    /// For the router.
    pub(crate) fn list(&self) -> Vec<OfferedAction> {
        let declare = |spec: &ActionSpec| action_to_proto(spec, self.sync_threshold);
        let mut all: BTreeMap<Key, Action> = {
            let remembered = self.remembered.lock();
            remembered.specs.iter().map(|(key, spec)| (key.clone(), declare(spec))).collect()
        };
        for (key, (spec, workers)) in self.workers.declared() {
            let workers = i32::try_from(workers).unwrap_or(i32::MAX);
            all.insert(key, Action { workers, available: true, ..declare(&spec) });
        }
        // A handler of ours hides what workers once declared under its name.
        all.retain(|key, _| !self.is_local(&key.action));
        for spec in self.local() {
            let key = Key { action: spec.name.clone(), tenant: None };
            all.insert(key, Action { available: true, ..declare(spec) });
        }
        let offer = |(key, action): (Key, _)| OfferedAction {
            action: Some(action),
            tenant_id: key.tenant.unwrap_or_default(),
        };
        all.into_iter().map(offer).collect()
    }
}
