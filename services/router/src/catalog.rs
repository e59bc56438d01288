//! Catalog of the actions that processors report.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use streamer_cluster::Instance;
use streamer_core::{ErrorCode, Timestamp, Violations, backoff};
use streamer_proto::{
    common::v1::Action,
    internal::v1::{ActionDeclaration, WatchActionsRequest},
};
use streamer_rpc::error_status;
use streamer_store::{DeclaredAction, Store};
use streamer_telemetry::{ActionScope, IndexedActionLabel};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Code, Status};

use crate::{
    compiled_schemas::{CompiledSchemas, DeclaredSchema},
    error::action_not_found,
    upstreams::Upstreams,
};

/// Maximum backoff between attempts to watch the action list of a processor, with full jitter.
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// Number of consecutive failures after which the actions of a processor become unavailable.
const MAX_FAILURES: u32 = 3;
/// Timeout for the first list from a processor.
const FIRST_LIST_TIMEOUT: Duration = Duration::from_secs(5);
/// Minimum interval between warnings about the same processor.
const WARN_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum time to wait for an unknown action while lists of processors are pending.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// An action, its payload schema, and the processors that offer it.
pub(crate) struct CatalogEntry {
    pub(crate) action: Action,
    schema: Option<Arc<DeclaredSchema>>,
    /// Names of the processors that can currently run the action.
    pub(crate) offered_by: Vec<Arc<str>>,
    /// For whom the action is declared.
    pub(crate) scope: ActionScope,
    /// Label of the action in metrics, after its first use.
    pub(crate) label: OnceLock<IndexedActionLabel>,
}

/// An action in the list of one processor.
struct ListedAction {
    tenant_id: String,
    action: Action,
    schema: Option<Arc<DeclaredSchema>>,
}

/// Entries by action name and by the tenant for which they are declared; an empty tenant stands for all tenants.
type ByName = BTreeMap<String, BTreeMap<String, Arc<CatalogEntry>>>;

/// Name of the list of actions whose processors are unknown or removed.
const STORED_LIST: &str = "~stored";

/// Latest action lists of all processors. They are retained while no processor is reachable, so that the router
/// continues to accept requests.
#[derive(Default)]
pub(crate) struct Catalog {
    /// Lists by the name of the processor that sent them. Updated together with `by_name`.
    lists: Mutex<BTreeMap<Arc<str>, Vec<ListedAction>>>,
    by_name: RwLock<Arc<ByName>>,
    discovery: watch::Sender<Discovery>,
    schemas: CompiledSchemas,
}

/// State of the discovery of action lists.
#[derive(Default)]
struct Discovery {
    /// Whether at least one list has been received, from a processor or from the store.
    is_loaded: bool,
    /// Names of known and reachable processors that have not yet sent a list.
    pending: HashSet<Arc<str>>,
}

impl Catalog {
    /// Returns the action as declared for the given tenant.
    pub(crate) fn get(&self, action: &str, tenant: &str) -> Option<Arc<CatalogEntry>> {
        for_tenant(self.by_name.read().get(action)?, tenant)
    }

    /// Returns the action as declared for the given tenant. If the action is unknown, waits until every processor has
    /// sent its list, because a router that has just started does not have all lists.
    ///
    /// # Errors
    /// Returns `NOT_FOUND` if no list contains the action; `UNAVAILABLE` if lists are missing.
    pub(crate) async fn find(
        &self,
        action: &str,
        tenant: &str,
    ) -> Result<Arc<CatalogEntry>, Status> {
        if let Some(entry) = self.get(action, tenant) {
            return Ok(entry);
        }
        let mut discovery = self.discovery.subscribe();
        let complete =
            discovery.wait_for(|discovery| discovery.is_loaded && discovery.pending.is_empty());
        // The result contains a read lock and is dropped immediately.
        let is_complete =
            timeout(LOOKUP_TIMEOUT, complete).await.is_ok_and(|discovery| discovery.is_ok());
        match self.get(action, tenant) {
            Some(entry) => Ok(entry),
            None if is_complete => Err(action_not_found(action)),
            None => Err(not_yet_known(action)),
        }
    }

