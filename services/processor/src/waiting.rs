//! Which tenants have something in the queue that hints must not overtake.

use std::collections::HashSet;

use parking_lot::Mutex;

#[derive(Debug)]
pub(crate) struct Waiting(Mutex<Tenants>);

#[derive(Debug)]
enum Tenants {
    /// The queue has not been looked at, or not at all of it.
    Unknown,
    Known(HashSet<String>),
}

impl Default for Waiting {
    fn default() -> Self {
        Self(Mutex::new(Tenants::Unknown))
    }
}

impl Waiting {
    /// Whether something of this tenant may be waiting.
    pub(crate) fn may_have(&self, tenant: &str) -> bool {
        match &*self.0.lock() {
            Tenants::Unknown => true,
            Tenants::Known(tenants) => tenants.contains(tenant),
        }
    }

    /// Something of this tenant waits.
    pub(crate) fn note(&self, tenant: &str) {
        if let Tenants::Known(tenants) = &mut *self.0.lock()
            && !tenants.contains(tenant)
        {
            tenants.insert(tenant.to_owned());
        }
    }

    /// All of the queue was looked at, and something of these tenants was left there.
    pub(crate) fn were_left(&self, tenants: HashSet<String>) {
        *self.0.lock() = Tenants::Known(tenants);
    }

    /// Not all of the queue was looked at.
    pub(crate) fn forget(&self) {
        *self.0.lock() = Tenants::Unknown;
    }
}
