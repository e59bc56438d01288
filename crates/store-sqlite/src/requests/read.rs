//! Read-only queries of requests.

use prost::Message;
use rusqlite::{Connection, OptionalExtension, params, params_from_iter, types::Value};
use streamer_core::{Seq, Timestamp, Uid, saturate};

use crate::{checksum, row};
use streamer_store::{
    EventNumbers, EventPage, ListRequests, Owner, RequestPage, RequestRecord, StoredPayload,
};

/// Maximum number of requests of which a filtered page contains some.
const MAX_FILTERED: usize = 1_000;

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

/// Reads a page. If only some requests are included, the page ends after [`MAX_FILTERED`] requests, so that its cost
/// does not depend on how rare the included requests are.
pub(crate) fn list(db: &Connection, query: &ListRequests) -> rusqlite::Result<RequestPage> {
    let is_filtered = query.action.is_some() || !query.states.is_empty();
    let first = if is_filtered { nth_before(db, query, MAX_FILTERED)? } else { None };
    let (scope, mut values) = list_scope(query);
    let mut sql = format!("SELECT {} FROM requests WHERE {scope}", row::COLUMNS);
    if let Some(first) = first {
        sql.push_str(" AND uid >= ?");
        values.push(first.to_bytes().to_vec().into());
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
    // A page may be short, or empty, if the included requests are rare.
    let next = if more { requests.last().map(|request| request.uid) } else { first };
    Ok(RequestPage { requests, next })
}

/// Returns the condition for the tenant, user and position of a page, and the values of its parameters.
fn list_scope(query: &ListRequests) -> (String, Vec<Value>) {
    let mut sql = "tenant = ?".to_owned();
    let mut values = vec![Value::from(query.tenant.clone())];
    if let Some(user) = &query.user {
        sql.push_str(" AND user = ?");
        values.push(user.clone().into());
    }
    if let Some(before) = query.before {
        sql.push_str(" AND uid < ?");
        values.push(before.to_bytes().to_vec().into());
    }
    (sql, values)
}

/// Returns the `number`th request of the tenant or user that may be in the page, newest first; `None` if there are fewer.
fn nth_before(
    db: &Connection,
    query: &ListRequests,
    number: usize,
) -> rusqlite::Result<Option<Uid>> {
    let (scope, mut values) = list_scope(query);
    values.push(saturate::to_i64(number.saturating_sub(1)).into());
    let sql = format!("SELECT uid FROM requests WHERE {scope} ORDER BY uid DESC LIMIT 1 OFFSET ?");
    db.prepare_cached(&sql)?.query_row(params_from_iter(values), |row| row::uid(row, 0)).optional()
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

#[cfg(test)]
mod tests {
    use streamer_core::RequestState;

    use super::*;
    use crate::schema::migrate;

    /// Returns a database with `count` requests of a tenant, of which the oldest has failed.
    fn database(count: usize) -> Connection {
        let db = Connection::open_in_memory().unwrap();
        migrate(&db).unwrap();
        for number in 0..count {
            let mut uid = [0; 16];
            uid[..8].copy_from_slice(&(number as u64).to_be_bytes());
            let state = if number == 0 { RequestState::Failed } else { RequestState::Succeeded };
            db.prepare_cached(
                "INSERT INTO requests (uid, tenant, user, action, state, attempt, last_seq, attempt_seq,
                     priority, create_time, not_before, fingerprint)
                 VALUES (?1, 't', 'u', 'a', ?2, 0, 1, 0, 0, 1, 1, x'00')",
            )
            .unwrap()
            .execute(params![uid, row::state_number(state)])
            .unwrap();
        }
        db
    }

    fn query(states: &[RequestState], user: Option<&str>) -> ListRequests {
        ListRequests {
            tenant: "t".into(),
            user: user.map(str::to_owned),
            states: states.to_vec(),
            action: None,
            before: None,
            limit: 10,
        }
    }

    #[test]
    fn a_page_with_a_rare_state_ends_after_a_limited_number_of_requests() {
        let db = database(2 * MAX_FILTERED + 500);
        for user in [None, Some("u")] {
            let mut failed = query(&[RequestState::Failed], user);
            let mut sizes = Vec::new();
            loop {
                let page = list(&db, &failed).unwrap();
                sizes.push(page.requests.len());
                failed.before = page.next;
                if page.next.is_none() {
                    break;
                }
            }
            assert_eq!(sizes, [0, 0, 1]);
        }
    }

    #[test]
    fn a_page_with_a_frequent_state_is_full() {
        let db = database(MAX_FILTERED + 500);
        let mut succeeded = query(&[RequestState::Succeeded], None);
        let page = list(&db, &succeeded).unwrap();
        assert_eq!((page.requests.len(), page.next), (10, page.requests.last().map(|r| r.uid)));
        succeeded.limit = 2 * MAX_FILTERED;
        let page = list(&db, &succeeded).unwrap();
        assert_eq!((page.requests.len(), page.next.is_some()), (MAX_FILTERED, true));
        let all = ListRequests { limit: 2 * MAX_FILTERED, ..query(&[], None) };
        assert_eq!(list(&db, &all).unwrap().requests.len(), MAX_FILTERED + 500);
    }

    #[test]
    fn a_page_is_read_from_the_index() {
        let db = database(1);
        for (query, index) in [(query(&[], None), "tenant"), (query(&[], Some("u")), "owner")] {
            let (scope, values) = list_scope(&query);
            let sql = format!(
                "EXPLAIN QUERY PLAN SELECT uid FROM requests WHERE {scope} ORDER BY uid DESC LIMIT 1 OFFSET 9"
            );
            let plan: String =
                db.query_row(&sql, params_from_iter(values), |row| row.get(3)).unwrap();
            assert!(plan.contains(&format!("INDEX requests_by_{index}")), "{plan}");
        }
    }
}
