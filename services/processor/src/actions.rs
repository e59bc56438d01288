//! What can be run here: handlers in this process, and whatever workers offer.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use streamer_core::ActionSpec;
use streamer_handler::{DynHandler, Handlers};
use streamer_proto::common::v1::Action;
use streamer_rpc::action_to_proto;

use crate::workers::{Seat, Workers};

pub(crate) struct Actions {
    local: Handlers,
    pub(crate) workers: Arc<Workers>,
    sync_threshold: Duration,
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
        Self { local, workers, sync_threshold }
    }

    /// What is declared of this action, while somebody can run it.
    pub(crate) fn spec(&self, action: &str) -> Option<Arc<ActionSpec>> {
        let local = self.local.get(action).map(|(spec, _)| spec.clone());
        local.or_else(|| self.workers.spec(action))
    }

    /// Whether a handler in this process runs it.
    pub(crate) fn is_local(&self, action: &str) -> bool {
        self.local.get(action).is_some()
    }

    /// Whoever can run one more of this action for this tenant now.
    pub(crate) fn runner(&self, action: &str, tenant: &str) -> Option<Runner> {
        match self.local.get(action) {
            Some((_, handler)) => Some(Runner::Local(handler.clone())),
            None => self.workers.seat(action, tenant).map(Runner::Remote),
        }
    }

    /// Declarations of everything that somebody has room for, and whether something is offered
    /// that nobody has room for at present.
    pub(crate) fn with_room(&self) -> (Vec<Arc<ActionSpec>>, bool) {
        let mut open: Vec<_> = self.local.specs().cloned().collect();
        let mut full = false;
        for (name, (spec, _)) in self.workers.actions() {
            if self.workers.has_room(&name) {
                open.push(spec);
            } else {
                full = true;
            }
        }
        (open, full)
    }

    /// For the router.
    pub(crate) fn list(&self) -> Vec<Action> {
        let mut all = BTreeMap::new();
        for (name, (spec, workers)) in self.workers.actions() {
            let workers = i32::try_from(workers).unwrap_or(i32::MAX);
            all.insert(name, Action { workers, ..action_to_proto(&spec, self.sync_threshold) });
        }
        for spec in self.local.specs() {
            all.insert(spec.name.clone(), action_to_proto(spec, self.sync_threshold));
        }
        all.into_values().collect()
    }
}
