//! Attempts that this processor runs or starts.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use streamer_core::{AttemptNumber, Uid};
use streamer_store::{Lease, LeaseRenewal};

use crate::{attempt::AttemptHandle, scheduler::Load};

/// Attempts by request. An attempt has number 0 until its claim is durable.
#[derive(Default)]
pub(crate) struct RunningAttempts(Mutex<HashMap<Uid, RunningAttempt>>);

pub(crate) struct RunningAttempt {
    /// Number of the attempt; 0 until the claim is durable.
    pub(crate) attempt: AttemptNumber,
    pub(crate) tenant: String,
    pub(crate) user: String,
    pub(crate) handle: Arc<AttemptHandle>,
    /// Whether a worker runs the attempt.
    pub(crate) is_remote: bool,
}

impl RunningAttempts {
    /// Adds the attempt of a request; returns `false` if the request already has one.
    pub(crate) fn insert(&self, uid: Uid, attempt: RunningAttempt) -> bool {
        let mut attempts = self.0.lock();
        if attempts.contains_key(&uid) {
            return false;
        }
        attempts.insert(uid, attempt);
        true
    }

    pub(crate) fn remove(&self, uid: Uid) {
        self.0.lock().remove(&uid);
    }

    pub(crate) fn contains(&self, uid: Uid) -> bool {
        self.0.lock().contains_key(&uid)
    }