    /// Returns the action in the same way as [`Self::find`]. If no list contains the action, queries the processors,
    /// because lists may not yet include the declarations of a worker that has just connected.
    pub(crate) async fn find_or_query(
        &self,
        action: &str,
        tenant: &str,
        upstreams: &Upstreams,
    ) -> Result<Arc<CatalogEntry>, Status> {
        match self.find(action, tenant).await {
            Err(not_found) if not_found.code() == Code::NotFound => {
                match upstreams.is_declared(action, tenant).await {
                    Some(true) => {}
                    Some(false) => return Err(not_found),
                    None => return Err(not_yet_known(action)),
                }
                let mut discovery = self.discovery.subscribe();
                let listed = discovery.wait_for(|_| self.get(action, tenant).is_some());
                // The result contains a read lock and is dropped immediately.
                drop(timeout(LOOKUP_TIMEOUT, listed).await);
                self.get(action, tenant).ok_or_else(|| not_yet_known(action))
            }
            outcome => outcome,
        }
    }

    /// Returns the actions that are declared for the given tenant or for all tenants.
    pub(crate) fn list(&self, tenant: &str) -> Vec<Action> {
        let by_name = self.by_name.read().clone();
        let entries = by_name.values().filter_map(|by_tenant| for_tenant(by_tenant, tenant));
        entries.map(|entry| entry.action.clone()).collect()
    }

    /// Waits until a list has been received.
    pub(crate) async fn ready(&self) {
        // The sender lives as long as `self`, so the wait cannot fail.
        drop(self.discovery.subscribe().wait_for(|discovery| discovery.is_loaded).await);
    }

    /// Returns whether a list has been received.
    pub(crate) fn is_loaded(&self) -> bool {
        self.discovery.borrow().is_loaded
    }

    /// Watches the lists of all processors until `shutdown` is cancelled.
    pub(crate) async fn follow(
        self: &Arc<Self>,
        upstreams: &Arc<Upstreams>,
        store: &dyn Store,
        since: Timestamp,
        shutdown: CancellationToken,
    ) {
        let mut instances = upstreams.processors.clone();
        let mut following: HashMap<Arc<str>, AbortOnDropHandle<()>> = HashMap::new();
        if !instances.is_local() {
            self.load_declared(store, since).await;
        }
        loop {
            let all = instances.all();
            following.retain(|name, _| all.iter().any(|instance| instance.name == *name));
            self.retire_removed(&all);
            let names = all.iter().map(|instance| instance.name.clone()).collect();
            self.mark_pending(&names, |name| following.contains_key(name));
            for instance in all.iter() {
                following.entry(instance.name.clone()).or_insert_with(|| {
                    AbortOnDropHandle::new(
                        self.follow_processor(upstreams.clone(), instance.clone()),
                    )
                });
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = instances.changed() => {}
            }
        }
    }

    /// Loads the declared actions from the store, so that requests are accepted before any processor is
    /// discovered.
    async fn load_declared(&self, store: &dyn Store, since: Timestamp) {
        match store.list_actions(since).await {
            Ok(declared) if declared.is_empty() => {}
            Ok(declared) => {
                let offered = declared.into_iter().map(|DeclaredAction { tenant, action }| {
                    let tenant_id = tenant.unwrap_or_default();
                    ActionDeclaration { action: Some(action), tenant_id }
                });
                self.record_list(&STORED_LIST.into(), offered.collect());
            }
            Err(error) => tracing::warn!(%error, "failed to read the declared actions"),
        }
    }

    /// Marks the lists of the processors in `all` as pending, except those that are already followed.
    fn mark_pending(&self, all: &HashSet<Arc<str>>, is_followed: impl Fn(&str) -> bool) {
        self.discovery.send_modify(|discovery| {
            discovery.pending.retain(|name| all.contains(name));
            discovery.pending.extend(all.iter().filter(|name| !is_followed(name)).cloned());
        });
    }

    fn follow_processor(
        self: &Arc<Self>,
        upstreams: Arc<Upstreams>,
        instance: Instance,
    ) -> JoinHandle<()> {
        let catalog = self.clone();
        tokio::spawn(async move {
            let (mut failures, mut last_warning) = (0, None);
            loop {
                if let Err(status) = catalog.follow_once(&upstreams, &instance).await {
                    let name = &*instance.name;
                    failures += 1;
                    if failures == MAX_FAILURES {
                        catalog.mark_lost(name);
                    }
                    // A processor that is starting or stopping does not cause a warning.
                    let is_due =
                        last_warning.is_none_or(|at: Instant| at.elapsed() > WARN_INTERVAL);
                    if failures >= MAX_FAILURES && is_due {
                        tracing::warn!(%status, name, "failed to watch an action list");
                        last_warning = Some(Instant::now());
                    } else {
                        tracing::debug!(%status, name, "failed to watch an action list");
                    }
                } else {
                    failures = 0;
                }
                sleep(backoff::jitter(MAX_BACKOFF)).await;
            }
        })
    }

