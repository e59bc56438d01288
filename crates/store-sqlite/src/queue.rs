//! Queries of the queue. Each query seeks in an index; its cost does not depend on the number of requests that are
//! queued or have ended.

use rusqlite::{Connection, OptionalExtension, params};
use streamer_core::{Timestamp, saturate};

use super::row;
use streamer_store::{DuePage, DueQuery, DueRequest, QueueAhead, QueueStats, RequestRecord};

/// Maximum number of queued requests to count. The exact length of a longer queue is not worth the cost of counting.
const MAX_COUNTED: usize = 1_000_000;

/// Maximum number of tenants whose queues are counted.
const MAX_TENANTS: usize = 256;

pub(super) fn due(db: &Connection, query: &DueQuery) -> rusqlite::Result<DuePage> {
    let mut page = DuePage::default();
    let mut after = query.after_tenant.clone();
    for _ in 0..query.tenants {
        let Some(tenant) = next_tenant(db, after.as_deref())? else {
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
            for action in query.actions.iter().filter(is_included) {
                push_due(db, (&tenant, action), query.now, limit, &mut page.requests)?;
            }
        }
        let of_tenant = &mut page.requests[first..];
        of_tenant.sort_by_key(|request| (-request.priority, request.not_before, request.uid));
        page.requests.truncate(first + limit);
        page.next_tenant = Some(tenant.clone());
        after = Some(tenant);
    }
    Ok(page)
}

/// Returns the next tenant with queued requests, whether they are due or not.
fn next_tenant(db: &Connection, after: Option<&str>) -> rusqlite::Result<Option<String>> {
    // Names of tenants are never empty.
    db.prepare_cached(
        "SELECT tenant FROM requests WHERE state = 0 AND tenant > ?1 ORDER BY tenant LIMIT 1",
    )?
    .query_row([after.unwrap_or_default()], |row| row.get(0))
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
         WHERE state = 0 AND tenant = ?1 AND action = ?2 AND priority < ?3",
    )?;
    let mut requests = db.prepare_cached(
        "SELECT uid, not_before FROM requests
         WHERE state = 0 AND tenant = ?1 AND action = ?2 AND priority = ?3 AND not_before <= ?4
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
        let Some(tenant) = next_tenant(db, after.as_deref())? else { break };
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
                 WHERE state = 0 AND tenant = ?1 AND action = ?2 AND not_before <= ?3
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

pub(super) fn next_due(db: &Connection, now: Timestamp) -> rusqlite::Result<Option<Timestamp>> {
    let next: Option<i64> = db
        .prepare_cached("SELECT MIN(not_before) FROM requests WHERE state = 0 AND not_before > ?1")?
        .query_row([now.as_millis()], |row| row.get(0))?;
    Ok(next.map(Timestamp::from_millis))
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
