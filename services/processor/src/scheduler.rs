//! Decides which queued requests start, and which part of the queue is read next.
//!
//! [`Scheduler`] has no I/O and no clock: the dispatcher reads the pages of the queue that it asks for, starts the
//! requests that it selects, and passes hints and times to it.

mod backlog;
pub(crate) mod concurrency_limiter;
mod fair_queue;
mod quarantine;
pub(crate) mod runtime_estimates;
pub(crate) mod wakeup;

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use streamer_core::{Timestamp, Uid};
use streamer_store::{DuePage, DueQuery, DueRequest, QueueKey};

use backlog::Backlog;
use fair_queue::FairQueue;
pub(crate) use fair_queue::Load;
use quarantine::Quarantine;

/// Maximum number of requests of one tenant and action read from the queue's index per page.
const PER_TENANT: usize = 256;
/// Maximum number of tenants read per page.
const TENANTS: usize = 256;
/// Maximum number of users of a tenant, action and priority read per page.
const USERS: usize = 16;
/// Maximum number of positions among users; when it is exceeded, all of them begin with the first user again.
const MAX_USER_POSITIONS: usize = 10_000;

/// State of the scheduling of one processor.
#[derive(Debug)]
pub(crate) struct Scheduler {
    backlog: Backlog,
    fair_queue: FairQueue,
    quarantine: Quarantine,
    /// Time at which the earliest known delayed request is due.
    next_due: Option<Timestamp>,
    /// Where the next page begins; a page contains a limited number of tenants.
    after: Option<QueueKey>,
    /// User after whom the next page begins, by part of the queue and priority.
    after_users: HashMap<(QueueKey, i32), String>,
    /// Pairs of tenant and action without capacity. Later pages skip their requests, and find those behind them.
    blocked: HashSet<(String, String)>,
    /// The page that is being read.
    page: PageState,
}

/// Properties of a query that are needed when its page is planned.
#[derive(Debug, Default)]
struct PageState {
    /// Whether the page begins at the beginning of the queue.
    is_first: bool,
    /// Whether actions without capacity were excluded.
    is_partial: bool,
}

/// Capacity for additional attempts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Capacity {
    /// Actions for which a slot is free.
    pub(crate) actions: Vec<String>,
    /// Whether a known action has no free slot.
    pub(crate) is_partial: bool,
    /// Number of additional attempts in total.
    pub(crate) total: usize,
    /// Number of additional attempts of each tenant with running attempts, including those that are being claimed, which
    /// the index still contains.
    pub(crate) by_tenant: HashMap<String, usize>,
}

/// Hint that a request is queued.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hint<'a> {
    pub(crate) tenant: &'a str,
    pub(crate) user: &'a str,
    /// Time at which the request becomes due; `None` if it is due.
    pub(crate) not_before: Option<Timestamp>,
}

/// Decision about a hint.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum HintDecision<P> {
    /// The request is delayed. Contains whether it is the first one that becomes due.
    Delayed(bool),
    /// The request starts, with the given slot.
    Start(P),
    /// The request is found by the next scan.
    Scan,
}

/// Result of the search for a slot for a due request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Slot<P> {
    /// A slot is acquired.
    Free(P),
    /// No slot is available for the tenant and action.
    None,
    /// The request is being claimed; the index does not reflect it yet.
    Claiming,
    /// The previous attempt of the request is being removed; the next one may start after that.
    Ending,
}

/// Requests to start.
#[derive(Debug)]
pub(crate) struct Plan<P> {
    /// Requests with their slots, in the order in which they start.
    pub(crate) starts: Vec<(DueRequest, P)>,
    /// Whether more due requests may be queued.
    pub(crate) has_more: bool,
    /// Whether a pair of tenant and action turned out to have no capacity, so that the next page may contain requests
    /// behind it.
    pub(crate) has_blocked: bool,
}

impl Scheduler {
    /// Creates a scheduler. The priority of a request counts as one higher for each `aging` that the request has waited,
    /// and does not change if `aging` is zero.
    pub(crate) fn new(aging: Duration) -> Self {
        Self {
            backlog: Backlog::default(),
            fair_queue: FairQueue::new(aging),
            quarantine: Quarantine::default(),
            next_due: None,
            after: None,
            after_users: HashMap::new(),
            blocked: HashSet::new(),
            page: PageState::default(),
        }
    }

    /// Handles a hint. `acquire` returns a slot for the request, if one is available.
    pub(crate) fn on_hint<P>(
        &mut self,
        hint: Hint<'_>,
        now: Timestamp,
        acquire: impl FnOnce() -> Option<P>,
    ) -> HintDecision<P> {
        if let Some(due) = hint.not_before.filter(|due| *due > now) {
            return HintDecision::Delayed(self.on_delayed(due));
        }
        // A request does not overtake queued requests of its tenant, even if a slot is free during a scan. It may
        // overtake those of other tenants, which wait for their own slots.
        let slot = if self.backlog.may_contain(hint.tenant) { None } else { acquire() };
        match slot {
            Some(slot) => {
                self.fair_queue.charge(hint.tenant, hint.user);
                HintDecision::Start(slot)
            }
            None => {
                self.backlog.insert(hint.tenant);
                HintDecision::Scan
            }
        }
    }

