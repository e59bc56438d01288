//! Queries of the queue. Each query seeks in an index; its cost does not depend on the number of requests that are
//! queued or have ended.

use rusqlite::{Connection, OptionalExtension, params};
use streamer_core::{Timestamp, saturate};

use super::row;
use streamer_store::{
    DuePage, DueQuery, DueRequest, QueueAhead, QueueStats, ReleasedRequests, RequestRecord,
};

/// Maximum number of queued requests to count. The exact length of a longer queue is not worth the cost of counting.
const MAX_COUNTED: usize = 1_000_000;

/// Maximum number of tenants whose queues are counted.
const MAX_TENANTS: usize = 256;

pub(super) fn due(db: &Connection, query: &DueQuery) -> rusqlite::Result<DuePage> {
    let mut page = DuePage::default();
    let mut tenants = Tenants::begin(db, &query.actions, query.after_tenant.as_deref())?;
    for _ in 0..query.tenants {
        let Some((tenant, actions)) = tenants.next(db)? else {
            page.next_tenant = None;
            return Ok(page);
        };
        let first = page.requests.len();
        let limit = query.limits.get(&tenant).map_or(query.per_tenant, |limit| *limit);
        if limit > 0 {
            let is_included = |action: &&String| {
                let pair = (tenant.clone(), (*action).clone());
                query.blocked.is_empty() || !query.blocked.contains(&pair)
            };
            for action in actions.into_iter().filter(is_included) {
                push_due(db, (&tenant, action), query.now, limit, &mut page.requests)?;
            }
        }
        let of_tenant = &mut page.requests[first..];
        of_tenant.sort_by_key(|request| (-request.priority, request.not_before, request.uid));
        page.requests.truncate(first + limit);
        page.next_tenant = Some(tenant);
    }
    Ok(page)
}

/// Tenants with requests for some of the given actions, in the order of their names.
struct Tenants<'a> {
    /// Each action with the next tenant that has requests for it.
    next: Vec<(&'a String, String)>,
}

impl<'a> Tenants<'a> {
    fn begin(
        db: &Connection,
        actions: &'a [String],
        after: Option<&str>,
    ) -> rusqlite::Result<Self> {
        let mut next = Vec::new();
        for action in actions {
            if let Some(tenant) = next_tenant(db, action, after.unwrap_or_default())? {
                next.push((action, tenant));
            }
        }
        Ok(Self { next })
    }

