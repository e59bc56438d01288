//! Tenants with queued requests. A request that a hint announces must not start before queued requests of its tenant.

use std::{collections::HashSet, mem};

use parking_lot::Mutex;

#[derive(Debug, Default)]
pub(crate) struct Backlog(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Tenants that may have queued requests; `None` if the queue has not been scanned completely.
    known: Option<HashSet<String>>,
    /// Tenants added since the current scan began, which may not find their requests.
    added: HashSet<String>,
}

impl Backlog {
    /// Returns whether the given tenant may have queued requests.
    pub(crate) fn may_contain(&self, tenant: &str) -> bool {
        self.0.lock().known.as_ref().is_none_or(|tenants| tenants.contains(tenant))
    }

    /// Adds a tenant with a queued request.
    pub(crate) fn insert(&self, tenant: &str) {
        let mut state = self.0.lock();
        let State { known, added } = &mut *state;
        for tenants in known.iter_mut().chain([added]) {
            if !tenants.contains(tenant) {
                tenants.insert(tenant.to_owned());
            }
        }
    }

    /// Begins a scan of the queue.
    pub(crate) fn begin_scan(&self) {
        self.0.lock().added.clear();
    }

    /// Finishes a scan of the whole queue. `tenants` contains the tenants whose requests remain queued.
    pub(crate) fn finish_scan(&self, mut tenants: HashSet<String>) {
        let mut state = self.0.lock();
        tenants.extend(mem::take(&mut state.added));
        state.known = Some(tenants);
    }

    /// Finishes a scan of the whole queue for some of the actions. The tenants in `tenants`, and those that the backlog
    /// already contains, may have queued requests.
    pub(crate) fn finish_partial_scan(&self, tenants: HashSet<String>) {
        if let Some(known) = &mut self.0.lock().known {
            known.extend(tenants);
        }
    }

    /// Clears the backlog, because a scan did not cover the whole queue: every tenant may have queued requests.
    pub(crate) fn reset(&self) {
        self.0.lock().known = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_added_during_a_scan_remain_in_the_backlog() {
        let backlog = Backlog::default();
        assert!(backlog.may_contain("acme"), "the queue has not been scanned");
        backlog.insert("early");
        backlog.begin_scan();
        backlog.insert("acme");
        backlog.finish_scan(HashSet::from(["left".to_owned()]));
        assert!(backlog.may_contain("acme") && backlog.may_contain("left"));
        assert!(!backlog.may_contain("early"), "the scan did not find it");
        backlog.begin_scan();
        assert!(backlog.may_contain("acme"), "until the next scan has finished");
        backlog.finish_partial_scan(HashSet::from(["other".to_owned()]));
        assert!(
            backlog.may_contain("acme") && backlog.may_contain("other"),
            "the scan did not cover every action"
        );
        backlog.finish_scan(HashSet::new());
        assert!(!backlog.may_contain("acme") && !backlog.may_contain("other"));
        backlog.reset();
        assert!(backlog.may_contain("acme"));
    }
}
