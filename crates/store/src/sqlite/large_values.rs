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

/// Stores a value, if it is large, and returns what its row holds.
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
