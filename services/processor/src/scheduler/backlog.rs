//! Tenants with queued requests. A request that a hint announces must not start before queued requests of its tenant.

use std::{collections::HashSet, mem};

#[derive(Debug, Default)]
pub(crate) struct Backlog {
    /// Tenants that may have queued requests; `None` if the queue has not been scanned completely.
    known: Option<HashSet<String>>,
    /// Tenants added since the current scan began, which may not find their requests.
    added: HashSet<String>,
}

impl Backlog {
    /// Returns whether the given tenant may have queued requests.
    pub(crate) fn may_contain(&self, tenant: &str) -> bool {
        self.known.as_ref().is_none_or(|tenants| tenants.contains(tenant))
    }

    /// Adds a tenant with a queued request.
    pub(crate) fn insert(&mut self, tenant: &str) {
        for tenants in self.known.iter_mut().chain([&mut self.added]) {
            if !tenants.contains(tenant) {
                tenants.insert(tenant.to_owned());
            }
        }
    }

    /// Begins a scan of the queue.
    pub(crate) fn begin_scan(&mut self) {
        self.added.clear();
    }

    /// Finishes a scan of the whole queue. `tenants` contains the tenants whose requests remain queued.
    pub(crate) fn finish_scan(&mut self, mut tenants: HashSet<String>) {
        tenants.extend(mem::take(&mut self.added));
        self.known = Some(tenants);
    }

    /// Finishes a scan of the whole queue for some of the actions. The tenants in `tenants`, and those that the backlog
    /// already contains, may have queued requests.
    pub(crate) fn finish_partial_scan(&mut self, tenants: HashSet<String>) {
        if let Some(known) = &mut self.known {
            known.extend(tenants);
        }
    }

    /// Clears the backlog, because a scan did not cover the whole queue: every tenant may have queued requests.
    pub(crate) fn reset(&mut self) {
        self.known = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_added_during_a_scan_remain_in_the_backlog() {
        let mut backlog = Backlog::default();
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
