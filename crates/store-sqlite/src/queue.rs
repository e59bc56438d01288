//! Queries of the queue. Each query seeks in an index; its cost does not depend on the number of requests that are
//! queued or have ended.

mod tenant_queue;

use rusqlite::{Connection, OptionalExtension, params};
use streamer_core::{Timestamp, saturate};

use super::row;
use streamer_store::{
    ActionQueue, DuePage, DueQuery, Owner, QueueAhead, QueueKey, QueueStats, ReleasedRequests,
    RequestRecord,
};

use tenant_queue::Queue;

/// Maximum number of queued requests to count. The exact length of a longer queue is not worth the cost of counting.
const MAX_COUNTED: usize = 1_000_000;

/// Maximum number of tenants whose queues are counted.
const MAX_TENANTS: usize = 256;

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
    let Owner { tenant, user } = &record.owner;
    let own = Queue { db, tenant, action: &record.action };
    let mut ahead = QueueAhead { own: own.count_higher(record, limit)?, others: 0 };
    ahead.own += own.count_older(record, user, left(limit, ahead.own))?;
    for other in own.users_of(record.priority)?.iter().filter(|other| *other != user) {
        ahead.others += own.count_older(record, other, left(limit, ahead.others))?;
    }
    let mut after_tenant = String::new();
    for _ in 0..MAX_TENANTS {
        if left(limit, ahead.others) == 0 {
            break;
        }
        let Some(next) = next_tenant(db, &record.action, &after_tenant)? else { break };
        if next != *tenant {
            let queue = Queue { db, tenant: &next, action: &record.action };
            ahead.others += queue.count_ahead(record, left(limit, ahead.others))?;
        }
        after_tenant = next;
    }
    Ok(ahead)
}

fn left(limit: usize, counted: u64) -> usize {
    limit.saturating_sub(saturate::to_usize(counted))
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

pub(super) fn stats(db: &Connection) -> rusqlite::Result<QueueStats> {
    let mut stats = QueueStats::default();
    let mut ready = db.prepare_cached(
        "SELECT action, COUNT(*), MIN(not_before) FROM (
             SELECT action, not_before FROM requests WHERE state = 0 AND delayed = 0 ORDER BY action LIMIT ?1)
         GROUP BY action",
    )?;
    let rows = ready.query_map([saturate::to_i64(MAX_COUNTED)], |row| {
        let queued = saturate::to_u64(row.get::<_, i64>(1)?);
        Ok((row.get(0)?, ActionQueue { queued, oldest_due: Timestamp::from_millis(row.get(2)?) }))
    })?;
    for row in rows {
        let (action, queue) = row?;
        stats.queued += queue.queued;
        stats.oldest_due = [stats.oldest_due, Some(queue.oldest_due)].into_iter().flatten().min();
        stats.by_action.insert(action, queue);
    }
    let delayed: i64 = db
        .prepare_cached(
            "SELECT COUNT(*) FROM (SELECT 1 FROM requests WHERE state = 0 AND delayed = 1 LIMIT ?1)",
        )?
        .query_row([saturate::to_i64(MAX_COUNTED)], |row| row.get(0))?;
    stats.queued += saturate::to_u64(delayed);
    Ok(stats)
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
            extra_per_user: 0,
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
            (
                "SELECT action, not_before FROM requests WHERE state = 0 AND delayed = 0 ORDER BY action LIMIT 5".into(),
                "ready",
            ),
        ] {
            let mut statement = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let plan = statement.query_map([], |row| row.get::<_, String>(3)).unwrap();
            let plan: Vec<String> = plan.map(Result::unwrap).collect();
            let expected = format!("requests USING COVERING INDEX requests_{index}");
            assert!(plan.len() == 1 && plan[0].contains(&expected), "{sql}: {plan:?}");
        }
    }
}
