//! Reads due requests.

use futures_util::future::try_join_all;
use streamer_store::{DuePage, DueQuery, DueRequest, QueueKey, StoreError};

use super::{
    Cursor, IndexItem, action_prefix, first_item, key_after, key_after_prefix, priority_prefix,
    tenant_prefix, user_prefix,
};
use crate::client::Dynamo;

impl Dynamo {
    pub(crate) async fn due(&self, query: &DueQuery) -> Result<DuePage, StoreError> {
        let mut page = DuePage::default();
        let mut cursors = self.cursors(query.per_tenant);
        let mut actions: Vec<&str> = query.actions.iter().map(String::as_str).collect();
        actions.sort_unstable();
        let mut from = match &query.after {
            Some(after) => key_after_prefix(&tenant_prefix(&after.action, &after.tenant)),
            None => String::new(),
        };
        for action in actions {
            from = from.max(action_prefix(action));
            while let Some(first) = first_item(&mut cursors, &from).await? {
                if first.action != action {
                    break;
                }
                if page.tenants >= query.tenants {
                    return Ok(page);
                }
                let tenant = first.tenant;
                let limit = query.limit_of(action, &tenant);
                if limit == 0 {
                    page.incomplete.insert(tenant.clone());
                } else {
                    let queue = Queue { dynamo: self, action, tenant: &tenant, query };
                    queue.read_due(&mut cursors, limit, &mut page).await?;
                }
                from = key_after_prefix(&tenant_prefix(action, &tenant));
                page.tenants += 1;
                page.next = Some(QueueKey { action: action.to_owned(), tenant });
            }
        }
        page.next = None;
        Ok(page)
    }
}

/// Ready requests of a tenant for an action.
struct Queue<'a> {
    dynamo: &'a Dynamo,
    action: &'a str,
    tenant: &'a str,
    query: &'a DueQuery,
}

/// Requests of one user, in the order in which they are claimed.
struct UserRequests {
    user: String,
    requests: Vec<DueRequest>,
    /// Whether more requests of the user may be due.
    has_more: bool,
}

