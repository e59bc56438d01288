//! Queries of the queue. Each query seeks in an index; its cost does not depend on the number of requests that are
//! queued or have ended.

use rusqlite::{Connection, OptionalExtension, params};
use streamer_core::{Timestamp, Uid, saturate};

use super::row;
use streamer_store::{
    DuePage, DueQuery, DueRequest, QueueAhead, QueueKey, QueueStats, ReleasedRequests,
    RequestRecord,
};

/// Maximum number of queued requests to count. The exact length of a longer queue is not worth the cost of counting.
const MAX_COUNTED: usize = 1_000_000;

/// Maximum number of tenants whose queues are counted.
const MAX_TENANTS: usize = 256;
/// Maximum number of users of a tenant whose queues are counted.
const MAX_USERS: usize = 16;

pub(super) fn due(db: &Connection, query: &DueQuery) -> rusqlite::Result<DuePage> {
    let mut page = DuePage::default();
    let mut actions: Vec<&String> = query.actions.iter().collect();
    actions.sort_unstable();
    for action in actions {
        let mut after_tenant = match &query.after {
            Some(after) if *action < after.action => continue,
            Some(after) if *action == after.action => after.tenant.clone(),
            _ => String::new(),
        };
        while let Some(tenant) = next_tenant(db, action, &after_tenant)? {
            if page.tenants >= query.tenants {
                return Ok(page);
            }
            let limit = query.limit_of(action, &tenant);
            if limit == 0 {
                page.incomplete.insert(tenant.clone());
            } else {
                let queue = Queue { db, tenant: &tenant, action };
                queue.read_due(limit, query, &mut page)?;
            }
            page.tenants += 1;
            page.next = Some(QueueKey { action: action.clone(), tenant: tenant.clone() });
            after_tenant = tenant;
        }
    }
    page.next = None;
    Ok(page)
}

/// Returns the first tenant after `after` with released requests for an action. Names of tenants are never empty.
fn next_tenant(db: &Connection, action: &str, after: &str) -> rusqlite::Result<Option<String>> {
    db.prepare_cached(
        "SELECT tenant FROM requests WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant > ?2
         ORDER BY tenant LIMIT 1",
    )?
    .query_row([action, after], |row| row.get(0))
    .optional()
}

/// Released requests of a tenant for an action.
struct Queue<'a> {
    db: &'a Connection,
    tenant: &'a str,
    action: &'a str,
}

/// Priority and user, in the order of the index: the highest priority first.
type Group = (i32, String);

