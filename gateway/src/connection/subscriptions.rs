//! Open and pending subscriptions of a connection, indexed by `request_id` and uid, so that a lookup
//! does not scan them.

use std::collections::{BTreeSet, HashMap};

use streamer_core::{Timestamp, Uid, WatchPermit};

use super::subscription::Subscription;

#[derive(Default)]
pub(crate) struct Subscriptions {
    by_uid: HashMap<Uid, Subscription>,
    /// Open subscriptions by `request_id`, if it differs from the uid. Requests of different users may have the same
    /// `request_id`.
    by_request_id: BTreeSet<(Box<str>, Uid)>,
    pending: Pending,
}

/// Subscriptions that have not been opened yet.
#[derive(Default)]
struct Pending {
    /// Watches of pending subscriptions by the identifier that the client sent; `None` for a cancelled subscription.
    by_request_id: HashMap<Box<str>, Vec<Option<WatchPermit>>>,
    count: usize,
}

impl Subscriptions {
    /// Returns the number of open and pending subscriptions.
    pub(crate) fn count(&self) -> usize {
        self.by_uid.len() + self.pending.count
    }

    pub(crate) fn get(&self, uid: Uid) -> Option<&Subscription> {
        self.by_uid.get(&uid)
    }

    pub(crate) fn get_mut(&mut self, uid: Uid) -> Option<&mut Subscription> {
        self.by_uid.get_mut(&uid)
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &Subscription> {
        self.by_uid.values()
    }

    pub(crate) fn insert(&mut self, uid: Uid, subscription: Subscription) {
        let ids = &subscription.topic.ids;
        if ids.request_id != ids.uid {
            self.by_request_id.insert((ids.request_id.as_str().into(), uid));
        }
        self.by_uid.insert(uid, subscription);
    }

    pub(crate) fn remove(&mut self, uid: Uid) -> Option<Subscription> {
        let subscription = self.by_uid.remove(&uid)?;
        self.by_request_id.remove(&(subscription.topic.ids.request_id.as_str().into(), uid));
        Some(subscription)
    }

    /// Returns the subscribed request with the given `request_id` or uid.
    pub(crate) fn find(&self, request_id: &str) -> Option<Uid> {
        let first = (request_id.into(), Uid::first_of(Timestamp::default()));
        let matching =
            self.by_request_id.range(first..).next().filter(|(found, _)| **found == *request_id);
        matching
            .map(|(_, uid)| *uid)
            .or_else(|| request_id.parse().ok().filter(|uid| self.by_uid.contains_key(uid)))
    }

    /// Adds a pending subscription with the given identifier.
    pub(crate) fn add_pending(&mut self, request_id: &str, watch: WatchPermit) {
        self.pending.by_request_id.entry(request_id.into()).or_default().push(Some(watch));
        self.pending.count += 1;
    }

    /// Removes the oldest pending subscription with the given identifier. Returns its watch, or `None` if the
    /// subscription was cancelled.
    pub(crate) fn take_pending(&mut self, request_id: &str) -> Option<WatchPermit> {
        let pending = self.pending.by_request_id.get_mut(request_id)?;
        self.pending.count -= 1;
        let watch = pending.remove(0);
        if pending.is_empty() {
            self.pending.by_request_id.remove(request_id);
        }
        watch
    }

    /// Cancels the pending subscriptions with the given identifier.
    pub(crate) fn cancel_pending(&mut self, request_id: &str) {
        let pending = self.pending.by_request_id.get_mut(request_id).into_iter().flatten();
        pending.for_each(|watch| *watch = None);
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::{LimitsByTenant, OpenWatches};

    use super::*;

    #[test]
    fn cancelled_pending_subscriptions_return_no_watch() {
        let watches = OpenWatches::new(LimitsByTenant::default()).of("acme", "ann");
        let begin = |subscriptions: &mut Subscriptions, request_id| {
            subscriptions.add_pending(request_id, watches.open().unwrap());
        };
        let mut subscriptions = Subscriptions::default();
        begin(&mut subscriptions, "a");
        begin(&mut subscriptions, "a");
        begin(&mut subscriptions, "b");
        subscriptions.cancel_pending("a");
        subscriptions.cancel_pending("unknown");
        begin(&mut subscriptions, "a");
        assert_eq!(subscriptions.count(), 4);
        let has_watch = ["a", "a", "a", "b", "unknown"]
            .map(|request_id| subscriptions.take_pending(request_id).is_some());
        assert_eq!(has_watch, [false, false, true, true, false]);
        assert!(subscriptions.count() == 0 && subscriptions.pending.by_request_id.is_empty());
    }
}
