//! Restores a backup to a data folder without a store.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use rusqlite::{Connection, Row};
use streamer_core::Timestamp;
use streamer_store::StoreError;

use super::{
    DATABASE, actions, checksum,
    files::{self, TemporaryFile},
    row, schema,
};

/// Name of the database in the data folder while it is incomplete.
pub(super) const FILE: &str = "restore.tmp";
/// Size of the header of a database, in bytes.
const HEADER_BYTES: usize = 100;
/// First bytes of a database.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// Position of the format version in the header. A backup has version 1, the database of a store version 2 (WAL).
const FORMAT_VERSION: usize = 18;

/// Error of a restore.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The data folder contains a store.
    #[error("{0} already contains a store; specify a new folder")]
    HasStore(String),
    /// A file cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// Path of the file or folder.
        path: String,
        /// Error of the file system.
        error: io::Error,
    },
    /// The file is not a complete backup, or it is corrupt.
    #[error("{path} is not a valid backup: {reason}")]
    Invalid {
        /// Path of the backup.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A newer version of Streamer made the backup.
    #[error(
        "the backup has schema version {found}; this version of Streamer supports up to {known}"
    )]
    UnsupportedVersion {
        /// Schema version of the backup.
        found: i64,
        /// Highest schema version that this program supports.
        known: i64,
    },
    /// The new store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Step of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreStep {
    /// The backup is being checked.
    Check,
    /// The backup is being copied to the data folder.
    Copy,
}

/// Backup that was restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Schema version of the backup.
    pub schema_version: i64,
    /// Size of the backup in bytes.
    pub size: u64,
}

/// Checks a backup and copies it to the folder `data`, which is created if it does not exist. `on_step` is called at
/// the start of each step. The folder is unchanged if the backup is invalid.
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
    on_step(RestoreStep::Check);
    let restored = verify(backup)?;
    on_step(RestoreStep::Copy);
    files::create_folder(data).map_err(|error| file_error(data, error))?;
    let _lock = files::lock(data)?;
    check_vacant(data)?;
    let path = data.join(FILE);
    let failed = |error| file_error(&path, error);
    let temporary = TemporaryFile::create(&path).map_err(failed)?;
    let mut source = File::open(backup).map_err(|error| file_error(backup, error))?;
    let copied = io::copy(&mut source, &mut temporary.file()).map_err(failed)?;
    if copied != restored.size {
        return Err(invalid(backup, "the file was changed during the restore".into()));
    }
    adapt(&path, restored.schema_version).map_err(|error| match error {
        AdaptError::Store(error) => error.into(),
        AdaptError::Sqlite(error) => invalid(backup, error),
    })?;
    temporary.file().sync_all().map_err(failed)?;
    fs::rename(&path, data.join(DATABASE)).map_err(failed)?;
    files::sync_folder(data).map_err(|error| file_error(data, error))?;
    Ok(restored)
}

fn check_vacant(data: &Path) -> Result<(), RestoreError> {
    let names = [DATABASE.to_owned(), format!("{DATABASE}-wal")];
    if names.iter().any(|name| data.join(name).exists()) {
        return Err(RestoreError::HasStore(data.display().to_string()));
    }
    Ok(())
}

/// Checks the file of a backup without changing it.
fn verify(path: &Path) -> Result<Restored, RestoreError> {
    let size = verify_header(path)?;
    let sqlite = |error: rusqlite::Error| invalid(path, error.to_string());
    let db = schema::open_for_reading(path).map_err(sqlite)?;
    let schema_version: i64 =
        db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(sqlite)?;
    if schema_version > schema::VERSION {
        let known = schema::VERSION;
        return Err(RestoreError::UnsupportedVersion { found: schema_version, known });
    }
    if schema_version < 1 {
        return Err(invalid(path, "it was not made by Streamer".into()));
    }
    let found: String =
        db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(sqlite)?;
    if found != "ok" {
        return Err(invalid(path, found));
    }
    // The values of earlier versions are verified after their migration.
    if schema_version == schema::VERSION {
        verify_values(&db).map_err(|reason| invalid(path, reason))?;
    }
    Ok(Restored { schema_version, size })
}