impl Queue<'_> {
    /// Adds due requests to the page, as [`DueQuery`] describes. Seeks in the index once for each priority and user, so
    /// that no request is read that is not returned.
    fn read_due(&self, limit: usize, query: &DueQuery, page: &mut DuePage) -> rusqlite::Result<()> {
        let mut left = limit;
        let after_user = query.after_users.get(self.tenant).map(String::as_str);
        let mut is_complete = true;
        let mut next = self.first_group(i32::MAX)?;
        while let Some((priority, first_user)) = next {
            let max_users = if left == 0 { 1 } else { query.users.max(1) };
            let (users, has_more_users) =
                self.users(priority, &first_user, after_user, max_users)?;
            if has_more_users && let Some(last) = users.last() {
                page.next_users.insert(self.tenant.to_owned(), last.clone());
            }
            let each = left.div_ceil(users.len().max(1)).max(1);
            let mut unfinished = Vec::new();
            for user in users {
                let read = self.read_user((priority, &user), None, each, &mut page.requests)?;
                left = left.saturating_sub(read);
                if read == each {
                    let last = page.requests.last();
                    unfinished.extend(last.map(|last| (user, (last.not_before, last.uid))));
                }
            }
            is_complete &= !has_more_users;
            for (user, last) in unfinished {
                let of_user = (priority, user.as_str());
                let read = self.read_user(of_user, Some(last), left, &mut page.requests)?;
                is_complete &= left > 0 && read < left;
                left -= read;
            }
            next = self.first_group(priority)?;
        }
        if !is_complete {
            page.incomplete.insert(self.tenant.to_owned());
        }
        Ok(())
    }

    /// Returns the highest priority below `below`, and its first user.
    fn first_group(&self, below: i32) -> rusqlite::Result<Option<Group>> {
        self.db
            .prepare_cached(
                "SELECT priority, user FROM requests
                 WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority < ?3
                 ORDER BY priority DESC, user LIMIT 1",
            )?
            .query_row(params![self.action, self.tenant, below], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()
    }

    /// Returns at most `max` users of a priority, beginning after `after`, and whether there are more.
    fn users(
        &self,
        priority: i32,
        first: &str,
        after: Option<&str>,
        max: usize,
    ) -> rusqlite::Result<(Vec<String>, bool)> {
        let mut next = self.db.prepare_cached(
            "SELECT user FROM requests
             WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority = ?3 AND user > ?4
             ORDER BY user LIMIT 1",
        )?;
        let mut next = |after: &str| {
            next.query_row(params![self.action, self.tenant, priority, after], |row| row.get(0))
                .optional()
        };
        let begin: Option<String> = match after {
            Some(after) => next(after)?,
            None => None,
        };
        let begin = begin.unwrap_or_else(|| first.to_owned());
        let mut users = vec![begin.clone()];
        let mut last = begin.clone();
        loop {
            let following: Option<String> = next(&last)?;
            let user = following.unwrap_or_else(|| first.to_owned());
            if user == begin {
                return Ok((users, false));
            }
            if users.len() >= max {
                return Ok((users, true));
            }
            last.clone_from(&user);
            users.push(user);
        }
    }

    /// Adds up to `limit` due requests of a user to `due`, oldest first, beginning after the request with the given due
    /// time and UID. Returns their number.
    fn read_user(
        &self,
        (priority, user): (i32, &str),
        after: Option<(Timestamp, Uid)>,
        limit: usize,
        due: &mut Vec<DueRequest>,
    ) -> rusqlite::Result<usize> {
        if limit == 0 {
            return Ok(0);
        }
        let (after, after_uid) = after.map_or((i64::MIN, Vec::new()), |(time, uid)| {
            (time.as_millis(), uid.to_bytes().to_vec())
        });
        let mut statement = self.db.prepare_cached(
            "SELECT uid, not_before FROM requests
             WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority = ?3 AND user = ?4
                 AND (not_before, uid) > (?5, ?6)
             ORDER BY not_before, uid LIMIT ?7",
        )?;
        let bounds = params![
            self.action,
            self.tenant,
            priority,
            user,
            after,
            after_uid,
            saturate::to_i64(limit)
        ];
        let rows = statement.query_map(bounds, |row| {
            Ok(DueRequest {
                uid: row::uid(row, 0)?,
                action: self.action.to_owned(),
                tenant: self.tenant.to_owned(),
                user: user.to_owned(),
                priority,
                not_before: Timestamp::from_millis(row.get(1)?),
            })
        })?;
        let before = due.len();
        for request in rows {
            due.push(request?);
        }
        Ok(due.len() - before)
    }
}

pub(super) fn overdue(
    db: &Connection,
    now: Timestamp,
    limit: usize,
) -> rusqlite::Result<Vec<RequestRecord>> {
    db.prepare_cached(&format!(
        "SELECT {} FROM requests WHERE state = 0 AND expire_at <= ?1 ORDER BY expire_at LIMIT ?2",
        row::COLUMNS
    ))?
    .query_map(params![now.as_millis(), saturate::to_i64(limit)], row::record)?
    .collect()
}

