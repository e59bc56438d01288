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
    schema: Option<Validator>,
}

/// The latest list; kept while no processor can be reached, so that work is still accepted.
pub(crate) struct Catalog {
    by_name: RwLock<Arc<BTreeMap<String, Arc<Known>>>>,
    loaded: watch::Sender<bool>,
}

impl Default for Catalog {
    fn default() -> Self {
        Self { by_name: RwLock::default(), loaded: watch::Sender::new(false) }
    }
}

impl Catalog {
    pub(crate) fn get(&self, action: &str) -> Option<Arc<Known>> {
        self.by_name.read().get(action).cloned()
    }

    pub(crate) fn list(&self) -> Vec<Action> {
        self.by_name.read().values().map(|known| known.action.clone()).collect()
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
            sleep(MAX_BACKOFF.mul_f64(retry::random_fraction())).await;
        }
    }

    async fn follow_once(&self, peers: &Peers) -> Result<(), Status> {
        let mut lists = peers.processor().watch_actions(WatchActionsRequest {}).await?.into_inner();
        while let Some(list) = lists.message().await? {
            let known = list.actions.into_iter().map(|action| {
                let schema = compile(&action);
                (action.name.clone(), Arc::new(Known { action, schema }))
            });
            *self.by_name.write() = Arc::new(known.collect());
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

impl Known {
    /// Checks a JSON payload against the action's schema; every violation is told.
    pub(crate) fn check_payload(&self, payload: &[u8], violations: &mut Violations) {
        let Some(schema) = &self.schema else { return };
        match serde_json::from_slice::<serde_json::Value>(payload) {
            Ok(value) => {
                for error in schema.iter_errors(&value).take(MAX_VIOLATIONS) {
                    let path = error.instance_path().to_string().replace('/', ".");
                    violations.push(format!("payload{path}"), error.to_string());
                }
            }
            Err(error) => violations.push("payload", format!("is not JSON: {error}")),
        }
    }
}
