//! Read-only queries of requests.

use prost::Message;
use rusqlite::{Connection, OptionalExtension, params, params_from_iter, types::Value};
use streamer_core::{Seq, Timestamp, Uid, saturate};

use crate::{checksum, row};
use streamer_store::{
    EventNumbers, EventPage, ListRequests, Owner, RequestPage, RequestRecord, StoredPayload,
};

pub(crate) fn get(db: &Connection, uid: Uid) -> rusqlite::Result<Option<RequestRecord>> {
    db.prepare_cached(&format!("SELECT {} FROM requests WHERE uid = ?1", row::COLUMNS))?
        .query_row([uid.to_bytes()], row::record)
        .optional()
}

pub(crate) fn tenant(db: &Connection, uid: Uid) -> rusqlite::Result<Option<String>> {
    db.prepare_cached("SELECT tenant FROM requests WHERE uid = ?1")?
        .query_row([uid.to_bytes()], |row| row.get(0))
        .optional()
}

pub(crate) fn find(
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

pub(crate) fn payload(db: &Connection, uid: Uid) -> rusqlite::Result<Option<StoredPayload>> {
    db.prepare_cached(
        "SELECT content_type, COALESCE((SELECT data FROM large_values WHERE id = large), data), crc
         FROM payloads WHERE uid = ?1",
    )?
    .query_row([uid.to_bytes()], |row| stored_payload(row, uid))
    .optional()
}

/// Reads a payload from the columns `content_type`, `data` and `crc`.
fn stored_payload(row: &rusqlite::Row<'_>, uid: Uid) -> rusqlite::Result<StoredPayload> {
    let data = row.get::<_, Vec<u8>>(1)?;
    row::verify(row, 2, || checksum::of_value(uid, &data))?;
    Ok(StoredPayload { content_type: row.get(0)?, data: data.into() })
}

pub(crate) fn list(db: &Connection, query: &ListRequests) -> rusqlite::Result<RequestPage> {
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
        let placeholders = vec!["?"; query.states.len()].join(", ");
        sql.push_str(&format!(" AND state IN ({placeholders})"));
        values.extend(query.states.iter().map(|state| row::state_number(*state).into()));
    }
    sql.push_str(" ORDER BY uid DESC LIMIT ?");
    values.push(saturate::to_i64(query.limit.saturating_add(1)).into());

    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map(params_from_iter(values), row::record)?;
    let mut requests = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    let more = requests.len() > query.limit;
    requests.truncate(query.limit);
    let next = if more { requests.last().map(|request| request.uid) } else { None };
    Ok(RequestPage { requests, next })
}

pub(crate) fn expired(
    db: &Connection,
    now: Timestamp,
    limit: usize,
) -> rusqlite::Result<Vec<RequestRecord>> {
    db.prepare_cached(&format!(
        "SELECT {} FROM requests WHERE state = 1 AND lease_until <= ?1
         ORDER BY lease_until LIMIT ?2",
        row::COLUMNS
    ))?
    .query_map(params![now.as_millis(), saturate::to_i64(limit)], row::record)?
    .collect()
}

pub(crate) fn events(
    db: &Connection,
    uid: Uid,
    after_seq: Seq,
    max_events: usize,
    max_bytes: usize,
) -> rusqlite::Result<EventPage> {
    let mut query = db.prepare_cached(
        "SELECT COALESCE((SELECT data FROM large_values WHERE id = large), batch), last_seq, crc
         FROM events WHERE uid = ?1 AND last_seq > ?2 ORDER BY last_seq",
    )?;
    let mut rows = query.query(params![uid.to_bytes(), after_seq.as_i64()])?;
    let mut page = EventPage { events: Vec::new(), more: false };
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        for event in row::batch(row, uid)?.events {
            if event.seq() <= after_seq {
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
