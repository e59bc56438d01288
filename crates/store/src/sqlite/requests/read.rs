//! Questions about requests: they change nothing.

use prost::Message;
use rusqlite::{Connection, OptionalExtension, params, params_from_iter, types::Value};
use streamer_core::{Timestamp, Uid, limits};

use super::super::row;
use crate::{
    DueRequest, EventPage, ListRequests, Owner, QueueStats, RequestPage, RequestRecord,
    StoredPayload,
};

pub(in crate::sqlite) fn get(db: &Connection, uid: Uid) -> rusqlite::Result<Option<RequestRecord>> {
    db.prepare_cached(&format!("SELECT {} FROM requests WHERE uid = ?1", row::COLUMNS))?
        .query_row([uid.to_bytes()], row::record)
        .optional()
}

pub(in crate::sqlite) fn find(
    db: &Connection,
    owner: &Owner,
    client_id: &str,
) -> rusqlite::Result<Option<RequestRecord>> {
    db.prepare_cached(&format!(
        "SELECT {} FROM requests WHERE tenant = ?1 AND user = ?2 AND client_id = ?3",
        row::COLUMNS
    ))?
    .query_row(params![owner.tenant, owner.user, client_id], row::record)
    .optional()
}

pub(in crate::sqlite) fn payload(
    db: &Connection,
    uid: Uid,
) -> rusqlite::Result<Option<StoredPayload>> {
    db.prepare_cached("SELECT content_type, data FROM payloads WHERE uid = ?1")?
        .query_row([uid.to_bytes()], super::stored_payload)
        .optional()
}

pub(in crate::sqlite) fn list(
    db: &Connection,
    query: &ListRequests,
) -> rusqlite::Result<RequestPage> {
    let mut sql = format!("SELECT {} FROM requests WHERE tenant = ?", row::COLUMNS);
    let mut values = vec![Value::from(query.tenant.clone())];
    if let Some(user) = &query.user {
        sql.push_str(" AND user = ?");
        values.push(user.clone().into());
    }
    if let Some(before) = query.before {
        sql.push_str(" AND uid < ?");
        values.push(before.to_bytes().to_vec().into());
    }
    if let Some(action) = &query.action {
        sql.push_str(" AND action = ?");
        values.push(action.clone().into());
    }
    if !query.states.is_empty() {
        let marks = vec!["?"; query.states.len()].join(", ");
        sql.push_str(&format!(" AND state IN ({marks})"));
        values.extend(query.states.iter().map(|state| row::state_number(*state).into()));
    }
    sql.push_str(" ORDER BY uid DESC LIMIT ?");
    values.push(count(query.limit.saturating_add(1)).into());

    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map(params_from_iter(values), row::record)?;
    let mut requests = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    let more = requests.len() > query.limit;
    requests.truncate(query.limit);
    let next = if more { requests.last().map(|request| request.uid) } else { None };
    Ok(RequestPage { requests, next })
}

pub(in crate::sqlite) fn expired(
    db: &Connection,
    now: Timestamp,
    limit: usize,
) -> rusqlite::Result<Vec<RequestRecord>> {
    db.prepare_cached(&format!(
        "SELECT {} FROM requests WHERE state = 1 AND lease_until <= ?1
         ORDER BY lease_until LIMIT ?2",
        row::COLUMNS
    ))?
    .query_map(params![now.as_millis(), count(limit)], row::record)?
    .collect()
}

pub(in crate::sqlite) fn due(
    db: &Connection,
    actions: &[String],
    now: Timestamp,
    limit: usize,
) -> rusqlite::Result<Vec<DueRequest>> {
    // One step into the index for each action and priority: what waits for other actions, or is
    // not due, is never read.
    let mut query = db.prepare_cached(
        "SELECT uid, tenant, not_before FROM requests
         WHERE state = 0 AND action = ?1 AND priority = ?2 AND not_before <= ?3
         ORDER BY not_before, uid LIMIT ?4",
    )?;
    let mut due = Vec::new();
    for priority in (0..=limits::MAX_PRIORITY).rev() {
        let higher = due.len();
        if higher >= limit {
            break;
        }
        for action in actions {
            let bounds = params![action, priority, now.as_millis(), count(limit - higher)];
            let rows = query.query_map(bounds, |row| {
                Ok(DueRequest {
                    uid: row::uid(row, 0)?,
                    action: action.clone(),
                    tenant: row.get(1)?,
                    priority,
                    not_before: Timestamp::from_millis(row.get(2)?),
                })
            })?;
            for row in rows {
                due.push(row?);
            }
        }
        due[higher..].sort_by_key(|request| (request.not_before, request.uid));
    }
    due.truncate(limit);
    Ok(due)
}

pub(in crate::sqlite) fn next_due(
    db: &Connection,
    now: Timestamp,
) -> rusqlite::Result<Option<Timestamp>> {
    let next: Option<i64> = db
        .prepare_cached("SELECT MIN(not_before) FROM requests WHERE state = 0 AND not_before > ?1")?
        .query_row([now.as_millis()], |row| row.get(0))?;
    Ok(next.map(Timestamp::from_millis))
}

pub(in crate::sqlite) fn queue_stats(
    db: &Connection,
    now: Timestamp,
) -> rusqlite::Result<QueueStats> {
    let queued: i64 = db
        .prepare_cached("SELECT COUNT(*) FROM requests WHERE state = 0")?
        .query_row([], |row| row.get(0))?;
    let oldest_due: Option<i64> = db
        .prepare_cached(
            "SELECT MIN(not_before) FROM requests WHERE state = 0 AND not_before <= ?1",
        )?
        .query_row([now.as_millis()], |row| row.get(0))?;
    Ok(QueueStats {
        queued: u64::try_from(queued).unwrap_or(0),
        oldest_due: oldest_due.map(Timestamp::from_millis),
    })
}

pub(in crate::sqlite) fn events(
    db: &Connection,
    uid: Uid,
    after_seq: i64,
    max_events: usize,
    max_bytes: usize,
) -> rusqlite::Result<EventPage> {
    let mut query = db.prepare_cached(
        "SELECT batch FROM events WHERE uid = ?1 AND last_seq > ?2 ORDER BY last_seq",
    )?;
    let mut rows = query.query(params![uid.to_bytes(), after_seq])?;
    let mut page = EventPage { events: Vec::new(), more: false };
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        for event in row::batch(row, 0)?.events {
            if event.seq <= after_seq {
                continue;
            }
            if page.events.len() >= max_events || (bytes >= max_bytes && !page.events.is_empty()) {
                page.more = true;
                return Ok(page);
            }
            bytes = bytes.saturating_add(event.encoded_len());
            page.events.push(event);
        }
    }
    Ok(page)
}

/// A count as SQLite takes it.
fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
