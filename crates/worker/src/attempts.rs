//! Every attempt of this worker; they outlive the streams that they are reported on.

use std::{collections::HashMap, sync::Arc};

use streamer_core::Limits;
use streamer_handler::Handlers;
use streamer_proto::processor::v1::{self as proto, Acknowledgment, Report, Resend, Revoke};

use crate::{
    attempt::{Attempt, Key},
    outgoing::Window,
    ready::Ready,
};

pub(crate) struct Attempts {
    handlers: Handlers,
    by_key: HashMap<Key, Attempt>,
    pub(crate) ready: Arc<Ready>,
}

impl Attempts {
    pub(crate) fn new(handlers: Handlers) -> Self {
        Self { handlers, by_key: HashMap::new(), ready: Arc::default() }
    }

    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// As the server names them.
    pub(crate) fn named(&self) -> Vec<proto::Attempt> {
        let name = |(uid, attempt): &Key| proto::Attempt {
            uid: uid.to_string(),
            attempt: i32::try_from(*attempt).unwrap_or(i32::MAX),
        };
        self.by_key.keys().map(name).collect()
    }

    /// Starts a task; says whether there is a handler for it.
    pub(crate) fn start(&mut self, task: proto::Task, limits: Limits) -> bool {
        let Some(key) = key(&task.uid, task.attempt) else { return false };
        if self.by_key.contains_key(&key) {
            return true;
        }
        let Some((_, handler)) = self.handlers.get(&task.action) else { return false };
        let attempt = Attempt::start(key, task, handler.clone(), limits, &self.ready);
        self.by_key.insert(key, attempt);
        true
    }

    pub(crate) fn cancel(&self, uid: &str, attempt: i32) {
        if let Some(attempt) = key(uid, attempt).and_then(|key| self.by_key.get(&key)) {
            attempt.cancel();
        }
    }

    /// Stops an attempt that is not this worker's any more.
    pub(crate) fn revoke(&mut self, revoke: &Revoke) {
        let Revoke { uid, attempt, reason } = revoke;
        if key(uid, *attempt).and_then(|key| self.by_key.remove(&key)).is_some() {
            tracing::warn!(uid, attempt, reason, "an attempt was taken away");
        }
    }

    /// What is durable is forgotten, which may make room for more: returns what is to be sent.
    pub(crate) fn acknowledge(&mut self, said: &Acknowledgment, window: Window) -> Vec<Report> {
        let Some(key) = key(&said.uid, said.attempt) else { return Vec::new() };
        if said.ended {
            self.by_key.remove(&key);
            return Vec::new();
        }
        let Some(attempt) = self.by_key.get_mut(&key) else { return Vec::new() };
        attempt
            .acknowledge(said.number, usize::try_from(said.max_unacknowledged_bytes).unwrap_or(0));
        attempt.collect(window)
    }

    /// Returns what is to be sent now that the server has dropped reports.
    pub(crate) fn resend(&mut self, resend: &Resend, window: Window) -> Vec<Report> {
        let Some(key) = key(&resend.uid, resend.attempt) else { return Vec::new() };
        let Some(attempt) = self.by_key.get_mut(&key) else { return Vec::new() };
        attempt.resend(resend.number, resend.resends);
        attempt.collect(window)
    }

    /// Goes on with those that the server names, and stops the others.
    pub(crate) fn resume(&mut self, resumed: &[Acknowledgment]) {
        let numbers: HashMap<Key, i64> = resumed
            .iter()
            .filter_map(|said| Some((key(&said.uid, said.attempt)?, said.number)))
            .collect();
        self.by_key.retain(|key, attempt| match numbers.get(key) {
            Some(number) => {
                attempt.resume(*number);
                true
            }
            None => {
                let reason = "the server does not go on with it here";
                tracing::warn!(uid = %key.0, attempt = key.1, reason, "an attempt was taken away");
                false
            }
        });
    }

    /// What an attempt has to say now.
    pub(crate) fn collect(&mut self, key: Key, window: Window) -> Vec<Report> {
        self.by_key.get_mut(&key).map(|attempt| attempt.collect(window)).unwrap_or_default()
    }

    /// What all of them have to say now.
    pub(crate) fn collect_all(&mut self, window: Window) -> Vec<Report> {
        self.by_key.values_mut().flat_map(|attempt| attempt.collect(window)).collect()
    }

    /// Hands back what still runs.
    pub(crate) fn release_all(&mut self, reason: &str) {
        self.by_key.values_mut().for_each(|attempt| attempt.release(reason));
    }

    /// Sync tasks end with their stream: nobody waits for them any more.
    pub(crate) fn drop_sync(&mut self) {
        self.by_key.retain(|_, attempt| !attempt.sync);
    }
}

fn key(uid: &str, attempt: i32) -> Option<Key> {
    Some((uid.parse().ok()?, u32::try_from(attempt).ok()?))
}
