//! The catalog of actions, as the processors report them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use streamer_core::{ErrorCode, RequestError, Timestamp, Violations, retry};
use streamer_proto::{
    common::v1::Action,
    internal::v1::{OfferedAction, WatchActionsRequest},
};
use streamer_rpc::{Member, status};
use streamer_store::{DeclaredAction, Store};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Code, Status};

use crate::{
    compiled_schemas::{CompiledSchemas, DeclaredSchema},
    peers::Peers,
    refusal::no_such_action,
};

/// Longest wait before asking again, drawn with full jitter.
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// Times that a processor cannot be asked before what it offers counts as gone.
const LOST: u32 = 3;
/// A processor that is asked for its list has this long to begin.
const FIRST_LIST: Duration = Duration::from_secs(5);
/// A processor that cannot be asked is logged once in this time.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// Longest wait for an unknown action while lists of processors are pending.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// An action and what checks its payloads.
pub(crate) struct Known {
    pub(crate) action: Action,
    schema: Option<Arc<DeclaredSchema>>,
    /// The processors that can run it now, by name.
    pub(crate) offered_by: Vec<Arc<str>>,
}

/// An action as a processor offers it.
struct Offered {
    tenant_id: String,
    action: Action,
    schema: Option<Arc<DeclaredSchema>>,
}

/// Actions by name, and by the tenant that they are declared for; the empty one is every tenant.
type ByName = BTreeMap<String, BTreeMap<String, Arc<Known>>>;

/// Under this name stands what was declared by processors that are not known (any more).
const STORED: &str = "~stored";

/// The latest lists; kept while no processor can be reached, so that work is still accepted.
#[derive(Default)]
pub(crate) struct Catalog {
    /// By the name of the processor that sent it. Changed together with `by_name`.
    lists: Mutex<BTreeMap<Arc<str>, Vec<Offered>>>,
    by_name: RwLock<Arc<ByName>>,
    discovery: watch::Sender<Discovery>,
    schemas: CompiledSchemas,
}

/// Which processors have sent their lists.
#[derive(Default)]
struct Discovery {
    /// At least one has, or the store knows what was declared once.
    any: bool,
    /// Known processors that have sent none yet and are not lost.
    pending: HashSet<Arc<str>>,
}

impl Catalog {
    /// The action, as it is declared for this tenant.
    pub(crate) fn get(&self, action: &str, tenant: &str) -> Option<Arc<Known>> {
        of_tenant(self.by_name.read().get(action)?, tenant)
    }

    /// The same; when it is not known, waits until every processor has sent its list. A router that has just
    /// started does not have them all.
    ///
    /// # Errors
    /// `NOT_FOUND`; `UNAVAILABLE` while it cannot be found out.
    pub(crate) async fn find(&self, action: &str, tenant: &str) -> Result<Arc<Known>, Status> {
        if let Some(known) = self.get(action, tenant) {
            return Ok(known);
        }
        let mut discovery = self.discovery.subscribe();
        let complete =
            discovery.wait_for(|discovery| discovery.any && discovery.pending.is_empty());
        // Let go of at once: it is a lock.
        let is_complete =
            timeout(MAX_WAIT, complete).await.is_ok_and(|discovery| discovery.is_ok());
        match self.get(action, tenant) {
            Some(known) => Ok(known),
            None if is_complete => Err(no_such_action(action)),
            None => Err(unknown_yet(action)),
        }
    }

    /// The same; when no list has it, asks the processors: what a worker declared that has just been welcomed may be
    /// missing from every list.
    pub(crate) async fn find_or_ask(
        &self,
        action: &str,
        tenant: &str,
        peers: &Peers,
    ) -> Result<Arc<Known>, Status> {
        match self.find(action, tenant).await {
            Err(refusal) if refusal.code() == Code::NotFound => {
                match peers.is_declared(action, tenant).await {
                    Some(true) => {}
                    Some(false) => return Err(refusal),
                    None => return Err(unknown_yet(action)),
                }
                let mut discovery = self.discovery.subscribe();
                let listed = discovery.wait_for(|_| self.get(action, tenant).is_some());
                // Dropped at once: it holds a read lock.
                drop(timeout(MAX_WAIT, listed).await);
                self.get(action, tenant).ok_or_else(|| unknown_yet(action))
            }
            outcome => outcome,
        }
    }

    /// What this tenant can ask for.
    pub(crate) fn list(&self, tenant: &str) -> Vec<Action> {
        let by_name = self.by_name.read().clone();
        let known = by_name.values().filter_map(|by_tenant| of_tenant(by_tenant, tenant));
        known.map(|known| known.action.clone()).collect()
    }

    /// Returns once a list has come.
    pub(crate) async fn ready(&self) {
        // The sender lives as long as `self`, so this ends only with a list.
        drop(self.discovery.subscribe().wait_for(|discovery| discovery.any).await);
    }

    /// Whether a list has come.
    pub(crate) fn is_loaded(&self) -> bool {
        self.discovery.borrow().any
    }