    /// Returns the next tenant, and the actions for which it has requests.
    fn next(&mut self, db: &Connection) -> rusqlite::Result<Option<(String, Vec<&'a String>)>> {
        let Some(tenant) = self.next.iter().map(|(_, tenant)| tenant).min().cloned() else {
            return Ok(None);
        };
        let mut actions = Vec::new();
        let mut remaining = Vec::with_capacity(self.next.len());
        for (action, of_action) in self.next.drain(..) {
            if of_action != tenant {
                remaining.push((action, of_action));
                continue;
            }
            actions.push(action);
            if let Some(following) = next_tenant(db, action, &tenant)? {
                remaining.push((action, following));
            }
        }
        self.next = remaining;
        Ok(Some((tenant, actions)))
    }
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

/// Adds up to `limit` due requests of a tenant and action to `due`. Seeks in the index once for each priority that
/// occurs, so that requests that are not due are never read.
fn push_due(
    db: &Connection,
    (tenant, action): (&str, &str),
    now: Timestamp,
    limit: usize,
    due: &mut Vec<DueRequest>,
) -> rusqlite::Result<()> {
    let mut highest = db.prepare_cached(
        "SELECT MAX(priority) FROM requests
         WHERE state = 0 AND delayed = 0 AND action = ?2 AND tenant = ?1 AND priority < ?3",
    )?;
    let mut requests = db.prepare_cached(
        "SELECT uid, not_before FROM requests
         WHERE state = 0 AND delayed = 0 AND action = ?2 AND tenant = ?1 AND priority = ?3
             AND not_before <= ?4
         ORDER BY not_before, uid LIMIT ?5",
    )?;
    let mut remaining = limit;
    let mut below = i32::MAX;
    while remaining > 0 {
        let found: Option<i32> =
            highest.query_row(params![tenant, action, below], |row| row.get(0))?;
        let Some(priority) = found else { break };
        let bounds =
            params![tenant, action, priority, now.as_millis(), saturate::to_i64(remaining)];
        let rows = requests.query_map(bounds, |row| {
            Ok(DueRequest {
                uid: row::uid(row, 0)?,
                action: action.to_owned(),
                tenant: tenant.to_owned(),
                priority,
                not_before: Timestamp::from_millis(row.get(1)?),
            })
        })?;
        for request in rows {
            due.push(request?);
            remaining -= 1;
        }
        below = priority;
    }
    Ok(())
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
    now: Timestamp,
    limit: usize,
) -> rusqlite::Result<QueueAhead> {
    let mut ahead = QueueAhead::default();
    let mut after: Option<String> = None;
    for _ in 0..MAX_TENANTS {
        let after_tenant = after.as_deref().unwrap_or_default();
        let Some(tenant) = next_tenant(db, &record.action, after_tenant)? else { break };
        let others = saturate::to_usize(ahead.others);
        let own = tenant == record.owner.tenant;
        let left = if own { limit } else { limit.saturating_sub(others) };
        let found = if left == 0 { 0 } else { ahead_of_tenant(db, record, &tenant, now, left)? };
        if own {
            ahead.own = found;
        } else {
            ahead.others += found;
        }
        after = Some(tenant);
    }
    Ok(ahead)
}

fn ahead_of_tenant(
    db: &Connection,
    record: &RequestRecord,
    tenant: &str,
    now: Timestamp,
    limit: usize,
) -> rusqlite::Result<u64> {
    let counted: i64 = db
        .prepare_cached(
            "SELECT COUNT(*) FROM (
                 SELECT 1 FROM requests
                 WHERE state = 0 AND delayed = 0 AND action = ?2 AND tenant = ?1 AND not_before <= ?3
                     AND (priority > ?4 OR (priority = ?4 AND (not_before, uid) < (?5, ?6)))
                 LIMIT ?7)",
        )?
        .query_row(
            params![
                tenant,
                record.action,
                now.as_millis(),
                record.priority,
                record.not_before.as_millis(),
                record.uid.to_bytes(),
                saturate::to_i64(limit)
            ],
            |row| row.get(0),
        )?;
    Ok(saturate::to_u64(counted))
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
        let uid = [number; 16];
        db.prepare_cached(
            "INSERT INTO requests (uid, tenant, user, action, state, attempt, last_seq, attempt_seq,
                 priority, create_time, not_before, delayed, fingerprint)
             VALUES (?1, ?2, 'u', ?3, 0, 0, 1, 0, 0, 1, ?4, ?5, x'00')",
        )
        .unwrap()
        .execute(params![uid, tenant, action, not_before, delayed])
        .unwrap();
    }

    fn query(actions: &[&str], tenants: usize) -> DueQuery {
        DueQuery {
            actions: actions.iter().map(ToString::to_string).collect(),
            now: Timestamp::from_millis(100),
            after_tenant: None,
            tenants,
            per_tenant: 10,
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
        let page = due(&db, &query(&["a", "b"], 3)).unwrap();
        assert_eq!((tenants(&page), page.next_tenant.as_deref()), (vec!["x", "x", "y"], None));
        let page = due(&db, &query(&["a", "b"], 1)).unwrap();
        assert_eq!((tenants(&page), page.next_tenant.as_deref()), (vec!["x", "x"], Some("x")));
        let next = DueQuery { after_tenant: page.next_tenant, ..query(&["a", "b"], 2) };
        assert_eq!(tenants(&due(&db, &next).unwrap()), ["y"]);
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
            (format!("SELECT MAX(priority) FROM requests WHERE {ready} tenant = 't' AND priority < 3"), "ready"),
            (
                format!(
                    "SELECT uid, not_before FROM requests WHERE {ready} tenant = 't' AND priority = 3
                         AND not_before <= 4 ORDER BY not_before, uid LIMIT 5"
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
