//! Large payloads, checkpoints and batches of events, in a table of their own.
//!
//! A table WITHOUT ROWID is an index: a search compares whole records, and reads each record on its path with all
//! its overflow pages. With records of 1 MB, one insert reads several MB. Large values are therefore in a table with row
//! ids, whose searches compare integers. The row that a value belongs to has an empty value and the id in
//! column `large`.

use rusqlite::{Connection, OptionalExtension};
use streamer_core::Uid;

/// Largest value that is stored in the row itself. A record of up to 1,002 bytes is in the page of its index; one of
/// this size has one more.
const MAX_INLINE_BYTES: usize = 2048;

/// A value as its row stores it.
pub(super) struct RowValue<'a> {
    /// Empty when it is large.
    pub(super) inline: &'a [u8],
    /// Id of the large value.
    pub(super) large: Option<i64>,
}

/// Inserts the value into the table if it is large. Returns what its row stores.
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

/// Deletes the checkpoint of a request if it is large. Returns the number of bytes of the checkpoint, large or not;
/// `None` when the request has none.
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
        super::super::schema::migrate(&db).unwrap();
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
        let payload = crate::sqlite::requests::payload(&db, uid).unwrap_err();
        assert!(payload.to_string().contains("checksum"), "it was read: {payload}");
        assert_eq!(count(&db), 4);
        let bytes = i64::try_from(large.len()).unwrap();
        assert_eq!(delete_of_checkpoint(&db, uid), Ok(Some(bytes)));
        assert_eq!(count(&db), 3);
        delete_of_request(&db, uid).unwrap();
        assert_eq!(count(&db), 0);
    }
}
