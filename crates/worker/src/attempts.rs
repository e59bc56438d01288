//! All attempts of this worker. An attempt outlives the streams that carry its reports.

use std::{collections::HashMap, sync::Arc};

use streamer_core::{AttemptNumber, Limits};
use streamer_handler::Handlers;
use streamer_proto::processor::v1::{self as proto, Acknowledgment, Report, Resend, Revoke};

use crate::{
    attempt::Attempt, attempt_key::AttemptKey, ready_set::ReadySet, send_window::WindowLimits,
};

pub(crate) struct Attempts {
    handlers: Handlers,
    by_key: HashMap<AttemptKey, Attempt>,
    pub(crate) ready: Arc<ReadySet>,
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

    /// Returns the IDs of all attempts.
    pub(crate) fn ids(&self) -> Vec<proto::Attempt> {
        let name = |(uid, attempt): &AttemptKey| proto::Attempt {
            uid: uid.to_string(),
            attempt: attempt.as_i32(),
        };
        self.by_key.keys().map(name).collect()
    }

    /// Starts a task; returns `false` if no handler is registered for its action.
    pub(crate) fn start(&mut self, task: proto::Task, limits: Limits) -> bool {
        let Some(key) = parse_key(&task.uid, task.attempt) else { return false };
        if self.by_key.contains_key(&key) {
            return true;
        }
        let Some((_, handler)) = self.handlers.get(&task.action) else { return false };
        let attempt = Attempt::start(key, task, handler.clone(), limits, &self.ready);
        self.by_key.insert(key, attempt);
        true
    }

    pub(crate) fn cancel(&self, uid: &str, attempt: i32) {
        if let Some(attempt) = parse_key(uid, attempt).and_then(|key| self.by_key.get(&key)) {
            attempt.cancel();
        }
    }

    /// Stops and removes an attempt that no longer belongs to this worker.
    pub(crate) fn revoke(&mut self, revoke: &Revoke) {
        let Revoke { uid, attempt, reason } = revoke;
        if parse_key(uid, *attempt).and_then(|key| self.by_key.remove(&key)).is_some() {
            tracing::warn!(uid, attempt, reason, "attempt revoked");
        }
    }

    /// Removes reports that are durable, which may free capacity in the window; returns the reports to send.
    pub(crate) fn acknowledge(
        &mut self,
        acknowledgment: &Acknowledgment,
        window: WindowLimits,
    ) -> Vec<Report> {
        let Some(key) = parse_key(&acknowledgment.uid, acknowledgment.attempt) else {
            return Vec::new();
        };
        if acknowledgment.ended {
            self.by_key.remove(&key);
            return Vec::new();
        }
        let Some(attempt) = self.by_key.get_mut(&key) else { return Vec::new() };
        attempt.acknowledge(
            acknowledgment.number,
            usize::try_from(acknowledgment.max_unacknowledged_bytes).unwrap_or(0),
        );
        attempt.collect(window)
    }

    /// Handles the server's request to resend dropped reports; returns the reports to send.
    pub(crate) fn resend(&mut self, resend: &Resend, window: WindowLimits) -> Vec<Report> {
        let Some(key) = parse_key(&resend.uid, resend.attempt) else { return Vec::new() };
        let Some(attempt) = self.by_key.get_mut(&key) else { return Vec::new() };
        attempt.resend(resend.number, resend.resends);
        attempt.collect(window)
    }

    /// Resumes the attempts in `resumed`, and stops all others.
    pub(crate) fn resume(&mut self, resumed: &[Acknowledgment]) {
        let numbers: HashMap<AttemptKey, i64> = resumed
            .iter()
            .filter_map(|acknowledgment| {
                Some((
                    parse_key(&acknowledgment.uid, acknowledgment.attempt)?,
                    acknowledgment.number,
                ))
            })
            .collect();
        self.by_key.retain(|key, attempt| match numbers.get(key) {
            Some(number) => {
                attempt.resume(*number);
                true
            }
            None => {
                let reason = "the server did not resume the attempt";
                tracing::warn!(uid = %key.0, attempt = key.1.as_u32(), reason, "attempt revoked");
                false
            }
        });
    }

    /// Returns the reports of the given attempt that can be sent now.
    pub(crate) fn collect(&mut self, key: AttemptKey, window: WindowLimits) -> Vec<Report> {
        self.by_key.get_mut(&key).map(|attempt| attempt.collect(window)).unwrap_or_default()
    }

    /// Returns the reports of all attempts that can be sent now.
    pub(crate) fn collect_all(&mut self, window: WindowLimits) -> Vec<Report> {
        self.by_key.values_mut().flat_map(|attempt| attempt.collect(window)).collect()
    }

    /// Releases all running attempts.
    pub(crate) fn release_all(&mut self, reason: &str) {
        self.by_key.values_mut().for_each(|attempt| attempt.release(reason));
    }

    /// Stops sync tasks, because their callers do not wait after the stream has ended.
    pub(crate) fn drop_sync(&mut self) {
        self.by_key.retain(|_, attempt| !attempt.sync);
    }
}

fn parse_key(uid: &str, attempt: i32) -> Option<AttemptKey> {
    Some((uid.parse().ok()?, AttemptNumber::from_i32(attempt).ok()?))
}
