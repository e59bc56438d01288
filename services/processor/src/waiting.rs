//! Which tenants have something in the queue that hints must not overtake.

use std::{collections::HashSet, mem};

use parking_lot::Mutex;

#[derive(Debug, Default)]
pub(crate) struct Waiting(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// `None` when the queue has not been looked at, or not at all of it.
    known: Option<HashSet<String>>,
    /// Noted since the look at the queue began that is under way, which may not see it.
    since: HashSet<String>,
}

impl Waiting {
    /// Whether something of this tenant may be waiting.
    pub(crate) fn may_have(&self, tenant: &str) -> bool {
        self.0.lock().known.as_ref().is_none_or(|tenants| tenants.contains(tenant))
    }

    /// Something of this tenant waits.
    pub(crate) fn note(&self, tenant: &str) {
        let mut state = self.0.lock();
        let State { known, since } = &mut *state;
        for tenants in known.iter_mut().chain([since]) {
            if !tenants.contains(tenant) {
                tenants.insert(tenant.to_owned());
            }
        }
    }

    /// The queue is about to be looked at.
    pub(crate) fn look(&self) {
        self.0.lock().since.clear();
    }

    /// All of the queue was looked at, and something of these tenants was left there.
    pub(crate) fn were_left(&self, mut tenants: HashSet<String>) {
        let mut state = self.0.lock();
        tenants.extend(mem::take(&mut state.since));
        state.known = Some(tenants);
    }

    /// All of the queue was looked at, but not for every action: something of these tenants, and of those
    /// before, may wait.
    pub(crate) fn were_left_too(&self, tenants: HashSet<String>) {
        if let Some(known) = &mut self.0.lock().known {
            known.extend(tenants);
        }
    }

    /// Not all of the queue was looked at.
    pub(crate) fn forget(&self) {
        self.0.lock().known = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_while_the_queue_is_looked_at_still_waits_afterwards() {
        let waiting = Waiting::default();
        assert!(waiting.may_have("acme"), "nothing is known yet");
        waiting.note("early");
        waiting.look();
        waiting.note("acme");
        waiting.were_left(HashSet::from(["left".to_owned()]));
        assert!(waiting.may_have("acme") && waiting.may_have("left"));
        assert!(!waiting.may_have("early"), "the look has seen that it does not");
        waiting.look();
        assert!(waiting.may_have("acme"), "until another look has ended");
        waiting.were_left_too(HashSet::from(["other".to_owned()]));
        assert!(waiting.may_have("acme") && waiting.may_have("other"), "not of every action");
        waiting.were_left(HashSet::new());
        assert!(!waiting.may_have("acme") && !waiting.may_have("other"));
        waiting.forget();
        assert!(waiting.may_have("acme"));
    }
}