    /// Follows the list of every processor, until `shutdown`.
    pub(crate) async fn follow(
        self: &Arc<Self>,
        peers: &Arc<Peers>,
        store: &dyn Store,
        since: Timestamp,
        shutdown: CancellationToken,
    ) {
        let mut members = peers.processors.clone();
        let mut following: HashMap<Arc<str>, AbortOnDropHandle<()>> = HashMap::new();
        if !members.is_local() {
            self.learn_stored(store, since).await;
        }
        loop {
            let all = members.all();
            following.retain(|name, _| all.iter().any(|member| member.name == *name));
            self.retire_others(&all);
            let names = all.iter().map(|member| member.name.clone()).collect();
            self.expect(&names, |name| following.contains_key(name));
            for member in all.iter() {
                following.entry(member.name.clone()).or_insert_with(|| {
                    AbortOnDropHandle::new(self.follow_member(peers.clone(), member.clone()))
                });
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = members.changed() => {}
            }
        }
    }

    /// What was declared while this router was not there: enough to accept work before any
    /// processor is found.
    async fn learn_stored(&self, store: &dyn Store, since: Timestamp) {
        match store.list_actions(since).await {
            Ok(declared) if declared.is_empty() => {}
            Ok(declared) => {
                let offered = declared.into_iter().map(|DeclaredAction { tenant, action }| {
                    let tenant_id = tenant.unwrap_or_default();
                    OfferedAction { action: Some(action), tenant_id }
                });
                self.note(&STORED.into(), offered.collect());
            }
            Err(error) => tracing::warn!(%error, "could not read the declared actions"),
        }
    }

    /// Marks the lists of these processors as pending, unless they are followed already.
    fn expect(&self, all: &HashSet<Arc<str>>, is_followed: impl Fn(&str) -> bool) {
        self.discovery.send_modify(|discovery| {
            discovery.pending.retain(|name| all.contains(name));
            discovery.pending.extend(all.iter().filter(|name| !is_followed(name)).cloned());
        });
    }

    fn follow_member(self: &Arc<Self>, peers: Arc<Peers>, member: Member) -> JoinHandle<()> {
        let catalog = self.clone();
        tokio::spawn(async move {
            let (mut losses, mut said) = (0, None);
            loop {
                if let Err(status) = catalog.follow_once(&peers, &member).await {
                    let name = &*member.name;
                    losses += 1;
                    if losses == LOST {
                        catalog.note_lost(name);
                    }
                    // Processors that stop, or start, are not worth a warning.
                    let is_due = said.is_none_or(|at: Instant| at.elapsed() > SAY_AGAIN);
                    if losses >= LOST && is_due {
                        tracing::warn!(%status, name, "cannot follow a list of actions");
                        said = Some(Instant::now());
                    } else {
                        tracing::debug!(%status, name, "cannot follow a list of actions");
                    }
                } else {
                    losses = 0;
                }
                sleep(MAX_BACKOFF.mul_f64(retry::random_fraction())).await;
            }
        })
    }

    async fn follow_once(&self, peers: &Peers, member: &Member) -> Result<(), Status> {
        let mut client = peers.processor(member);
        let mut lists = client.watch_actions(WatchActionsRequest {}).await?.into_inner();
        let mut actions = Vec::new();
        let mut has_come = false;
        loop {
            let message = if has_come {
                lists.message().await
            } else {
                let late = Err(Status::deadline_exceeded("the processor sent no list in time"));
                timeout(FIRST_LIST, lists.message()).await.unwrap_or(late)
            };
            match message {
                Ok(Some(list)) => {
                    actions.extend(list.actions);
                    if !list.more {
                        has_come = true;
                        self.note(&member.name, std::mem::take(&mut actions));
                    }
                }
                // It was there; whether it still is will be seen.
                Ok(None) | Err(_) if has_come => return Ok(()),
                Ok(None) => return Err(Status::unavailable("the processor ended the stream")),
                Err(status) => return Err(status),
            }
        }
    }

    /// Actions of processors that have gone stay declared, and are not offered.
    fn retire_others(&self, all: &[Member]) {
        let mut lists = self.lists.lock();
        let known = |name: &str| name == STORED || all.iter().any(|member| *member.name == *name);
        let gone: Vec<_> = lists.keys().filter(|name| !known(name)).cloned().collect();
        if gone.is_empty() {
            return;
        }
        for name in gone {
            let mut list = lists.remove(&name).unwrap_or_default();
            withdraw(&mut list);
            let stored = lists.entry(STORED.into()).or_default();
            stored.retain(|old| !list.iter().any(|new| are_of_one_action(old, new)));
            stored.append(&mut list);
        }
        self.merge(&lists);
    }

    /// A processor cannot be asked any more: what it offered is declared, and not offered.
    fn note_lost(&self, from: &str) {
        let mut lists = self.lists.lock();
        if let Some(list) = lists.get_mut(from) {
            withdraw(list);
            self.merge(&lists);
        }
        self.discovery.send_modify(|discovery| {
            discovery.pending.remove(from);
        });
    }

