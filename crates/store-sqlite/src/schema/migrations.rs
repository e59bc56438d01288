//! Migrations of the schema from earlier versions.

use rusqlite::Connection;
use streamer_store::StoreError;

use super::{LARGE_VALUES, TABLES, USAGE, VERSION};
use crate::error::sqlite_error;

/// Changes from version 1 to version 2.
const FROM_1_TO_2: &str = "
ALTER TABLE requests ADD COLUMN close_by INTEGER;
ALTER TABLE requests ADD COLUMN expire_at INTEGER;
ALTER TABLE requests ADD COLUMN worker TEXT;
UPDATE requests SET expire_at = deadline WHERE state = 0 AND attempt = 0;
DROP INDEX requests_queued;
CREATE INDEX requests_queued ON requests (tenant, action, priority, not_before, uid)
    WHERE state = 0;
CREATE INDEX requests_expiring ON requests (expire_at) WHERE state = 0 AND expire_at IS NOT NULL;
ALTER TABLE requests ADD COLUMN crc INTEGER;
ALTER TABLE payloads ADD COLUMN crc INTEGER;
ALTER TABLE checkpoints ADD COLUMN crc INTEGER;
ALTER TABLE events ADD COLUMN crc INTEGER;
CREATE TABLE actions (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    declare_time INTEGER NOT NULL,
    declaration BLOB NOT NULL,
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
";

/// Changes from version 2 to version 3.
const FROM_2_TO_3: &str = "ALTER TABLE requests ADD COLUMN trace_state TEXT;";

/// Changes from version 3 to version 4, except the creation of table `usage`.
const FROM_3_TO_4: &str = "
ALTER TABLE requests ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE requests SET bytes = 1024 + COALESCE(LENGTH(metadata), 0)
    + COALESCE((SELECT LENGTH(data) FROM payloads WHERE payloads.uid = requests.uid), 0)
    + COALESCE((SELECT LENGTH(data) FROM checkpoints WHERE checkpoints.uid = requests.uid), 0)
    + COALESCE((SELECT SUM(64 + LENGTH(batch)) FROM events WHERE events.uid = requests.uid), 0);
INSERT INTO usage SELECT tenant, '', SUM(state = 0), SUM(bytes) FROM requests GROUP BY tenant;
INSERT INTO usage SELECT tenant, user, COUNT(*), 0 FROM requests WHERE state = 0
    GROUP BY tenant, user;
";

/// Changes from version 4 to version 5, except the creation of table `large_values`. Existing values stay in their
/// rows.
const FROM_4_TO_5: &str = "
ALTER TABLE payloads ADD COLUMN large INTEGER;
ALTER TABLE checkpoints ADD COLUMN large INTEGER;
ALTER TABLE events ADD COLUMN large INTEGER;
";

/// Changes from version 5 to version 6.
const FROM_5_TO_6: &str = "
ALTER TABLE requests ADD COLUMN delayed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE requests ADD COLUMN failed_attempts INTEGER NOT NULL DEFAULT 0;
UPDATE requests SET failed_attempts = MAX(attempt - state, 0) WHERE state IN (0, 1);
UPDATE requests SET delayed = 1 WHERE state = 0 AND not_before > 1000 * CAST(strftime('%s') AS INTEGER);
DROP INDEX requests_queued;
CREATE INDEX requests_ready ON requests (action, tenant, priority, not_before, uid)
    WHERE state = 0 AND delayed = 0;
CREATE INDEX requests_delayed ON requests (not_before) WHERE state = 0 AND delayed = 1;
";

/// Changes from version 6 to version 7.
const FROM_6_TO_7: &str = "
DROP INDEX requests_waiting;
DROP INDEX requests_ready;
CREATE INDEX requests_ready ON requests (action, tenant, priority DESC, user, not_before, uid)
    WHERE state = 0 AND delayed = 0;
";

/// Changes to each version from the version before it; the first changes lead from version 1 to version 2.
const STEPS: [&[&str]; 6] = [
    &[FROM_1_TO_2],
    &[FROM_2_TO_3],
    &[USAGE, FROM_3_TO_4],
    &[LARGE_VALUES, FROM_4_TO_5],
    &[FROM_5_TO_6],
    &[FROM_6_TO_7],
];

/// Migrates the schema to [`VERSION`]. A new file gets the tables of the current version.
pub(crate) fn migrate(connection: &Connection) -> Result<(), StoreError> {
    let doing = "reading the schema version";
    let found: i64 = connection
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(|error| sqlite_error(doing, &error))?;
    let changes = match found {
        0 => format!("{TABLES} {USAGE} {LARGE_VALUES}"),
        VERSION => return Ok(()),
        _ => {
            let first = usize::try_from(found - 1).ok().filter(|first| *first < STEPS.len());
            let first = first.ok_or(StoreError::UnsupportedVersion { found, known: VERSION })?;
            STEPS[first..].concat().join(" ")
        }
    };
    connection
        .execute_batch(&format!("BEGIN; {changes} PRAGMA user_version = {VERSION}; COMMIT;"))
        .map_err(|error| sqlite_error("migrating the schema", &error))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{
        super::super::usage::{BATCH_BYTES, REQUEST_BYTES},
        *,
    };

    /// Tables of version 1, as the first version of the program created them, with requests.
    const VERSION_1: &str = include_str!("version_1.sql");

    /// Opens a file of version 1.
    fn version_1() -> Connection {
        let db = Connection::open_in_memory().unwrap();
        db.execute_batch(VERSION_1).unwrap();
        db
    }

    /// Returns the columns of all tables and indexes, without their order in the tables.
    fn structure(db: &Connection) -> BTreeSet<String> {
        let read = |sql: &str| {
            let mut statement = db.prepare(sql).unwrap();
            let rows = statement.query_map([], |row| row.get::<_, String>(0)).unwrap();
            rows.map(Result::unwrap).collect::<Vec<_>>()
        };
        let columns = read(
            "SELECT m.name || ' ' || c.name || ' ' || c.type || ' ' || c.'notnull' || ' ' || c.pk || ' ' ||
                 COALESCE(c.dflt_value, '')
             FROM sqlite_schema m, pragma_table_info(m.name) c WHERE m.type = 'table'",
        );
        let indexes =
            read("SELECT sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL");
        let words = |sql: String| sql.split_whitespace().collect::<Vec<_>>().join(" ");
        columns.into_iter().chain(indexes.into_iter().map(words)).collect()
    }

    #[test]
    fn a_file_of_every_version_is_migrated() {
        let current = Connection::open_in_memory().unwrap();
        migrate(&current).unwrap();
        let expected = structure(&current);
        assert!(expected.len() > 60, "{expected:?}");
        for steps in 0..STEPS.len() {
            let db = version_1();
            db.execute_batch(&STEPS[..steps].concat().join(" ")).unwrap();
            db.pragma_update(None, "user_version", i64::try_from(steps + 1).unwrap()).unwrap();
            migrate(&db).unwrap();
            assert_eq!(structure(&db), expected, "version {}", steps + 1);
            let version: i64 =
                db.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
            assert_eq!(version, VERSION);
            migrate(&db).unwrap();
        }
    }

    #[test]
    fn a_later_version_is_rejected() {
        let db = Connection::open_in_memory().unwrap();
        for found in [-1, VERSION + 1] {
            db.pragma_update(None, "user_version", found).unwrap();
            let error = migrate(&db).unwrap_err();
            assert!(matches!(error, StoreError::UnsupportedVersion { known: VERSION, .. }));
        }
    }

    #[test]
    fn the_requests_of_version_1_are_kept() {
        let db = version_1();
        migrate(&db).unwrap();
        let usage = |user: &str| {
            db.query_row("SELECT queued, bytes FROM usage WHERE user = ?1", [user], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
            })
        };
        // Three requests with 2 + 3 bytes of metadata and payload, and events of 2, 4 and 6 bytes.
        assert_eq!(usage(""), Ok((2, 17 + 3 * 1024 + 3 * 64)));
        assert_eq!(usage("u"), Ok((2, 0)));
        assert!(usage("v").is_err());
        let delayed = |uid: &str| {
            let sql = format!(
                "SELECT delayed, expire_at, trace_state FROM requests WHERE hex(uid) LIKE '{uid}%'"
            );
            db.query_row(&sql, [], |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, Option<i64>>(1)?,
                    row.get::<_, Option<String>>(2)?,
                ))
            })
        };
        assert_eq!(delayed("00"), Ok((0, Some(9), None)), "due");
        assert_eq!(delayed("02"), Ok((1, None, None)), "due in the year 2286");
    }

    #[test]
    fn the_migration_uses_the_size_estimates_of_the_writer() {
        for (part, bytes) in [
            (format!("bytes = {REQUEST_BYTES} +"), REQUEST_BYTES),
            (format!("SUM({BATCH_BYTES} +"), BATCH_BYTES),
        ] {
            assert!(FROM_3_TO_4.contains(&part), "{bytes}");
        }
    }
}
