//! Opens the database file, and defines its tables and its schema version.

mod migrations;

use std::path::Path;

use rusqlite::{Connection, OpenFlags, config::DbConfig};

use super::error::sqlite_error;
use streamer_core::saturate;
use streamer_store::StoreError;

pub(super) use migrations::migrate;

/// Schema version that this program writes.
pub(super) const VERSION: i64 = 7;

/// Tables of the current schema version, except `usage` and `large_values`. Payloads, events and frequently updated
/// columns are in separate tables, so that a state change rewrites only a small row, regardless of the size of the
/// payload. Times are in milliseconds since the Unix epoch. `uid` is a big-endian ULID, so that rows are written in
/// order. `state` is defined in `row.rs`. `crc` is defined in `checksum.rs`, and absent in rows that version 1 wrote.
/// In table `actions`, an empty tenant means all tenants.
///
/// `delayed` is 1 from the time at which a request is queued with a later due time until it is released. Only released
/// requests are in the index of the queue, which begins with the action, so that a scan for the actions of a processor
/// passes neither delayed requests nor requests for other actions.
const TABLES: &str = "
CREATE TABLE requests (
    uid BLOB PRIMARY KEY,
    client_id TEXT,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    action TEXT NOT NULL,
    state INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    attempt_seq INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    create_time INTEGER NOT NULL,
    start_time INTEGER,
    finish_time INTEGER,
    not_before INTEGER NOT NULL,
    deadline INTEGER,
    close_by INTEGER,
    expire_at INTEGER,
    lease_until INTEGER,
    lease_holder TEXT,
    worker TEXT,
    progress BLOB,
    metadata BLOB,
    cancel_reason TEXT,
    error BLOB,
    output_chunks INTEGER,
    output_sha256 BLOB,
    redrive_of BLOB,
    trace_parent TEXT,
    trace_state TEXT,
    fingerprint BLOB NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0,
    crc INTEGER,
    delayed INTEGER NOT NULL DEFAULT 0,
    failed_attempts INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE UNIQUE INDEX requests_by_client_id ON requests (tenant, user, client_id)
    WHERE client_id IS NOT NULL;
CREATE INDEX requests_by_owner ON requests (tenant, user, uid);
CREATE INDEX requests_by_tenant ON requests (tenant, uid);
CREATE INDEX requests_ready ON requests (action, tenant, priority DESC, user, not_before, uid)
    WHERE state = 0 AND delayed = 0;
CREATE INDEX requests_delayed ON requests (not_before) WHERE state = 0 AND delayed = 1;
CREATE INDEX requests_expiring ON requests (expire_at) WHERE state = 0 AND expire_at IS NOT NULL;
CREATE INDEX requests_leased ON requests (lease_until) WHERE state = 1;

CREATE TABLE payloads (
    uid BLOB PRIMARY KEY,
    content_type TEXT NOT NULL,
    data BLOB NOT NULL,
    crc INTEGER,
    large INTEGER
) WITHOUT ROWID;

CREATE TABLE checkpoints (
    uid BLOB PRIMARY KEY,
    data BLOB NOT NULL,
    crc INTEGER,
    large INTEGER
) WITHOUT ROWID;

CREATE TABLE events (
    uid BLOB NOT NULL,
    last_seq INTEGER NOT NULL,
    batch BLOB NOT NULL,
    crc INTEGER,
    large INTEGER,
    PRIMARY KEY (uid, last_seq)
) WITHOUT ROWID;

CREATE TABLE connections (
    id BLOB PRIMARY KEY,
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    gateway TEXT NOT NULL,
    remote_address TEXT NOT NULL,
    user_agent TEXT NOT NULL,
    connect_time INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX connections_by_tenant ON connections (tenant, id);

CREATE TABLE gateways (
    gateway TEXT PRIMARY KEY,
    alive_until INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE actions (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    declare_time INTEGER NOT NULL,
    declaration BLOB NOT NULL,
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;

CREATE TABLE health (only_row INTEGER PRIMARY KEY CHECK (only_row = 1), checks INTEGER NOT NULL);
INSERT INTO health VALUES (1, 0);
";

/// Table of the usage of each tenant (the row with an empty user) and of each user: the number of queued requests, and
/// the size in bytes of the requests with their payloads, metadata, events and checkpoints.
pub(super) const USAGE: &str = "
CREATE TABLE usage (
    tenant TEXT NOT NULL,
    user TEXT NOT NULL,
    queued INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (tenant, user)
) WITHOUT ROWID;
";

/// Table of large payloads, checkpoints and batches of events; see `large_values.rs`.
const LARGE_VALUES: &str = "
CREATE TABLE large_values (
    id INTEGER PRIMARY KEY,
    data BLOB NOT NULL
);
";

pub(super) fn open_for_writing(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL;
         PRAGMA synchronous = FULL;
         PRAGMA wal_autocheckpoint = 4000;
         PRAGMA temp_store = MEMORY;
         PRAGMA cache_size = -16384;",
    )?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Opens the connection of the checkpointer thread.
pub(super) fn open_for_checkpoints(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.execute_batch(
        "PRAGMA synchronous = FULL;
         PRAGMA cache_size = -64;",
    )?;
    Ok(connection)
}

pub(super) fn open_for_reading(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.execute_batch("PRAGMA cache_size = -4096; PRAGMA busy_timeout = 5000;")?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

/// Opens a database whose content is not trusted. Its schema can call no function with a side effect, its triggers and
/// views are disabled, no statement can damage it, and corrupt pages are detected when they are read.
pub(super) fn open_untrusted(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    // SQLite reads the schema with the first query, which follows.
    for (option, value) in [
        (DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true),
        (DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false),
        (DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false),
        (DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false),
    ] {
        connection.set_db_config(option, value)?;
    }
    connection.execute_batch("PRAGMA cell_size_check = ON; PRAGMA cache_size = -4096;")?;
    Ok(connection)
}

/// Checkpoints the write-ahead log of the previous process, and verifies that the database file is complete.
pub(super) fn check_size(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let doing = "checking the file size";
    let failed = |error: &rusqlite::Error| sqlite_error("checkpointing the write-ahead log", error);
    connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").map_err(|e| failed(&e))?;
    let expected = size(connection).map_err(|error| sqlite_error(doing, &error))?;
    let found = path.metadata().map_or(0, |metadata| metadata.len());
    if found < expected {
        let reason = format!("{} has {found} bytes, expected {expected}", path.display());
        return Err(StoreError::Corrupt { doing, reason });
    }
    Ok(())
}

/// Returns the size of the database in bytes.
pub(super) fn size(connection: &Connection) -> rusqlite::Result<u64> {
    let number = |name: &str| {
        let number = connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        number.map(saturate::to_u64)
    };
    Ok(number("page_count")? * number("page_size")?)
}

/// Resets the state that the previous process left. Only one process can have the file open, so the leases of the
/// previous process are void, except for attempts that workers run: a worker reconnects and resumes its attempt, or its
/// lease expires.
pub(super) fn reset_after_restart(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(
        "BEGIN;
         UPDATE requests SET lease_until = 0 WHERE state = 1 AND worker IS NULL;
         DELETE FROM connections;
         DELETE FROM gateways;
         COMMIT;",
    )
}

/// Prevents workers from resuming the attempts that they run.
pub(super) fn release_workers(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch("UPDATE requests SET worker = NULL WHERE state = 1")
}

/// Writes a row, to verify that the store is writable.
pub(super) fn write_probe(db: &Connection) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE health SET checks = checks + 1")?.execute([]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_of_an_untrusted_file_is_not_executed() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("file");
        let db = Connection::open(&path).unwrap();
        db.execute_batch(
            "CREATE TABLE a (b);
             CREATE TRIGGER t AFTER INSERT ON a BEGIN SELECT RAISE(FAIL, 'it runs'); END;
             CREATE VIEW v AS SELECT 1;",
        )
        .unwrap();
        let untrusted = open_untrusted(&path).unwrap();
        untrusted.execute_batch("INSERT INTO a VALUES (1)").unwrap();
        for denied in ["SELECT * FROM v", "PRAGMA writable_schema = ON; DELETE FROM sqlite_schema"]
        {
            assert!(untrusted.execute_batch(denied).is_err(), "{denied}");
        }
        assert!(open_untrusted(&folder.path().join("missing")).is_err());
    }
}
