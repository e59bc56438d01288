//! Stores large payloads, checkpoints and batches of events in a separate table.
//!
//! A WITHOUT ROWID table is stored as an index: a search compares whole records, and reads each record on its path with
//! all its overflow pages. With records of 1 MB, one insert reads several MB. Large values are therefore in a table
//! with row IDs, where a search compares only integers. The row that a value belongs to contains an empty value, and
//! the row ID of the large value in column `large`.

use rusqlite::{Connection, OptionalExtension};
use streamer_core::Uid;

/// Maximum size of a value that is stored in its row, in bytes. A record of up to 1,002 bytes fits into a page of its
/// index; a record with a value of this size has one additional page.
const MAX_INLINE_BYTES: usize = 2048;

/// Form of a value that its row stores.
pub(super) struct RowValue<'a> {
    /// The value itself; empty if the value is large.
    pub(super) inline: &'a [u8],
    /// Row ID of the value in table `large_values`, if the value is large.
    pub(super) large: Option<i64>,
}

/// Inserts `value` into table `large_values` if it is large. Returns the form to store in its row.
pub(super) fn insert<'a>(db: &Connection, value: &'a [u8]) -> rusqlite::Result<RowValue<'a>> {
    if value.len() <= MAX_INLINE_BYTES {
        return Ok(RowValue { inline: value, large: None });
    }
    let id = db.prepare_cached("INSERT INTO large_values (data) VALUES (?1)")?.insert([value])?;
    Ok(RowValue { inline: &[], large: Some(id) })
}

/// Deletes the large values of a request.
pub(super) fn delete_of_request(db: &Connection, uid: Uid) -> rusqlite::Result<()> {
    db.prepare_cached(
        "DELETE FROM large_values WHERE id IN (SELECT large FROM events WHERE uid = ?1
             UNION ALL SELECT large FROM payloads WHERE uid = ?1
             UNION ALL SELECT large FROM checkpoints WHERE uid = ?1)",
    )?
    .execute([uid.to_bytes()])
    .map(drop)
}

/// Deletes the checkpoint of a request from table `large_values` if it is large. Returns the size of the checkpoint in
/// bytes, whether it is large or not; `None` if the request has no checkpoint.
pub(super) fn delete_of_checkpoint(db: &Connection, uid: Uid) -> rusqlite::Result<Option<i64>> {
    let found = db
        .prepare_cached(
            "SELECT COALESCE((SELECT LENGTH(data) FROM large_values WHERE id = large), LENGTH(data)),
                 large FROM checkpoints WHERE uid = ?1",
        )?
        .query_row([uid.to_bytes()], |row| Ok((row.get(0)?, row.get::<_, Option<i64>>(1)?)))
        .optional()?;
    if let Some((_, Some(id))) = found {
        db.prepare_cached("DELETE FROM large_values WHERE id = ?1")?.execute([id])?;
    }
    Ok(found.map(|(bytes, _)| bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(db: &Connection) -> i64 {
        db.query_row("SELECT COUNT(*) FROM large_values", [], |row| row.get(0)).unwrap()
    }

    #[test]
    fn large_values_are_stored_and_deleted_with_their_rows() {
        let db = Connection::open_in_memory().unwrap();
        crate::schema::migrate(&db).unwrap();
        let uid = Uid::from_slice(&[1; 16]).unwrap();
        let (small, large) = ([1; MAX_INLINE_BYTES], [2; MAX_INLINE_BYTES + 1]);
        let inline = insert(&db, &small).unwrap();
        assert_eq!((inline.inline.len(), inline.large, count(&db)), (MAX_INLINE_BYTES, None, 0));
        for sql in [
            "INSERT INTO payloads VALUES (?1, '', ?2, 0, ?3)",
            "INSERT INTO checkpoints VALUES (?1, ?2, 0, ?3)",
            "INSERT INTO events VALUES (?1, 1, ?2, 0, ?3)",
            "INSERT INTO events VALUES (?1, 2, ?2, 0, ?3)",
        ] {
            let value = insert(&db, &large).unwrap();
            assert!(value.inline.is_empty());
            db.execute(sql, (uid.to_bytes(), value.inline, value.large)).unwrap();
        }
        let payload = crate::requests::payload(&db, uid).unwrap_err();
        assert!(payload.to_string().contains("checksum"), "it was read: {payload}");
        assert_eq!(count(&db), 4);
        let bytes = i64::try_from(large.len()).unwrap();
        assert_eq!(delete_of_checkpoint(&db, uid), Ok(Some(bytes)));
        assert_eq!(count(&db), 3);
        delete_of_request(&db, uid).unwrap();
        assert_eq!(count(&db), 0);
    }
}