    fn note(&self, from: &Arc<str>, list: Vec<OfferedAction>) {
        let known = self.by_name.read().clone();
        let offered = list.into_iter().filter_map(|OfferedAction { action, tenant_id }| {
            let action = action?;
            let known = known.get(&action.name).and_then(|known| known.get(&tenant_id));
            let schema = self.schema_of(&action, &tenant_id, known.map(|known| &**known));
            Some(Offered { tenant_id, action, schema })
        });
        let list = offered.collect();
        let mut lists = self.lists.lock();
        lists.insert(from.clone(), list);
        self.merge(&lists);
        self.discovery.send_modify(|discovery| {
            discovery.any = true;
            discovery.pending.remove(from);
        });
    }

    /// Checks a JSON payload against the schema of an action; notes how it does not match.
    pub(crate) async fn check_payload(
        &self,
        known: &Known,
        tenant: &str,
        payload: &Bytes,
        violations: &mut Violations,
    ) -> Result<(), Status> {
        let Some(schema) = &known.schema else { return Ok(()) };
        self.schemas.check(schema, &known.action, tenant, payload, violations).await
    }

    /// The schema of an action; the known one, if that is the same.
    fn schema_of(
        &self,
        action: &Action,
        tenant: &str,
        known: Option<&Known>,
    ) -> Option<Arc<DeclaredSchema>> {
        if action.payload_schema.is_empty() {
            return None;
        }
        let same = known.filter(|known| known.action.payload_schema == action.payload_schema);
        let same = same.and_then(|known| known.schema.clone());
        Some(same.unwrap_or_else(|| Arc::new(self.schemas.declare(tenant))))
    }

    /// Makes one list of all: what is offered now goes before what was declared once, and then the
    /// processors go by their names.
    fn merge(&self, lists: &BTreeMap<Arc<str>, Vec<Offered>>) {
        let mut by_name = BTreeMap::<String, BTreeMap<String, Known>>::new();
        for (from, list) in lists {
            for Offered { tenant_id, action, schema } in list {
                let by_tenant = by_name.entry(action.name.clone()).or_default();
                let offered_by = if action.available { vec![from.clone()] } else { Vec::new() };
                let news = Known { action: action.clone(), schema: schema.clone(), offered_by };
                match by_tenant.get_mut(tenant_id) {
                    None => {
                        by_tenant.insert(tenant_id.clone(), news);
                    }
                    Some(known) => known.join(news),
                }
            }
        }
        let shared = by_name.into_iter().map(|(name, by_tenant)| {
            let by_tenant = by_tenant.into_iter().map(|(tenant, known)| (tenant, Arc::new(known)));
            (name, by_tenant.collect())
        });
        *self.by_name.write() = Arc::new(shared.collect());
    }
}

fn unknown_yet(action: &str) -> Status {
    let message = format!("whether there is an action {action:?} is not known yet; try again");
    status(&RequestError::new(ErrorCode::Unavailable, message))
}

/// No processor runs these now.
fn withdraw(list: &mut [Offered]) {
    for Offered { action, .. } in list {
        action.available = false;
        action.workers = 0;
    }
}

fn are_of_one_action(one: &Offered, other: &Offered) -> bool {
    one.tenant_id == other.tenant_id && one.action.name == other.action.name
}

fn of_tenant(by_tenant: &BTreeMap<String, Arc<Known>>, tenant: &str) -> Option<Arc<Known>> {
    by_tenant.get(tenant).or_else(|| by_tenant.get("")).cloned()
}

impl Known {
    /// Merges the report of a different processor for the same action.
    fn join(&mut self, mut other: Self) {
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

    fn offered(name: &str) -> OfferedAction {
        let action = Action { name: name.into(), available: true, ..Action::default() };
        OfferedAction { action: Some(action), tenant_id: String::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_action_is_refused_only_when_every_processor_has_sent_its_list() {
        let catalog = Catalog::default();
        let members = HashSet::from(["one".into(), "two".into()]);
        let refusal = catalog.find("work", "acme").await.err().unwrap();
        assert_eq!(refusal.code(), Code::Unavailable, "no processor is known");
        catalog.expect(&members, |_| false);
        catalog.note(&"one".into(), vec![offered("other")]);
        let mut found = Box::pin(catalog.find("work", "acme"));
        assert!(poll!(&mut found).is_pending());
        catalog.note(&"two".into(), vec![offered("work")]);
        assert_eq!(found.await.ok().unwrap().action.name, "work");
        let refusal = catalog.find("missing", "acme").await.err().unwrap();
        assert_eq!(refusal.code(), Code::NotFound);
        // One that is lost is not waited for.
        catalog.expect(&members, |name| name == "one");
        let mut found = Box::pin(catalog.find("missing", "acme"));
        assert!(poll!(&mut found).is_pending());
        catalog.note_lost("two");
        assert_eq!(found.await.err().unwrap().code(), Code::NotFound);
    }
}