pub(super) fn ahead(
    db: &Connection,
    record: &RequestRecord,
    limit: usize,
) -> rusqlite::Result<QueueAhead> {
    let mut ahead = QueueAhead::default();
    let mut after: Option<String> = None;
    for _ in 0..MAX_TENANTS {
        let after_tenant = after.as_deref().unwrap_or_default();
        let Some(tenant) = next_tenant(db, &record.action, after_tenant)? else { break };
        let queue = Queue { db, tenant: &tenant, action: &record.action };
        if tenant == record.owner.tenant {
            ahead.own = queue.count_higher(record, limit)?;
            let user = &record.owner.user;
            ahead.own += queue.count_older(record, user, left(limit, ahead.own))?;
        } else {
            ahead.others += queue.count_higher(record, left(limit, ahead.others))?;
        }
        if left(limit, ahead.others) > 0 {
            for user in queue.users_of(record.priority)? {
                if record.owner.tenant != tenant || record.owner.user != user {
                    let left = left(limit, ahead.others);
                    ahead.others += queue.count_older(record, &user, left)?;
                }
            }
        }
        after = Some(tenant);
    }
    Ok(ahead)
}

fn left(limit: usize, counted: u64) -> usize {
    limit.saturating_sub(saturate::to_usize(counted))
}

impl Queue<'_> {
    /// Counts the due requests with a higher priority than `record`, up to `limit`.
    fn count_higher(&self, record: &RequestRecord, limit: usize) -> rusqlite::Result<u64> {
        if limit == 0 {
            return Ok(0);
        }
        let counted: i64 = self
            .db
            .prepare_cached(
                "SELECT COUNT(*) FROM (
                     SELECT 1 FROM requests
                     WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority > ?3
                     LIMIT ?4)",
            )?
            .query_row(
                params![self.action, self.tenant, record.priority, saturate::to_i64(limit)],
                |row| row.get(0),
            )?;
        Ok(saturate::to_u64(counted))
    }

    /// Counts the due requests of a user with the same priority as `record` that are older, up to `limit`.
    fn count_older(
        &self,
        record: &RequestRecord,
        user: &str,
        limit: usize,
    ) -> rusqlite::Result<u64> {
        if limit == 0 {
            return Ok(0);
        }
        let counted: i64 = self
            .db
            .prepare_cached(
                "SELECT COUNT(*) FROM (
                     SELECT 1 FROM requests
                     WHERE state = 0 AND delayed = 0 AND action = ?1 AND tenant = ?2 AND priority = ?3
                         AND user = ?4 AND (not_before, uid) < (?5, ?6)
                     LIMIT ?7)",
            )?
            .query_row(
                params![
                    self.action,
                    self.tenant,
                    record.priority,
                    user,
                    record.not_before.as_millis(),
                    record.uid.to_bytes(),
                    saturate::to_i64(limit)
                ],
                |row| row.get(0),
            )?;
        Ok(saturate::to_u64(counted))
    }

    /// Returns the first [`MAX_USERS`] users with requests of a priority.
    fn users_of(&self, priority: i32) -> rusqlite::Result<Vec<String>> {
        match self.first_group(priority.saturating_add(1))? {
            Some((found, first)) if found == priority => {
                Ok(self.users(priority, &first, None, MAX_USERS)?.0)
            }
            _ => Ok(Vec::new()),
        }
    }
}

/// Returns the time at which the next delayed request becomes due.
pub(super) fn next_delayed(db: &Connection) -> rusqlite::Result<Option<Timestamp>> {
    let next: Option<i64> = db
        .prepare_cached("SELECT MIN(not_before) FROM requests WHERE state = 0 AND delayed = 1")?
        .query_row([], |row| row.get(0))?;
    Ok(next.map(Timestamp::from_millis))
}

pub(super) fn release_delayed(
    db: &Connection,
    now: Timestamp,
    limit: usize,
) -> rusqlite::Result<ReleasedRequests> {
    let count = db
        .prepare_cached(
            "UPDATE requests SET delayed = 0 WHERE uid IN (
                 SELECT uid FROM requests WHERE state = 0 AND delayed = 1 AND not_before <= ?1
                 ORDER BY not_before LIMIT ?2)",
        )?
        .execute(params![now.as_millis(), saturate::to_i64(limit)])?;
    Ok(ReleasedRequests { count, next_due: next_delayed(db)? })
}