    async fn follow_once(&self, upstreams: &Upstreams, instance: &Instance) -> Result<(), Status> {
        let mut client = upstreams.processor(instance);
        let mut lists = client.watch_actions(WatchActionsRequest {}).await?.into_inner();
        let mut actions = Vec::new();
        let mut is_first_received = false;
        loop {
            let message = if is_first_received {
                lists.message().await
            } else {
                let timed_out =
                    Err(Status::deadline_exceeded("the processor sent no list in time"));
                timeout(FIRST_LIST_TIMEOUT, lists.message()).await.unwrap_or(timed_out)
            };
            match message {
                Ok(Some(list)) => {
                    actions.extend(list.actions);
                    if !list.more {
                        is_first_received = true;
                        self.record_list(&instance.name, std::mem::take(&mut actions));
                    }
                }
                // The processor was reachable; the next attempt determines whether it still is.
                Ok(None) | Err(_) if is_first_received => return Ok(()),
                Ok(None) => return Err(Status::unavailable("the processor ended the stream")),
                Err(status) => return Err(status),
            }
        }
    }

    /// Moves the actions of removed processors to the stored list, where they remain declared but become
    /// unavailable.
    fn retire_removed(&self, all: &[Instance]) {
        let mut lists = self.lists.lock();
        let is_known =
            |name: &str| name == STORED_LIST || all.iter().any(|instance| *instance.name == *name);
        let removed: Vec<_> = lists.keys().filter(|name| !is_known(name)).cloned().collect();
        if removed.is_empty() {
            return;
        }
        for name in removed {
            let mut list = lists.remove(&name).unwrap_or_default();
            mark_unavailable(&mut list);
            let stored = lists.entry(STORED_LIST.into()).or_default();
            stored.retain(|old| !list.iter().any(|new| is_same_action(old, new)));
            stored.append(&mut list);
        }
        self.merge(&lists);
    }

    /// Marks a processor as unreachable: its actions remain declared but become unavailable.
    fn mark_lost(&self, from: &str) {
        let mut lists = self.lists.lock();
        if let Some(list) = lists.get_mut(from) {
            mark_unavailable(list);
            self.merge(&lists);
        }
        self.discovery.send_modify(|discovery| {
            discovery.pending.remove(from);
        });
    }

    /// Replaces the list of a processor.
    fn record_list(&self, from: &Arc<str>, list: Vec<ActionDeclaration>) {
        let by_name = self.by_name.read().clone();
        let listed = list.into_iter().filter_map(|ActionDeclaration { action, tenant_id }| {
            let action = action?;
            let entry = by_name.get(&action.name).and_then(|by_tenant| by_tenant.get(&tenant_id));
            let schema = self.schema_of(&action, &tenant_id, entry.map(|entry| &**entry));
            Some(ListedAction { tenant_id, action, schema })
        });
        let list = listed.collect();
        let mut lists = self.lists.lock();
        lists.insert(from.clone(), list);
        self.merge(&lists);
        self.discovery.send_modify(|discovery| {
            discovery.is_loaded = true;
            discovery.pending.remove(from);
        });
    }

    /// Validates a JSON payload against the schema of an action and records the violations.
    pub(crate) async fn check_payload(
        &self,
        entry: &CatalogEntry,
        tenant: &str,
        payload: &Bytes,
        violations: &mut Violations,
    ) -> Result<(), Status> {
        let Some(schema) = &entry.schema else { return Ok(()) };
        self.schemas.check(schema, &entry.action, tenant, payload, violations).await
    }

    /// Returns the schema of an action, and reuses the schema of `entry` if its text is unchanged.
    fn schema_of(
        &self,
        action: &Action,
        tenant: &str,
        entry: Option<&CatalogEntry>,
    ) -> Option<Arc<DeclaredSchema>> {
        if action.payload_schema.is_empty() {
            return None;
        }
        let unchanged = entry.filter(|entry| entry.action.payload_schema == action.payload_schema);
        let schema = unchanged.and_then(|entry| entry.schema.clone());
        Some(schema.unwrap_or_else(|| Arc::new(self.schemas.declare(tenant))))
    }