/// Checks the header and the size of a backup; returns the size in bytes.
fn verify_header(path: &Path) -> Result<u64, RestoreError> {
    let failed = |error| file_error(path, error);
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut header = Vec::with_capacity(HEADER_BYTES);
    file.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut header).map_err(failed)?;
    if header.len() < HEADER_BYTES || !header.starts_with(MAGIC) {
        return Err(invalid(path, "it is not an SQLite database".into()));
    }
    if header[FORMAT_VERSION] != 1 {
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

enum AdaptError {
    Store(StoreError),
    Sqlite(String),
}

/// Migrates the copy of a backup, and ends its sessions with workers.
fn adapt(path: &PathBuf, schema_version: i64) -> Result<(), AdaptError> {
    let sqlite = |error: rusqlite::Error| AdaptError::Sqlite(error.to_string());
    let db = Connection::open(path).map_err(sqlite)?;
    schema::migrate(&db).map_err(AdaptError::Store)?;
    if schema_version < schema::VERSION {
        verify_values(&db).map_err(AdaptError::Sqlite)?;
    }
    schema::release_workers(&db).map_err(sqlite)
}

fn file_error(path: &Path, error: io::Error) -> RestoreError {
    RestoreError::File { path: path.display().to_string(), error }
}

fn invalid(path: &Path, reason: String) -> RestoreError {
    RestoreError::Invalid { path: path.display().to_string(), reason }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// Returns a folder with a backup of an empty store.
    fn backup() -> (TempDir, PathBuf) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("backup");
        schema::migrate(&Connection::open(&path).unwrap()).unwrap();
        (folder, path)
    }

    fn reason(backup: &Path) -> String {
        let data = backup.with_file_name("data");
        let reason = restore(backup, &data, |_| {}).unwrap_err().to_string();
        assert!(!data.exists(), "{reason}");
        reason
    }

    #[test]
    fn an_invalid_backup_is_rejected() {
        let (folder, path) = backup();
        let bytes = fs::read(&path).unwrap();
        let other = folder.path().join("other");
        let write = |bytes: &[u8]| fs::write(&other, bytes).unwrap();
        write(b"text");
        assert!(reason(&other).ends_with("it is not an SQLite database"));
        write(&bytes[..bytes.len() - 1]);
        assert!(reason(&other).ends_with(&format!("expected {}", bytes.len())));
        let mut corrupt = bytes.clone();
        corrupt[4096..4200].fill(0xa5);
        write(&corrupt);
        assert!(reason(&other).contains("is not a valid backup"));
        let mut in_wal_mode = bytes;
        in_wal_mode[18..20].fill(2);
        write(&in_wal_mode);
        assert!(reason(&other).contains("the database of a store"));
        assert!(reason(&folder.path().join("missing")).contains("missing: No such file"));
    }

    #[test]
    fn a_backup_of_a_newer_version_is_rejected() {
        let (_folder, path) = backup();
        let version = schema::VERSION + 1;
        let db = Connection::open(&path).unwrap();
        db.pragma_update(None, "user_version", version).unwrap();
        assert!(reason(&path).starts_with(&format!("the backup has schema version {version}")));
        db.pragma_update(None, "user_version", 0).unwrap();
        assert!(reason(&path).ends_with("it was not made by Streamer"));
    }

    #[test]
    fn a_corrupt_value_is_found() {
        let (_folder, path) = backup();
        let db = Connection::open(&path).unwrap();
        db.execute_batch("INSERT INTO payloads VALUES (zeroblob(16), '', x'01', 7, NULL)").unwrap();
        let reason = reason(&path);
        assert!(reason.contains("table payloads: ") && reason.contains("checksum"), "{reason}");
    }

    #[test]
    fn a_store_is_never_replaced() {
        let (folder, path) = backup();
        let data = folder.path().join("data");
        let mut steps = Vec::new();
        restore(&path, &data, |step| steps.push(step)).unwrap();
        assert_eq!(steps, [RestoreStep::Check, RestoreStep::Copy]);
        let again = restore(&path, &data, |_| {}).unwrap_err();
        assert!(matches!(again, RestoreError::HasStore(_)), "{again}");
    }

    #[test]
    fn workers_cannot_resume_attempts_of_a_restored_store() {
        let (folder, path) = backup();
        let db = Connection::open(&path).unwrap();
        db.execute_batch(
            "INSERT INTO requests (uid, tenant, user, action, state, attempt, last_seq, attempt_seq,
                 priority, create_time, not_before, lease_until, worker, fingerprint)
             VALUES (zeroblob(16), 't', 'u', 'a', 1, 1, 2, 1, 0, 1, 1, 9, 'w', x'00');",
        )
        .unwrap();
        let data = folder.path().join("data");
        restore(&path, &data, |_| {}).unwrap();
        let db = Connection::open(data.join(DATABASE)).unwrap();
        let worker = db.query_row("SELECT worker FROM requests", [], |row| row.get(0));
        assert_eq!(worker, Ok(None::<String>));
    }
}
