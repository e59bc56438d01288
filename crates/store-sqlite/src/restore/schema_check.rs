//! Checks the schema of a backup.
//!
//! SQLite evaluates what a schema contains. A trigger that was added to a backup would run in the transactions of the
//! server, and a missing table or index would be detected only by a running server. Therefore the schema must be the
//! one that this program creates.

use rusqlite::Connection;
use streamer_core::validate::cut;

use super::schema;

/// Beginning of the statements that SQLite stores for tables and indexes. Virtual tables, views and triggers have a
/// different one.
const ALLOWED: [&str; 3] = ["CREATE TABLE ", "CREATE INDEX ", "CREATE UNIQUE INDEX "];
/// Table to which migrations added columns that new databases have at different positions. No statement depends on the
/// order of its columns.
const UNORDERED: &str = "requests";
/// Maximum size of a name in an error message, in bytes.
const MAX_NAME_BYTES: usize = 100;

/// Row of table `sqlite_schema`.
#[derive(Debug, PartialEq, Eq)]
struct Object {
    kind: String,
    name: String,
    table: String,
    /// Statement that creates the object.
    sql: String,
}

impl Object {
    fn all(db: &Connection) -> Result<Vec<Self>, String> {
        let query = "SELECT type, name, tbl_name, COALESCE(sql, '') FROM sqlite_schema";
        let objects = db.prepare(query).and_then(|mut statement| {
            let objects = statement.query_map([], |row| {
                let [kind, name, table] = [row.get(0)?, row.get(1)?, row.get(2)?];
                Ok(Self { kind, name, table, sql: row.get(3)? })
            })?;
            objects.collect()
        });
        objects.map_err(|error| format!("its schema cannot be read: {error}"))
    }

    /// Returns whether this object has the same definition as `expected`.
    fn matches(&self, expected: &Self) -> bool {
        let has_same_names = (&self.kind, &self.name, &self.table)
            == (&expected.kind, &expected.name, &expected.table);
        let normalize = if expected.name == UNORDERED { sorted } else { normalized };
        has_same_names && normalize(&self.sql) == normalize(&expected.sql)
    }
}

/// Checks that a database has only tables and indexes. SQLite executes nothing when it reads their definitions.
pub(super) fn check_types(db: &Connection) -> Result<(), String> {
    // Not by their type: virtual tables have type `table`, too.
    let is_allowed = |object: &Object| ALLOWED.iter().any(|start| object.sql.starts_with(start));
    match Object::all(db)?.iter().find(|object| !is_allowed(object)) {
        Some(Object { name, .. }) => Err(format!("{} is not a table or index", quoted(name))),
        None => Ok(()),
    }
}

/// Checks that a database has the tables and indexes of a new store, and no others.
pub(super) fn compare(db: &Connection) -> Result<(), String> {
    let unavailable = |error: &dyn std::fmt::Display| format!("cannot create a schema: {error}");
    let new = Connection::open_in_memory().map_err(|error| unavailable(&error))?;
    schema::migrate(&new).map_err(|error| unavailable(&error))?;
    let expected = Object::all(&new)?;
    let found = Object::all(db)?;
    for object in &expected {
        let Object { kind, name, .. } = object;
        match found.iter().find(|found| found.name == *name) {
            None => return Err(format!("{kind} {name} is missing")),
            Some(found) if !found.matches(object) => {
                return Err(format!("{kind} {name} has an unexpected definition"));
            }
            Some(_) => {}
        }
    }
    let is_known = |object: &Object| expected.iter().any(|known| known.name == object.name);
    if let Some(Object { name, .. }) = found.iter().find(|object| !is_known(object)) {
        return Err(format!("{} is not part of the schema of a store", quoted(name)));
    }
    if found.len() != expected.len() {
        return Err("its schema defines an object twice".into());
    }
    Ok(())
}

/// Returns a name from the file for an error message, without control characters.
fn quoted(name: &str) -> String {
    format!("{:?}", cut(name.to_owned(), MAX_NAME_BYTES))
}

/// Returns a statement with one space between its words and punctuation marks. `ALTER TABLE` and the source code of
/// different versions use different spaces.
fn normalized(sql: &str) -> String {
    let mut spaced = String::with_capacity(sql.len());
    for character in sql.chars() {
        if matches!(character, '(' | ')' | ',') {
            spaced.extend([' ', character, ' ']);
        } else {
            spaced.push(character);
        }
    }
    spaced.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns the normalized statement that creates a table, with its columns in alphabetical order.
fn sorted(sql: &str) -> String {
    let normalized = normalized(sql);
    let parts = normalized.split_once(" ( ").and_then(|(start, rest)| {
        rest.rsplit_once(" ) ").map(|(columns, end)| (start, columns, end))
    });
    let Some((start, columns, end)) = parts else { return normalized };
    let mut columns: Vec<_> = columns.split(" , ").collect();
    columns.sort_unstable();
    format!("{start} ( {} ) {end}", columns.join(" , "))
}
