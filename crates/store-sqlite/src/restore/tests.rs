//! Tests of restores.

use std::path::PathBuf;

use tempfile::TempDir;

use super::*;

/// Inserts a payload whose checksum is wrong.
const CORRUPT_PAYLOAD: &str = "INSERT INTO payloads VALUES (zeroblob(16), '', x'01', 7, NULL)";

/// Returns a folder with a backup of an empty store.
fn backup() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("backup");
    schema::migrate(&Connection::open(&path).unwrap()).unwrap();
    (folder, path)
}

/// Returns a folder with a backup of an empty store of the first version.
fn old_backup() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("backup");
    let db = Connection::open(&path).unwrap();
    db.execute_batch(include_str!("../schema/version_1.sql")).unwrap();
    db.pragma_update(None, "user_version", 1).unwrap();
    (folder, path)
}

/// Returns the names of the files in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
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
    db.execute_batch(CORRUPT_PAYLOAD).unwrap();
    let reason = reason(&path);
    assert!(reason.contains("table payloads: ") && reason.contains("checksum"), "{reason}");
}

#[test]
fn a_store_is_never_replaced() {
    let (folder, path) = backup();
    let data = folder.path().join("data");
    let mut steps = Vec::new();
    restore(&path, &data, |step| steps.push(step)).unwrap();
    assert_eq!(steps, [RestoreStep::Copy, RestoreStep::Check]);
    let again = restore(&path, &data, |_| {}).unwrap_err();
    assert!(matches!(again, RestoreError::HasStore(_)), "{again}");
}

#[test]
fn a_file_that_sqlite_would_apply_to_the_restored_database_is_never_ignored() {
    let (folder, path) = backup();
    for suffix in ["-journal", "-wal", "-shm"] {
        let data = folder.path().join(suffix);
        fs::create_dir(&data).unwrap();
        let name = format!("{DATABASE}{suffix}");
        fs::write(data.join(&name), "stale").unwrap();
        let error = restore(&path, &data, |_| {}).unwrap_err();
        assert!(matches!(error, RestoreError::HasStore(_)), "{error}");
        assert_eq!(names(&data), [name]);
    }
}

#[test]
fn files_of_a_killed_restore_are_not_applied_to_the_next_one() {
    let (folder, path) = backup();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    // A write-ahead log that SQLite would apply to any database of this name.
    let other = folder.path().join("other");
    fs::copy(&path, &other).unwrap();
    let db = schema::open_for_writing(&other).unwrap();
    db.execute_batch(CORRUPT_PAYLOAD).unwrap();
    fs::copy(folder.path().join("other-wal"), data.join("restore.tmp-wal")).unwrap();
    for suffix in ["", "-journal", "-shm"] {
        fs::write(data.join(format!("{FILE}{suffix}")), "stale").unwrap();
    }
    restore(&path, &data, |_| {}).unwrap();
    assert_eq!(names(&data), ["lock", DATABASE]);
    let db = Connection::open(data.join(DATABASE)).unwrap();
    let payloads = db.query_row("SELECT COUNT(*) FROM payloads", [], |row| row.get(0));
    assert_eq!(payloads, Ok(0));
}