    /// Returns the number of the attempt of a request, if it has one.
    pub(crate) fn number(&self, uid: Uid) -> Option<AttemptNumber> {
        self.0.lock().get(&uid).map(|running| running.attempt)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// Records that the claim of a request is durable.
    pub(crate) fn set_claimed(&self, uid: Uid, attempt: AttemptNumber) {
        if let Some(running) = self.0.lock().get_mut(&uid) {
            running.attempt = attempt;
        }
    }

    /// Requests the cancellation of an attempt.
    pub(crate) fn cancel(&self, uid: Uid, reason: &str) {
        if let Some(running) = self.0.lock().get(&uid) {
            running.handle.cancel(reason);
        }
    }

    /// Detaches the attempts of the given requests, so that their worker can resume them on another processor.
    pub(crate) fn fence(&self, uids: impl IntoIterator<Item = Uid>) {
        let attempts = self.0.lock();
        for running in uids.into_iter().filter_map(|uid| attempts.get(&uid)) {
            running.handle.fence();
        }
    }

    /// Detaches the attempts on workers, so that the workers can resume them on another processor; releases those that
    /// were not yet assigned.
    pub(crate) fn detach_remote(&self, reason: &'static str) {
        for running in self.0.lock().values().filter(|running| running.is_remote) {
            if running.attempt == AttemptNumber::NONE {
                running.handle.release(reason);
            } else {
                running.handle.fence();
            }
        }
    }

    /// Releases all attempts.
    pub(crate) fn release_all(&self, reason: &'static str) {
        for running in self.0.lock().values() {
            running.handle.release(reason);
        }
    }

    /// Returns the leases of all claimed attempts.
    pub(crate) fn leases(&self) -> Vec<Lease> {
        let attempts = self.0.lock();
        let claimed = attempts.iter().filter(|(_, running)| running.attempt > AttemptNumber::NONE);
        claimed.map(|(uid, running)| Lease { uid: *uid, attempt: running.attempt }).collect()
    }

    /// Applies the outcome of the renewal of a lease to its attempt.
    pub(crate) fn apply_renewal(&self, renewal: &LeaseRenewal) {
        let attempts = self.0.lock();
        let Some(running) = attempts.get(&renewal.lease.uid) else { return };
        if running.attempt != renewal.lease.attempt {
            return;
        }
        if let Some(reason) = &renewal.cancel_reason {
            running.handle.cancel(reason);
        }
        if !renewal.held {
            running.handle.record_missing_lease();
        }
    }

    /// Returns the number of attempts of each tenant and user.
    pub(crate) fn load(&self) -> Load {
        let mut load = Load::default();
        for running in self.0.lock().values() {
            load.add(&running.tenant, &running.user);
        }
        load
    }

    /// Adds 1 to the number of each tenant that is not zero, for each request that is being claimed.
    pub(crate) fn add_claiming(&self, by_tenant: &mut HashMap<String, usize>) {
        let attempts = self.0.lock();
        for claiming in attempts.values().filter(|running| running.attempt == AttemptNumber::NONE) {
            if let Some(count) = by_tenant.get_mut(&claiming.tenant).filter(|count| **count > 0) {
                *count += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::Timestamp;

    use super::*;

    fn uid(number: i64) -> Uid {
        Uid::new(Timestamp::from_millis(number))
    }

    fn attempt(tenant: &str, is_remote: bool) -> RunningAttempt {
        RunningAttempt {
            attempt: AttemptNumber::NONE,
            tenant: tenant.into(),
            user: "u".into(),
            handle: Arc::default(),
            is_remote,
        }
    }

    /// Returns the registry with a local attempt, a remote one and their handles. The second remote one is not claimed.
    fn attempts() -> (RunningAttempts, [Uid; 3], [Arc<AttemptHandle>; 3]) {
        let attempts = RunningAttempts::default();
        let uids = [1, 2, 3].map(uid);
        let handles = [("a", false), ("a", true), ("b", true)].map(|(tenant, is_remote)| {
            let attempt = attempt(tenant, is_remote);
            (attempt.handle.clone(), attempt)
        });
        let handles = uids.into_iter().zip(handles).map(|(uid, (handle, attempt))| {
            assert!(attempts.insert(uid, attempt));
            handle
        });
        let handles: Vec<_> = handles.collect();
        attempts.set_claimed(uids[0], AttemptNumber::FIRST);
        attempts.set_claimed(uids[1], AttemptNumber::FIRST);
        (attempts, uids, handles.try_into().ok().unwrap())
    }

    #[test]
    fn a_request_has_one_attempt() {
        let (attempts, [first, ..], _) = attempts();
        assert!(!attempts.insert(first, attempt("other", false)));
        assert_eq!(attempts.number(first), Some(AttemptNumber::FIRST));
        attempts.remove(first);
        assert!(!attempts.contains(first) && attempts.len() == 2);
        attempts.set_claimed(first, AttemptNumber::FIRST);
        assert_eq!(attempts.number(first), None);
    }

    #[test]
    fn leases_of_claimed_attempts_are_renewed() {
        let (attempts, uids, handles) = attempts();
        let mut leases = attempts.leases();
        leases.sort_by_key(|lease| lease.uid);
        assert_eq!(leases.iter().map(|lease| lease.uid).collect::<Vec<_>>(), uids[..2]);
        let cancel_reason = Some("enough".to_owned());
        let renewal = |attempt| LeaseRenewal {
            lease: Lease { uid: uids[0], attempt },
            held: true,
            cancel_reason: cancel_reason.clone(),
        };
        attempts.apply_renewal(&renewal(AttemptNumber::FIRST.next()));
        assert_eq!(handles[0].cancel_reason(), None, "a different attempt");
        attempts.apply_renewal(&renewal(AttemptNumber::FIRST));
        assert_eq!(handles[0].cancel_reason(), cancel_reason);
    }

    #[test]
    fn only_remote_attempts_are_detached() {
        let (attempts, uids, handles) = attempts();
        attempts.detach_remote("stop");
        let fenced = handles.each_ref().map(|handle| handle.is_fenced());
        assert_eq!(fenced, [false, true, false], "the third one was not assigned");
        attempts.fence([uids[0], uid(9)]);
        assert!(handles[0].is_fenced());
    }

    #[test]
    fn requests_that_are_being_claimed_do_not_reduce_the_limit() {
        let (attempts, ..) = attempts();
        let mut limits =
            HashMap::from([("a".to_owned(), 3), ("b".to_owned(), 3), ("c".to_owned(), 0)]);
        attempts.insert(uid(4), attempt("c", false));
        attempts.add_claiming(&mut limits);
        assert_eq!((limits["a"], limits["b"], limits["c"]), (3, 4, 0));
    }
}
