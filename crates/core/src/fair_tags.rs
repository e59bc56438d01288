//! Accounts of start-time fair queueing (P. Goyal, H. Vin and H. Cheng, "Start-time Fair Queueing", 1996), which
//! divides a resource fairly between tenants.
//!
//! The user of this module serves the tenant with the smallest start tag first. While a tenant has work, its next start
//! tag is its last finish tag: the start tag plus the cost of the work. A tenant that gets work again after an idle time
//! starts at the virtual time, so that idle time gives no credit, or at its last finish tag if that is more.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

/// Maximum number of finish tags; when it is exceeded, the smallest one is forgotten.
const MAX_TAGS: usize = 4096;

/// Virtual time, and finish tags of idle tenants. `T` is the unit of the cost, such as bytes.
///
/// Only tags after the virtual time are kept, because a tenant with an earlier tag starts at the virtual time.
#[derive(Clone, Debug, Default)]
pub struct FairTags<T> {
    /// Maximum start tag of the work that was served.
    virtual_time: T,
    by_tenant: HashMap<Arc<str>, T>,
    by_tag: BTreeSet<(T, Arc<str>)>,
}

impl<T: Copy + Ord> FairTags<T> {
    /// Returns the start tag of a tenant that gets work.
    #[must_use]
    pub fn start_tag(&self, tenant: &str) -> T {
        let last = self.by_tenant.get(tenant).copied();
        last.map_or(self.virtual_time, |tag| tag.max(self.virtual_time))
    }

    /// Advances the virtual time: work with the given start tag is served.
    pub fn start(&mut self, start_tag: T) {
        self.virtual_time = self.virtual_time.max(start_tag);
        while let Some((tag, _)) = self.by_tag.first()
            && *tag <= self.virtual_time
        {
            self.forget_first();
        }
    }

    /// Stores the finish tag of a tenant that has become idle.
    pub fn finish(&mut self, tenant: &Arc<str>, finish_tag: T) {
        if finish_tag <= self.virtual_time {
            return;
        }
        if let Some(old) = self.by_tenant.insert(tenant.clone(), finish_tag) {
            self.by_tag.remove(&(old, tenant.clone()));
        }
        self.by_tag.insert((finish_tag, tenant.clone()));
        if self.by_tag.len() > MAX_TAGS {
            self.forget_first();
        }
    }

    /// Forgets all finish tags, because no tenant has work.
    pub fn clear(&mut self) {
        self.by_tenant.clear();
        self.by_tag.clear();
    }

    fn forget_first(&mut self) {
        if let Some((_, tenant)) = self.by_tag.pop_first() {
            self.by_tenant.remove(&tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(tags: &mut FairTags<u64>, tenant: &str, cost: u64) {
        let start = tags.start_tag(tenant);
        tags.start(start);
        tags.finish(&tenant.into(), start + cost);
    }

    #[test]
    fn a_tenant_starts_at_its_last_finish_tag() {
        let mut tags = FairTags::default();
        serve(&mut tags, "a", 10);
        serve(&mut tags, "b", 3);
        assert_eq!((tags.start_tag("a"), tags.start_tag("b")), (10, 3));
        serve(&mut tags, "b", 4);
        assert_eq!((tags.start_tag("a"), tags.start_tag("b")), (10, 7));
    }

    #[test]
    fn an_idle_tenant_accumulates_no_credit() {
        let mut tags = FairTags::default();
        serve(&mut tags, "idle", 5);
        (0..10).for_each(|_| serve(&mut tags, "busy", 10));
        assert_eq!(tags.start_tag("busy"), 100);
        assert_eq!(tags.start_tag("idle"), 90, "the virtual time");
        assert_eq!(tags.start_tag("new"), 90);
        assert_eq!(tags.by_tenant.len(), 1, "the tag of the idle tenant has passed");
    }

    #[test]
    fn the_virtual_time_and_tags_never_decrease() {
        let mut tags = FairTags::default();
        tags.start(50);
        tags.start(20);
        tags.finish(&"a".into(), 40);
        assert_eq!(tags.start_tag("a"), 50);
    }

    #[test]
    fn after_no_tenant_had_work_all_start_at_the_same_time() {
        let mut tags = FairTags::default();
        serve(&mut tags, "a", 10);
        tags.clear();
        assert_eq!(tags.start_tag("a"), tags.start_tag("b"));
    }

    #[test]
    fn the_number_of_tags_is_limited() {
        let mut tags = FairTags::default();
        for number in 1..=MAX_TAGS as u64 + 10 {
            serve(&mut tags, &number.to_string(), number);
        }
        assert_eq!((tags.by_tenant.len(), tags.by_tag.len()), (MAX_TAGS, MAX_TAGS));
        assert_eq!(tags.start_tag("10"), 0, "the smallest tags are forgotten");
        assert_eq!(tags.start_tag("11"), 11);
    }
}
