//! Model of the queue.

use std::collections::{BTreeMap, HashMap, HashSet};

use streamer_core::{Timestamp, Uid};

/// Query for due requests of several tenants.
///
/// A tenant's requests for an action are read from the highest priority downwards. In each priority, an equal number is
/// read for each of at most `users` users, oldest first. When the limit of the tenant is reached, only the oldest
/// request of one user is read from each lower priority, so that the caller sees how long these requests have waited.
#[derive(Clone, Debug)]
pub struct DueQuery {
    /// Actions to include.
    pub actions: Vec<String>,
    /// Last action and tenant of the previous page, if any. Actions, and the tenants of each, are read in the order of
    /// their names.
    pub after: Option<QueueKey>,
    /// Maximum number of tenants to read; a tenant counts once for each action.
    pub tenants: usize,
    /// Maximum number of requests per tenant and action, except that at least one request of each read user, and of
    /// each lower priority, is returned.
    pub per_tenant: usize,
    /// Maximum number of users per tenant, action and priority; at least 1.
    pub users: usize,
    /// User after whom the users of a part of the queue with a priority are read, in the order of their names; the first
    /// user follows the last.
    pub after_users: HashMap<(QueueKey, i32), String>,
    /// Number of requests to read of each user in addition to the user's share of the limit.
    pub extra_per_user: usize,
    /// Limits that replace `per_tenant` for individual tenants; 0 skips the tenant.
    pub limits: HashMap<String, usize>,
    /// Pairs of tenant and action to skip.
    pub blocked: HashSet<(String, String)>,
}

impl DueQuery {
    /// Returns the maximum number of requests of a tenant for an action; 0 if they are skipped.
    #[must_use]
    pub fn limit_of(&self, action: &str, tenant: &str) -> usize {
        // Most queries skip no pair.
        if !self.blocked.is_empty()
            && self.blocked.contains(&(tenant.to_owned(), action.to_owned()))
        {
            return 0;
        }
        self.limits.get(tenant).map_or(self.per_tenant, |limit| *limit)
    }
}

/// Part of the queue: the requests of a tenant for an action.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueKey {
    /// Name of the action.
    pub action: String,
    /// Name of the tenant.
    pub tenant: String,
}

/// Page of due requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DuePage {
    /// Requests, in no particular order.
    pub requests: Vec<DueRequest>,
    /// Tenants that may have more due requests for the actions.
    pub incomplete: HashSet<String>,
    /// Last user that was read, for each part of the queue and priority with more users than were read: values of
    /// [`DueQuery::after_users`] for the next query.
    pub next_users: HashMap<(QueueKey, i32), String>,
    /// Number of tenants that were read; a tenant counts once for each action.
    pub tenants: usize,
    /// Value of [`DueQuery::after`] for the next page: the last action and tenant that were read; `None` if none
    /// follow.
    pub next: Option<QueueKey>,
}

/// Delayed requests that were released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReleasedRequests {
    /// Number of requests.
    pub count: usize,
    /// Time at which the next delayed request becomes due; in the past if the limit was reached.
    pub next_due: Option<Timestamp>,
}

/// Numbers of due requests for the same action that precede a request in the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueAhead {
    /// Number of requests that start first: those of the same tenant with a higher priority, and older ones of the same
    /// user with the same priority.
    pub own: u64,
    /// Number of requests that may start first: those of other tenants with a higher priority, and older ones of other
    /// tenants and users with the same priority.
    pub others: u64,
}

/// Queued request that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DueRequest {
    /// Unique ID.
    pub uid: Uid,
    /// Name of the action.
    pub action: String,
    /// Tenant of the owner.
    pub tenant: String,
    /// User name of the owner.
    pub user: String,
    /// Priority, from 0 (lowest) to 9 (highest).
    pub priority: i32,
    /// Time at which the request became due.
    pub not_before: Timestamp,
}

/// Statistics of the queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Number of queued requests.
    pub queued: u64,
    /// Earliest due time of the queued requests that are due; `None` if no request is due.
    pub oldest_due: Option<Timestamp>,
    /// Due requests by action. An engine may count up to a limit.
    pub by_action: BTreeMap<String, ActionQueue>,
}

/// Due requests of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActionQueue {
    /// Number of requests.
    pub queued: u64,
    /// Earliest due time.
    pub oldest_due: Timestamp,
}