pub(super) fn stats(db: &Connection, now: Timestamp) -> rusqlite::Result<QueueStats> {
    let queued: i64 = db
        .prepare_cached("SELECT COUNT(*) FROM (SELECT 1 FROM requests WHERE state = 0 LIMIT ?1)")?
        .query_row([saturate::to_i64(MAX_COUNTED)], |row| row.get(0))?;
    let oldest_due: Option<i64> = db
        .prepare_cached(
            "SELECT MIN(not_before) FROM requests WHERE state = 0 AND not_before <= ?1",
        )?
        .query_row([now.as_millis()], |row| row.get(0))?;
    Ok(QueueStats {
        queued: saturate::to_u64(queued),
        oldest_due: oldest_due.map(Timestamp::from_millis),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::schema::migrate;

    fn database() -> Connection {
        let db = Connection::open_in_memory().unwrap();
        migrate(&db).unwrap();
        db
    }

    fn insert(
        db: &Connection,
        number: u8,
        tenant: &str,
        action: &str,
        not_before: i64,
        delayed: bool,
    ) {
        insert_of_user(db, number, (tenant, "u"), action, 0, not_before, delayed);
    }

    fn insert_of_user(
        db: &Connection,
        number: u8,
        (tenant, user): (&str, &str),
        action: &str,
        priority: i32,
        not_before: i64,
        delayed: bool,
    ) {
        let uid = [number; 16];
        db.prepare_cached(
            "INSERT INTO requests (uid, tenant, user, action, state, attempt, last_seq, attempt_seq,
                 priority, create_time, not_before, delayed, fingerprint)
             VALUES (?1, ?2, ?3, ?4, 0, 0, 1, 0, ?5, 1, ?6, ?7, x'00')",
        )
        .unwrap()
        .execute(params![uid, tenant, user, action, priority, not_before, delayed])
        .unwrap();
    }

    fn query(actions: &[&str], tenants: usize) -> DueQuery {
        DueQuery {
            actions: actions.iter().map(ToString::to_string).collect(),
            after: None,
            tenants,
            per_tenant: 10,
            users: 3,
            after_users: HashMap::new(),
            limits: HashMap::new(),
            blocked: HashSet::new(),
        }
    }

    fn tenants(page: &DuePage) -> Vec<&str> {
        page.requests.iter().map(|request| request.tenant.as_str()).collect()
    }

    #[test]
    fn a_page_counts_only_tenants_with_released_requests_for_the_actions() {
        let db = database();
        for number in 0..100 {
            insert(&db, number, &format!("delayed-{number}"), "a", 100 + i64::from(number), true);
            insert(&db, 100 + number, &format!("other-{number}"), "unavailable", 1, false);
        }
        insert(&db, 200, "x", "a", 1, false);
        insert(&db, 201, "y", "b", 1, false);
        insert(&db, 202, "x", "b", 1, false);
        let page = due(&db, &query(&["b", "a"], 3)).unwrap();
        assert_eq!((tenants(&page), page.next.as_ref()), (vec!["x", "x", "y"], None));
        let page = due(&db, &query(&["a", "b"], 2)).unwrap();
        let last = QueueKey { action: "b".into(), tenant: "x".into() };
        assert_eq!((tenants(&page), page.next.as_ref()), (vec!["x", "x"], Some(&last)));
        let next = DueQuery { after: page.next, ..query(&["a", "b"], 2) };
        assert_eq!(tenants(&due(&db, &next).unwrap()), ["y"]);
    }

    fn uids(page: &DuePage) -> Vec<u8> {
        page.requests.iter().map(|request| request.uid.to_bytes()[0]).collect()
    }

    #[test]
    fn the_limit_of_a_tenant_is_divided_among_its_users() {
        let db = database();
        for number in 0..100 {
            insert_of_user(&db, number, ("t", "ann"), "a", 5, number.into(), false);
        }
        insert_of_user(&db, 100, ("t", "bob"), "a", 5, 99, false);
        insert_of_user(&db, 101, ("t", "eve"), "a", 0, 1, false);
        insert_of_user(&db, 102, ("t", "eve"), "a", 0, 2, false);
        let limited = |per_tenant| DueQuery { per_tenant, ..query(&["a"], 3) };
        let page = due(&db, &limited(4)).unwrap();
        assert_eq!(uids(&page), [0, 1, 100, 2, 101], "bob has one request, eve has waited");
        assert!(page.incomplete.contains("t"));
        let page = due(&db, &limited(1)).unwrap();
        assert_eq!(uids(&page), [0, 100, 101], "one request of each user");
        assert_eq!(due(&db, &limited(200)).unwrap().requests.len(), 103);
        assert!(due(&db, &limited(200)).unwrap().incomplete.is_empty());
    }

    #[test]
    fn the_users_of_a_tenant_are_read_in_turn() {
        let db = database();
        for (number, user) in (0..).zip(["ann", "bob", "cid", "dan", "eve"]) {
            insert_of_user(&db, number, ("t", user), "a", 0, 1, false);
        }
        let mut query = DueQuery { users: 2, ..query(&["a"], 3) };
        let mut read = Vec::new();
        for _ in 0..5 {
            let page = due(&db, &query).unwrap();
            assert!(page.incomplete.contains("t"));
            read.push(uids(&page));
            query.after_users = page.next_users;
        }
        assert_eq!(read, [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]);
        query.users = 5;
        let page = due(&db, &query).unwrap();
        assert_eq!((uids(&page), page.next_users.len()), (vec![0, 1, 2, 3, 4], 0));
    }

    #[test]
    fn delayed_requests_are_released_earliest_first() {
        let db = database();
        for (number, not_before) in [(1, 90), (2, 70), (3, 80), (4, 110)] {
            insert(&db, number, &format!("t{number}"), "a", not_before, true);
        }
        let now = Timestamp::from_millis(100);
        let released = release_delayed(&db, now, 2).unwrap();
        assert_eq!(
            released,
            ReleasedRequests { count: 2, next_due: Some(Timestamp::from_millis(90)) }
        );
        assert_eq!(tenants(&due(&db, &query(&["a"], 10)).unwrap()), ["t2", "t3"]);
        let released = release_delayed(&db, now, 2).unwrap();
        assert_eq!(
            released,
            ReleasedRequests { count: 1, next_due: Some(Timestamp::from_millis(110)) }
        );
        assert_eq!(next_delayed(&db).unwrap(), released.next_due);
    }

    /// A query that reads the table or another index would depend on the number of other requests.
    #[test]
    fn every_query_of_the_queue_uses_its_index() {
        let db = database();
        let ready = "state = 0 AND delayed = 0 AND action = 'a' AND";
        for (sql, index) in [
            (format!("SELECT tenant FROM requests WHERE {ready} tenant > 't' ORDER BY tenant LIMIT 1"), "ready"),
            (
                format!(
                    "SELECT priority, user FROM requests WHERE {ready} tenant = 't' AND priority < 3
                         ORDER BY priority DESC, user LIMIT 1"
                ),
                "ready",
            ),
            (
                format!(
                    "SELECT user FROM requests WHERE {ready} tenant = 't' AND priority = 3 AND user > 'u'
                         ORDER BY user LIMIT 1"
                ),
                "ready",
            ),
            (
                format!(
                    "SELECT uid, not_before FROM requests WHERE {ready} tenant = 't' AND priority = 3 AND user = 'u'
                         AND (not_before, uid) > (1, x'00')
                     ORDER BY not_before, uid LIMIT 5"
                ),
                "ready",
            ),
            ("SELECT MIN(not_before) FROM requests WHERE state = 0 AND delayed = 1".into(), "delayed"),
            (
                "SELECT uid FROM requests WHERE state = 0 AND delayed = 1 AND not_before <= 1
                     ORDER BY not_before LIMIT 2"
                    .into(),
                "delayed",
            ),
            ("SELECT MIN(not_before) FROM requests WHERE state = 0 AND not_before <= 1".into(), "waiting"),
        ] {
            let mut statement = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let plan = statement.query_map([], |row| row.get::<_, String>(3)).unwrap();
            let plan: Vec<String> = plan.map(Result::unwrap).collect();
            let expected = format!("SEARCH requests USING COVERING INDEX requests_{index}");
            assert!(plan.len() == 1 && plan[0].starts_with(&expected), "{sql}: {plan:?}");
        }
    }
}