    /// Merges all lists into `by_name`. If several lists contain an action, an available one takes precedence over an
    /// unavailable one, then the one whose processor sorts first by name.
    fn merge(&self, lists: &BTreeMap<Arc<str>, Vec<ListedAction>>) {
        let mut by_name = BTreeMap::<String, BTreeMap<String, CatalogEntry>>::new();
        for (from, list) in lists {
            for ListedAction { tenant_id, action, schema } in list {
                let by_tenant = by_name.entry(action.name.clone()).or_default();
                let offered_by = if action.available { vec![from.clone()] } else { Vec::new() };
                let is_shared = tenant_id.is_empty();
                let scope =
                    if is_shared { ActionScope::AllTenants } else { ActionScope::OneTenant };
                let entry = CatalogEntry::new(action.clone(), schema.clone(), scope, offered_by);
                match by_tenant.get_mut(tenant_id) {
                    None => {
                        by_tenant.insert(tenant_id.clone(), entry);
                    }
                    Some(existing) => existing.merge(entry),
                }
            }
        }
        let shared = by_name.into_iter().map(|(name, by_tenant)| {
            let by_tenant = by_tenant.into_iter().map(|(tenant, entry)| (tenant, Arc::new(entry)));
            (name, by_tenant.collect())
        });
        *self.by_name.write() = Arc::new(shared.collect());
    }
}

fn not_yet_known(action: &str) -> Status {
    let message =
        format!("action {action:?} not found, and not all action lists are loaded; try again");
    error_status(ErrorCode::Unavailable, message)
}

/// Marks the given actions as unavailable.
fn mark_unavailable(list: &mut [ListedAction]) {
    for ListedAction { action, .. } in list {
        action.available = false;
        action.workers = 0;
    }
}

fn is_same_action(one: &ListedAction, other: &ListedAction) -> bool {
    one.tenant_id == other.tenant_id && one.action.name == other.action.name
}

fn for_tenant(
    by_tenant: &BTreeMap<String, Arc<CatalogEntry>>,
    tenant: &str,
) -> Option<Arc<CatalogEntry>> {
    by_tenant.get(tenant).or_else(|| by_tenant.get("")).cloned()
}

impl CatalogEntry {
    pub(crate) fn new(
        action: Action,
        schema: Option<Arc<DeclaredSchema>>,
        scope: ActionScope,
        offered_by: Vec<Arc<str>>,
    ) -> Self {
        Self { action, schema, offered_by, scope, label: OnceLock::new() }
    }

    /// Merges the entry of a different processor for the same action into `self`.
    fn merge(&mut self, mut other: Self) {
        if !self.action.available && other.action.available {
            std::mem::swap(self, &mut other);
        }
        if other.action.available {
            self.action.workers = self.action.workers.saturating_add(other.action.workers);
            self.offered_by.append(&mut other.offered_by);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;

    fn offered(name: &str) -> ActionDeclaration {
        let action = Action { name: name.into(), available: true, ..Action::default() };
        ActionDeclaration { action: Some(action), tenant_id: String::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_action_is_not_found_only_after_every_list_is_received() {
        let catalog = Catalog::default();
        let names = HashSet::from(["one".into(), "two".into()]);
        let error = catalog.find("work", "acme").await.err().unwrap();
        assert_eq!(error.code(), Code::Unavailable, "no processor is known");
        catalog.mark_pending(&names, |_| false);
        catalog.record_list(&"one".into(), vec![offered("other")]);
        let mut found = Box::pin(catalog.find("work", "acme"));
        assert!(poll!(&mut found).is_pending());
        catalog.record_list(&"two".into(), vec![offered("work")]);
        assert_eq!(found.await.ok().unwrap().action.name, "work");
        let error = catalog.find("missing", "acme").await.err().unwrap();
        assert_eq!(error.code(), Code::NotFound);
        // The list of an unreachable processor is not pending.
        catalog.mark_pending(&names, |name| name == "one");
        let mut found = Box::pin(catalog.find("missing", "acme"));
        assert!(poll!(&mut found).is_pending());
        catalog.mark_lost("two");
        assert_eq!(found.await.err().unwrap().code(), Code::NotFound);
    }
}
