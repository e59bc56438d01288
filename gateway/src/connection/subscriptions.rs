//! The requests that a connection is subscribed to, and those that it will be: each found by any of
//! its names in the same time, however many there are.

use std::collections::{BTreeSet, HashMap};

use streamer_core::{OpenWatch, Timestamp, Uid};

use super::delivery::Subscription;

#[derive(Default)]
pub(crate) struct Subscriptions {
    by_uid: HashMap<Uid, Subscription>,
    /// By `request_id`, where that is not the `uid`; requests of colleagues may have the same one.
    by_name: BTreeSet<(Box<str>, Uid)>,
    opening: Opening,
}

/// Calls that will become subscriptions.
#[derive(Default)]
struct Opening {
    /// By the name that was given; those without a watch are not wanted any longer.
    by_name: HashMap<Box<str>, Vec<Option<OpenWatch>>>,
    count: usize,
}

impl Subscriptions {
    /// How many are open or opening.
    pub(crate) fn count(&self) -> usize {
        self.by_uid.len() + self.opening.count
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
        let names = &subscription.topic.names;
        if names.request_id != names.uid {
            self.by_name.insert((names.request_id.as_str().into(), uid));
        }
        self.by_uid.insert(uid, subscription);
    }

    pub(crate) fn remove(&mut self, uid: Uid) -> Option<Subscription> {
        let subscription = self.by_uid.remove(&uid)?;
        self.by_name.remove(&(subscription.topic.names.request_id.as_str().into(), uid));
        Some(subscription)
    }

    /// The request of this name, if there is a subscription to it.
    pub(crate) fn find(&self, name: &str) -> Option<Uid> {
        let first = (name.into(), Uid::first_of(Timestamp::default()));
        let named = self.by_name.range(first..).next().filter(|(found, _)| **found == *name);
        named
            .map(|(_, uid)| *uid)
            .or_else(|| name.parse().ok().filter(|uid| self.by_uid.contains_key(uid)))
    }

    /// Counts a subscription under this name that is opening.
    pub(crate) fn begin_opening(&mut self, name: &str, watch: OpenWatch) {
        self.opening.by_name.entry(name.into()).or_default().push(Some(watch));
        self.opening.count += 1;
    }

    /// Ends the oldest opening under this name; returns its watch if the subscription is still wanted.
    pub(crate) fn finish_opening(&mut self, name: &str) -> Option<OpenWatch> {
        let opening = self.opening.by_name.get_mut(name)?;
        self.opening.count -= 1;
        let watch = opening.remove(0);
        if opening.is_empty() {
            self.opening.by_name.remove(name);
        }
        watch
    }

    /// Marks those that are opening under this name as not wanted.
    pub(crate) fn cancel_opening(&mut self, name: &str) {
        let opening = self.opening.by_name.get_mut(name).into_iter().flatten();
        opening.for_each(|watch| *watch = None);
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::{LimitsByTenant, OpenWatches};

    use super::*;

    #[test]
    fn what_is_given_up_while_it_is_on_its_way_is_not_wanted() {
        let watches = OpenWatches::new(LimitsByTenant::default()).of("acme", "ann");
        let begin = |subscriptions: &mut Subscriptions, name| {
            subscriptions.begin_opening(name, watches.open().unwrap());
        };
        let mut subscriptions = Subscriptions::default();
        begin(&mut subscriptions, "a");
        begin(&mut subscriptions, "a");
        begin(&mut subscriptions, "b");
        subscriptions.cancel_opening("a");
        subscriptions.cancel_opening("unknown");
        begin(&mut subscriptions, "a");
        assert_eq!(subscriptions.count(), 4);
        let wanted = ["a", "a", "a", "b", "unknown"]
            .map(|name| subscriptions.finish_opening(name).is_some());
        assert_eq!(wanted, [false, false, true, true, false]);
        assert!(subscriptions.count() == 0 && subscriptions.opening.by_name.is_empty());
    }
}
