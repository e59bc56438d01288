//! The actions that can be asked for, as the processors tell.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jsonschema::Validator;
use parking_lot::RwLock;
use streamer_core::{Violations, retry};
use streamer_proto::{common::v1::Action, internal::v1::WatchActionsRequest};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::peers::Peers;

/// Longest wait before asking again, drawn with full jitter.
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// Violations of a schema that are told at most.
const MAX_VIOLATIONS: usize = 50;

/// An action and what checks its payloads.
pub(crate) struct Known {
    pub(crate) action: Action,
    schema: Option<Arc<Validator>>,
}

/// Actions by name, and by the tenant that they are declared for; the empty one is every tenant.
type ByName = BTreeMap<String, BTreeMap<String, Arc<Known>>>;

/// The latest list; kept while no processor can be reached, so that work is still accepted.
pub(crate) struct Catalog {
    by_name: RwLock<Arc<ByName>>,
    loaded: watch::Sender<bool>,
}

impl Default for Catalog {
    fn default() -> Self {
        Self { by_name: RwLock::default(), loaded: watch::Sender::new(false) }
    }
}

impl Catalog {
    /// The action, as it is declared for this tenant.
    pub(crate) fn get(&self, action: &str, tenant: &str) -> Option<Arc<Known>> {
        of_tenant(self.by_name.read().get(action)?, tenant)
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
        drop(self.loaded.subscribe().wait_for(|loaded| *loaded).await);
    }

    pub(crate) async fn follow(&self, peers: &Peers, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Err(status) = self.follow_once(peers) => {
                    tracing::warn!(%status, "lost the list of actions, will ask again");
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep(MAX_BACKOFF.mul_f64(retry::random_fraction())) => {}
            }
        }
    }

    async fn follow_once(&self, peers: &Peers) -> Result<(), Status> {
        let mut lists = peers.processor().watch_actions(WatchActionsRequest {}).await?.into_inner();
        let mut actions = Vec::new();
        while let Some(list) = lists.message().await? {
            actions.extend(list.actions);
            if list.more {
                continue;
            }
            let before = self.by_name.read().clone();
            let mut by_name = ByName::new();
            for offered in actions.drain(..) {
                let Some(action) = offered.action else { continue };
                let tenant = offered.tenant_id;
                let known = before.get(&action.name).and_then(|by_tenant| by_tenant.get(&tenant));
                let name = action.name.clone();
                let known = Arc::new(Known::new(action, known.map(|known| &**known)));
                by_name.entry(name).or_default().insert(tenant, known);
            }
            *self.by_name.write() = Arc::new(by_name);
            self.loaded.send_replace(true);
        }
        Err(Status::unavailable("the processor ended the stream"))
    }
}

fn compile(action: &Action) -> Option<Validator> {
    if action.payload_schema.is_empty() {
        return None;
    }
    let parsed = serde_json::from_str(&action.payload_schema).map_err(|error| error.to_string());
    match parsed.and_then(|schema| jsonschema::validator_for(&schema).map_err(|e| e.to_string())) {
        Ok(validator) => Some(validator),
        Err(error) => {
            tracing::error!(action = action.name, error, "its payload schema cannot be used");
            None
        }
    }
}

fn of_tenant(by_tenant: &BTreeMap<String, Arc<Known>>, tenant: &str) -> Option<Arc<Known>> {
    by_tenant.get(tenant).or_else(|| by_tenant.get("")).cloned()
}

impl Known {
    /// Compiles the schema, unless it is the one of `before`.
    fn new(action: Action, before: Option<&Self>) -> Self {
        let same = before.filter(|known| known.action.payload_schema == action.payload_schema);
        let schema = match same {
            Some(known) => known.schema.clone(),
            None => compile(&action).map(Arc::new),
        };
        Self { action, schema }
    }

    /// Checks a JSON payload against the action's schema; every violation is told.
    pub(crate) fn check_payload(&self, payload: &[u8], violations: &mut Violations) {
        let Some(schema) = &self.schema else { return };
        match serde_json::from_slice::<serde_json::Value>(payload) {
            Ok(value) => {
                for error in schema.iter_errors(&value).take(MAX_VIOLATIONS) {
                    let path = error.instance_path().to_string().replace('/', ".");
                    // The value itself is left out: it may be large, and is the caller's own.
                    violations.push(format!("payload{path}"), error.masked().to_string());
                }
            }
            Err(error) => violations.push("payload", format!("is not JSON: {error}")),
        }
    }
}