    /// Records that a request becomes due at the given time. Returns whether it is the first one.
    pub(crate) fn on_delayed(&mut self, due: Timestamp) -> bool {
        let is_first = self.next_due.is_none_or(|next| due < next);
        if is_first {
            self.next_due = Some(due);
        }
        is_first
    }

    /// Returns the time at which the earliest known delayed request is due.
    pub(crate) fn next_due(&self) -> Option<Timestamp> {
        self.next_due
    }

    /// Begins the release of delayed requests that are due. Returns the earliest known due time; times that are recorded
    /// from here on are compared with those of the store by [`Self::end_release`].
    pub(crate) fn begin_release(&mut self) -> Option<Timestamp> {
        self.next_due.take()
    }

    /// Ends the release of delayed requests; `next_due` is the earliest due time of the others.
    pub(crate) fn end_release(&mut self, next_due: Option<Timestamp>) {
        self.next_due = [self.next_due, next_due].into_iter().flatten().min();
    }

    /// Forgets which tenants and actions had no capacity, because slots were freed.
    pub(crate) fn on_slots_freed(&mut self) {
        self.blocked.clear();
    }

    /// Excludes a request from plans for some time, because it cannot be claimed.
    pub(crate) fn quarantine(&mut self, uid: Uid, now: Timestamp) {
        self.quarantine.insert(uid, now);
    }

    /// Returns the query for the next page of due requests.
    pub(crate) fn next_query(&mut self, capacity: Capacity, now: Timestamp) -> DueQuery {
        let limits = capacity.by_tenant.into_iter();
        let limits = limits.map(|(tenant, limit)| (tenant, limit.min(PER_TENANT))).collect();
        let after = self.after.take();
        self.page = PageState { is_first: after.is_none(), is_partial: capacity.is_partial };
        self.backlog.begin_scan();
        DueQuery {
            actions: capacity.actions,
            after,
            tenants: TENANTS,
            per_tenant: capacity.total.clamp(1, PER_TENANT),
            users: USERS,
            after_users: self.after_users.clone(),
            // The page includes quarantined requests.
            extra_per_user: self.quarantine.count(now),
            limits,
            blocked: self.blocked.clone(),
        }
    }

    /// Selects the requests of a page that start. `find_slot` searches for a slot for a request.
    pub(crate) fn plan<P>(
        &mut self,
        page: DuePage,
        load: &Load,
        now: Timestamp,
        mut find_slot: impl FnMut(&DueRequest) -> Slot<P>,
    ) -> Plan<P> {
        let is_complete = page.next.is_none() && self.page.is_first;
        self.after = page.next;
        self.move_users(page.next_users, &page.requests);
        let mut remaining = page.incomplete;
        let mut plan = Plan { starts: Vec::new(), has_more: false, has_blocked: false };
        for request in self.fair_queue.order(page.requests, load, now) {
            if self.quarantine.contains(request.uid) {
                remaining.insert(request.tenant);
                continue;
            }
            match find_slot(&request) {
                Slot::Free(slot) => {
                    self.fair_queue.charge(&request.tenant, &request.user);
                    plan.starts.push((request, slot));
                }
                Slot::Claiming => {}
                Slot::Ending => {
                    remaining.insert(request.tenant);
                }
                Slot::None => {
                    remaining.insert(request.tenant.clone());
                    plan.has_blocked |= self.blocked.insert((request.tenant, request.action));
                }
            }
        }
        plan.has_more = !is_complete || !remaining.is_empty();
        match (is_complete, self.page.is_partial) {
            (true, true) => self.backlog.finish_partial_scan(remaining),
            (true, false) => self.backlog.finish_scan(remaining),
            (false, _) => self.backlog.reset(),
        }
        plan
    }

    /// Continues after the users of a page; where all users were read, the next page begins with the first user again.
    fn move_users(&mut self, next_users: HashMap<(QueueKey, i32), String>, read: &[DueRequest]) {
        if !self.after_users.is_empty() {
            for DueRequest { action, tenant, priority, .. } in read {
                let key = QueueKey { action: action.clone(), tenant: tenant.clone() };
                self.after_users.remove(&(key, *priority));
            }
        }
        if self.after_users.len() + next_users.len() > MAX_USER_POSITIONS {
            self.after_users.clear();
        }
        self.after_users.extend(next_users);
    }
}

#[cfg(test)]
mod tests;