#[test]
fn only_the_bytes_that_were_checked_are_restored() {
    let (folder, path) = backup();
    let good = fs::read(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch(CORRUPT_PAYLOAD).unwrap();
    let corrupt = fs::read(&path).unwrap();
    assert_eq!(corrupt.len(), good.len());
    for changed_at in [RestoreStep::Copy, RestoreStep::Check] {
        fs::write(&path, &good).unwrap();
        let data = folder.path().join(format!("{changed_at:?}"));
        let restored = restore(&path, &data, |step| {
            if step == changed_at {
                fs::write(&path, &corrupt).unwrap();
            }
        });
        match changed_at {
            RestoreStep::Copy => {
                let reason = restored.unwrap_err().to_string();
                assert!(reason.contains("checksum"), "{reason}");
                assert!(!data.exists());
            }
            RestoreStep::Check => {
                restored.unwrap();
                assert_eq!(fs::read(data.join(DATABASE)).unwrap(), good);
            }
        }
    }
}

#[test]
fn a_backup_with_a_different_schema_is_rejected() {
    let insert = "INSERT INTO sqlite_schema VALUES";
    let changes = [
        ("DROP TABLE connections", "table connections is missing"),
        ("DROP TABLE usage", "table usage is missing"),
        ("DROP INDEX requests_by_owner", "index requests_by_owner is missing"),
        ("CREATE TABLE \"a\nb\" (c)", r#""a\nb" is not part of the schema"#),
        ("CREATE INDEX extra ON payloads (crc)", "\"extra\" is not part of the schema"),
        ("ALTER TABLE payloads ADD COLUMN extra", "table payloads has an unexpected definition"),
        (
            "ALTER TABLE payloads DROP COLUMN crc; ALTER TABLE payloads ADD COLUMN crc INTEGER",
            "table payloads has an unexpected definition",
        ),
        (
            "ALTER TABLE requests ADD COLUMN extra AS (1)",
            "table requests has an unexpected definition",
        ),
        (
            "DROP INDEX requests_leased;
             CREATE INDEX requests_leased ON requests (lease_until) WHERE state = 2",
            "index requests_leased has an unexpected definition",
        ),
        (
            "DROP TABLE gateways; CREATE TABLE gateways (
                 gateway TEXT PRIMARY KEY COLLATE NOCASE, alive_until INTEGER NOT NULL
             ) WITHOUT ROWID",
            "table gateways has an unexpected definition",
        ),
        (
            "CREATE TRIGGER extra AFTER INSERT ON payloads BEGIN DELETE FROM events; END",
            "\"extra\" is not a table or index",
        ),
        ("CREATE VIEW extra AS SELECT 1", "\"extra\" is not a table or index"),
        ("DROP TABLE usage; CREATE VIEW usage AS SELECT 1", "\"usage\" is not a table or index"),
        (
            &format!(
                "{insert} ('table', 'extra', 'extra', 0, 'CREATE VIRTUAL TABLE extra USING none')"
            ),
            "\"extra\" is not a table or index",
        ),
        // A statement that contradicts the other columns of its row.
        (
            &format!(
                "{insert} ('table', 'extra', 'payloads', 0,
                     'CREATE TRIGGER extra AFTER INSERT ON payloads BEGIN SELECT 1; END')"
            ),
            "malformed database schema (extra)",
        ),
        (&format!("{insert} ('index', 'extra', 'payloads', 2, NULL)"), "is not a valid backup"),
    ];
    for (change, expected) in changes {
        let (_folder, path) = backup();
        let db = Connection::open(&path).unwrap();
        db.execute_batch(&format!("PRAGMA writable_schema = ON; {change}")).unwrap();
        drop(db);
        let reason = reason(&path);
        assert!(reason.contains(expected), "{change}: {reason}");
    }
}

#[test]
fn a_trigger_in_an_old_backup_does_not_run() {
    let (_folder, path) = old_backup();
    let db = Connection::open(&path).unwrap();
    db.execute_batch(
        "CREATE TRIGGER extra AFTER UPDATE ON requests BEGIN SELECT RAISE(FAIL, 'it runs'); END",
    )
    .unwrap();
    assert!(reason(&path).ends_with("\"extra\" is not a table or index"));
}

#[test]
fn a_backup_of_the_first_version_is_migrated() {
    let (folder, path) = old_backup();
    let data = folder.path().join("data");
    let Restored { schema_version, .. } = restore(&path, &data, |_| {}).unwrap();
    assert_eq!(schema_version, 1);
    // Its columns have a different order, which is accepted when it is backed up again.
    let again = folder.path().join("again");
    let db = Connection::open(data.join(DATABASE)).unwrap();
    db.execute("VACUUM INTO ?1", [again.to_str().unwrap()]).unwrap();
    let data = folder.path().join("again-data");
    let Restored { schema_version, .. } = restore(&again, &data, |_| {}).unwrap();
    assert_eq!(schema_version, schema::VERSION);
}

#[test]
fn a_failed_migration_leaves_the_folder_unchanged() {
    let (folder, path) = old_backup();
    Connection::open(&path).unwrap().execute_batch("DROP TABLE checkpoints").unwrap();
    assert!(reason(&path).contains("no such table: checkpoints"));
    let data = folder.path().join("new/inner");
    restore(&path, &data, |_| {}).unwrap_err();
    assert!(!folder.path().join("new").exists());
    // What existed before remains.
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("lock"), "").unwrap();
    fs::write(data.join("dev-key.pem"), "key").unwrap();
    restore(&path, &data, |_| {}).unwrap_err();
    assert_eq!(names(&data), ["dev-key.pem", "lock"]);
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
