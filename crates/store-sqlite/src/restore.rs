//! Restores a backup to a data folder without a store.
//!
//! The backup is not trusted: it may be damaged, incomplete, or changed on purpose. It is copied first, and only the
//! copy is checked, so that exactly the bytes that were checked become the store.

mod error;
mod schema_check;
mod target;

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    ops::Range,
    path::Path,
};

use rusqlite::{Connection, Row};
use streamer_core::Timestamp;

use super::{
    actions, checksum,
    files::{self, DATABASE, TemporaryFile},
    row, schema,
};
pub use error::RestoreError;
use error::file_error;
use target::Target;

/// Name of the database in the data folder while it is incomplete.
pub(super) const FILE: &str = "restore.tmp";
/// Size of the header of a database, in bytes.
const HEADER_BYTES: usize = 100;
/// First bytes of a database.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// Position of the format versions for writing and for reading in the header. They are 1 in a backup, and 2 (WAL) in the
/// database of a store.
const FORMAT_VERSIONS: Range<usize> = 18..20;

/// Step of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreStep {
    /// The backup is being copied to the data folder.
    Copy,
    /// The copy is being checked.
    Check,
}

/// Backup that was restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Schema version of the backup.
    pub schema_version: i64,
    /// Size of the backup in bytes.
    pub size: u64,
}

/// Copies a backup to the folder `data`, which is created if it does not exist, and checks the copy. `on_step` is
/// called at the start of each step. The folder is unchanged if the restore fails.
///
/// No worker can resume the attempts that were running at the time of the backup: it would continue after reports that
/// the backup does not contain.
///
/// # Errors
/// Returns an error if `data` contains a store or is in use, the backup is invalid, or a file cannot be read or
/// written.
pub fn restore(
    backup: &Path,
    data: &Path,
    mut on_step: impl FnMut(RestoreStep),
) -> Result<Restored, RestoreError> {
    check_vacant(data)?;
    let mut source = File::open(backup).map_err(|error| file_error(backup, error))?;
    let size = verify_header(&mut source, backup)?;
    let target = Target::open(data)?;
    check_vacant(data)?;
    let path = data.join(FILE);
    let failed = |error| file_error(&path, error);
    let temporary = TemporaryFile::create(&path).map_err(failed)?;
    on_step(RestoreStep::Copy);
    let copied = io::copy(&mut source, &mut temporary.file()).map_err(failed)?;
    if copied != size {
        return Err(invalid(backup, "the file was changed during the restore".into()));
    }
    on_step(RestoreStep::Check);
    let schema_version = prepare(&path, backup)?;
    temporary.file().sync_all().map_err(failed)?;
    fs::rename(&path, data.join(DATABASE)).map_err(failed)?;
    target.complete();
    files::sync_folder(data).map_err(|error| file_error(data, error))?;
    Ok(Restored { schema_version, size })
}

/// Checks that a folder contains no database, and no file that SQLite would apply to a restored one.
fn check_vacant(data: &Path) -> Result<(), RestoreError> {
    let database = data.join(DATABASE);
    if database.exists() || files::companions(&database).any(|path| path.exists()) {
        return Err(RestoreError::HasStore(data.display().to_string()));
    }
    Ok(())
}

/// Checks the header and the size of a backup; returns the size in bytes.
fn verify_header(file: &mut File, path: &Path) -> Result<u64, RestoreError> {
    let failed = |error| file_error(path, error);
    let size = file.metadata().map_err(failed)?.len();
    let mut header = Vec::with_capacity(HEADER_BYTES);
    file.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut header).map_err(failed)?;
    file.rewind().map_err(failed)?;
    if header.len() < HEADER_BYTES || !header.starts_with(MAGIC) {
        return Err(invalid(path, "it is not an SQLite database".into()));
    }
    if header[FORMAT_VERSIONS] != [1, 1] {
        let reason = "it is the database of a store, which may be incomplete without the other \
                      files of its data folder; make a backup with `streamer store backup`";
        return Err(invalid(path, reason.into()));
    }
    let page_bytes = match u16::from_be_bytes([header[16], header[17]]) {
        1 => 65_536,
        bytes => u64::from(bytes),
    };
    let pages = u32::from_be_bytes([header[28], header[29], header[30], header[31]]);
    let expected = u64::from(pages) * page_bytes;
    if size != expected {
        return Err(invalid(path, format!("it has {size} bytes, expected {expected}")));
    }
    Ok(size)
}

/// Checks the copy of a backup, migrates it, and ends its sessions with workers. Returns the schema version of the
/// backup.
fn prepare(copy: &Path, backup: &Path) -> Result<i64, RestoreError> {
    let rejected = |reason: String| invalid(backup, reason);
    let sqlite = |error: rusqlite::Error| rejected(error.to_string());
    let db = schema::open_untrusted(copy).map_err(sqlite)?;
    let found: i64 =
        db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(sqlite)?;
    if found > schema::VERSION {
        return Err(RestoreError::UnsupportedVersion { found, known: schema::VERSION });
    }
    if found < 1 {
        return Err(rejected("it was not made by Streamer".into()));
    }
    // First, because the other checks and the migration evaluate what the schema contains.
    schema_check::check_types(&db).map_err(rejected)?;
    if found == schema::VERSION {
        schema_check::compare(&db).map_err(rejected)?;
    }
    let integrity: String =
        db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(sqlite)?;
    if integrity != "ok" {
        return Err(rejected(integrity));
    }
    if found < schema::VERSION {
        schema::migrate(&db)?;
        schema_check::compare(&db).map_err(rejected)?;
    }
    verify_values(&db).map_err(rejected)?;
    schema::release_workers(&db).map_err(sqlite)?;
    db.close().map_err(|(_, error)| sqlite(error))?;
    Ok(found)
}

/// Verifies the checksums of all values. SQLite detects corrupt structures, but not corrupt values.
fn verify_values(db: &Connection) -> Result<(), String> {
    let requests = format!("SELECT {} FROM requests", row::COLUMNS);
    for_each(db, "requests", &requests, |row| row::record(row).map(drop))?;
    for table in ["payloads", "checkpoints"] {
        let query = format!(
            "SELECT uid, COALESCE((SELECT data FROM large_values WHERE id = large), data), crc
             FROM {table}"
        );
        for_each(db, table, &query, |row| {
            let (uid, value) = (row::uid(row, 0)?, row.get_ref(1)?.as_blob()?);
            row::verify(row, 2, || checksum::of_value(uid, value))
        })?;
    }
    let events = "SELECT COALESCE((SELECT data FROM large_values WHERE id = large), batch),
             last_seq, crc, uid FROM events";
    for_each(db, "events", events, |row| row::batch(row, row::uid(row, 3)?).map(drop))?;
    actions::list(db, Timestamp::default())
        .map(drop)
        .map_err(|error| format!("table actions: {error}"))
}

/// Calls `verify` with each row of a query.
fn for_each(
    db: &Connection,
    table: &str,
    query: &str,
    mut verify: impl FnMut(&Row<'_>) -> rusqlite::Result<()>,
) -> Result<(), String> {
    let verified = db.prepare(query).and_then(|mut statement| {
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            verify(row)?;
        }
        Ok(())
    });
    verified.map_err(|error| format!("table {table}: {error}"))
}

fn invalid(path: &Path, reason: String) -> RestoreError {
    RestoreError::Invalid { path: path.display().to_string(), reason }
}

#[cfg(test)]
mod tests;