impl Queue<'_> {
    /// Adds due requests to the page, as [`DueQuery`] describes.
    async fn read_due(
        &self,
        cursors: &mut [Cursor<'_>],
        limit: usize,
        page: &mut DuePage,
    ) -> Result<(), StoreError> {
        let mut left = limit;
        let mut key =
            (QueueKey { action: self.action.to_owned(), tenant: self.tenant.to_owned() }, i32::MAX);
        let extra = self.query.extra_per_user;
        let mut from = tenant_prefix(self.action, self.tenant);
        let mut is_complete = true;
        while let Some(first) = self.first(cursors, &from).await? {
            let priority = first.priority;
            let start = priority_prefix(self.action, self.tenant, priority);
            let is_full = left == 0;
            let max_users = if is_full { 1 } else { self.query.users.max(1) };
            let wanted_of_user = left.max(1) + extra;
            key.1 = priority;
            let after_user = self.query.after_users.get(&key);
            let begin = match after_user {
                Some(user) => key_after_prefix(&self.user_prefix(priority, user)),
                None => start.clone(),
            };
            let (mut users, mut has_more_users) =
                self.users(cursors, priority, (&begin, None), max_users, wanted_of_user).await?;
            if after_user.is_some() && !has_more_users {
                // Begins with the first user again, which needs cursors at the beginning.
                let mut cursors = self.dynamo.cursors(self.query.per_tenant);
                let wanted = max_users - users.len();
                let until = Some(begin.as_str());
                let (wrapped, has_more) = self
                    .users(&mut cursors, priority, (&start, until), wanted, wanted_of_user)
                    .await?;
                has_more_users = has_more;
                users.extend(wrapped);
            }
            if has_more_users
                && !is_full
                && let Some(last) = users.last()
            {
                page.next_users.insert(key.clone(), last.user.clone());
            }
            is_complete &= !has_more_users;
            let all_extra = extra * users.len();
            let (shares, has_more) = divide(users, left + all_extra);
            is_complete &= !has_more;
            left = left.saturating_sub(shares.len());
            page.requests.extend(shares);
            from = key_after_prefix(&start);
        }
        if !is_complete {
            page.incomplete.insert(self.tenant.to_owned());
        }
        Ok(())
    }

    fn user_prefix(&self, priority: i32, user: &str) -> String {
        user_prefix(self.action, self.tenant, priority, user)
    }

    /// Returns the first item of this queue at or after the key `from`.
    async fn first(
        &self,
        cursors: &mut [Cursor<'_>],
        from: &str,
    ) -> Result<Option<IndexItem>, StoreError> {
        let first = first_item(cursors, from).await?;
        Ok(first.filter(|item| item.is_of(self.action, self.tenant)))
    }

    /// Reads up to `limit` due requests of each of at most `max` users of a priority, between two keys. Also returns
    /// whether there are more users.
    async fn users(
        &self,
        cursors: &mut [Cursor<'_>],
        priority: i32,
        (begin, end): (&str, Option<&str>),
        max: usize,
        limit: usize,
    ) -> Result<(Vec<UserRequests>, bool), StoreError> {
        let mut users = Vec::new();
        let mut from = begin.to_owned();
        while let Some(first) = self.first(cursors, &from).await? {
            if first.priority != priority || end.is_some_and(|end| first.rank.as_str() >= end) {
                break;
            }
            if users.len() >= max {
                return Ok((users, true));
            }
            let prefix = self.user_prefix(priority, &first.user);
            users.push(self.requests_of_user(cursors, first.user, &prefix, limit).await?);
            from = key_after_prefix(&prefix);
        }
        Ok((users, false))
    }

    /// Reads up to `limit` due requests of a user, in the order in which they are claimed.
    async fn requests_of_user(
        &self,
        cursors: &mut [Cursor<'_>],
        user: String,
        prefix: &str,
        limit: usize,
    ) -> Result<UserRequests, StoreError> {
        let jitter = &self.dynamo.claim_jitter;
        let wanted = jitter.read_limit(limit);
        let found = try_join_all(cursors.iter_mut().map(async |cursor| {
            let mut due = Vec::new();
            let mut from = prefix.to_owned();
            while due.len() < wanted
                && let Some(item) = cursor.seek(&from).await?
                && item.rank.starts_with(prefix)
            {
                due.push(item.due());
                from = key_after(&item.rank);
            }
            Ok::<_, StoreError>(due)
        }))
        .await?;
        let mut has_more = found.iter().any(|of_shard| of_shard.len() >= wanted);
        let mut requests: Vec<DueRequest> = found.into_iter().flatten().collect();
        requests.sort_by_cached_key(|request| {
            let jitter_ms = jitter.jitter_ms(request.uid);
            (request.not_before.as_millis() + jitter_ms, request.uid)
        });
        has_more |= requests.len() > limit;
        requests.truncate(limit);
        Ok(UserRequests { user, requests, has_more })
    }
}

/// Divides `limit` equally among users, but returns at least one request of each. Also returns whether requests are left.
fn divide(mut users: Vec<UserRequests>, limit: usize) -> (Vec<DueRequest>, bool) {
    let wanted = limit.max(users.len());
    let mut counts = vec![0; users.len()];
    let mut left = wanted;
    while left > 0 {
        let mut has_given = false;
        for (count, user) in counts.iter_mut().zip(&users) {
            if left > 0 && *count < user.requests.len() {
                *count += 1;
                left -= 1;
                has_given = true;
            }
        }
        if !has_given {
            break;
        }
    }
    let mut has_more = false;
    let mut shares = Vec::with_capacity(wanted - left);
    for (user, count) in users.iter_mut().zip(counts) {
        has_more |= user.has_more || user.requests.len() > count;
        shares.extend(user.requests.drain(..count));
    }
    (shares, has_more)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use streamer_core::{Timestamp, Uid};

    use super::*;

    fn user(name: &str, requests: usize) -> UserRequests {
        let request = DueRequest {
            uid: Uid::new(Timestamp::from_millis(1)),
            action: "a".into(),
            tenant: "t".into(),
            user: name.into(),
            priority: 0,
            not_before: Timestamp::from_millis(1),
        };
        UserRequests { user: name.into(), requests: vec![request; requests], has_more: false }
    }

    fn shares(users: Vec<UserRequests>, limit: usize) -> (Vec<(String, usize)>, bool) {
        let (requests, has_more) = divide(users, limit);
        let mut counts: HashMap<String, usize> = HashMap::new();
        requests.into_iter().for_each(|request| *counts.entry(request.user).or_default() += 1);
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort();
        (counts, has_more)
    }

    #[test]
    fn a_limit_is_divided_equally_and_each_user_gets_one() {
        let of = |name: &str, count| (name.to_owned(), count);
        let users = || vec![user("ann", 100), user("bob", 1), user("eve", 3)];
        assert_eq!(shares(users(), 7), (vec![of("ann", 3), of("bob", 1), of("eve", 3)], true));
        assert_eq!(shares(users(), 1), (vec![of("ann", 1), of("bob", 1), of("eve", 1)], true));
        assert_eq!(shares(users(), 104), (vec![of("ann", 100), of("bob", 1), of("eve", 3)], false));
        assert_eq!(shares(vec![user("bob", 1)], 0), (vec![of("bob", 1)], false));
    }
}
