//! How much tenants and users have in the store. Table `usage` holds it; the writer keeps what it has read
//! of it in memory, and stores what has changed once for each group of operations.

use std::{cell::RefCell, collections::HashMap, ops::Deref, sync::Arc};

use rusqlite::{Connection, OptionalExtension, params};

use crate::{Owner, QuotaUse};

/// Size of the rows and index entries of a request without its payload, metadata, events and checkpoint, in bytes;
/// and of the row of a batch without its events. `schema.rs` has both numbers too.
pub(super) const REQUEST_BYTES: usize = 1024;
pub(super) const BATCH_BYTES: usize = 64;
/// Rows kept in memory at most, between groups.
const MAX_ROWS: usize = 10_000;
/// In place of the user, in the row of a whole tenant. No user has an empty name.
const WHOLE_TENANT: &str = "";

/// What an operation of the writer works on: the open transaction, and what its owner has.
pub(super) struct Db<'a> {
    pub(super) connection: &'a Connection,
    pub(super) usage: &'a Usage,
}

impl Deref for Db<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection
    }
}

impl Db<'_> {
    /// What the owner has.
    pub(super) fn usage_of(&self, owner: &Owner) -> rusqlite::Result<QuotaUse> {
        let mut rows = self.usage.rows.borrow_mut();
        let tenant = *rows.get(self, &owner.tenant, WHOLE_TENANT)?;
        let user = *rows.get(self, &owner.tenant, &owner.user)?;
        Ok(QuotaUse {
            queued_of_tenant: unsigned(tenant.queued),
            queued_of_user: unsigned(user.queued),
            stored_bytes_of_tenant: unsigned(tenant.bytes),
        })
    }

    /// Adds to the queued requests and to the bytes of the owner; negative numbers take away.
    pub(super) fn change_usage(
        &self,
        owner: &Owner,
        queued: i64,
        bytes: i64,
    ) -> rusqlite::Result<()> {
        let mut rows = self.usage.rows.borrow_mut();
        rows.change(self, &owner.tenant, WHOLE_TENANT, queued, bytes)?;
        if queued != 0 {
            rows.change(self, &owner.tenant, &owner.user, queued, 0)?;
        }
        Ok(())
    }
}

/// Rows of table `usage`.
#[derive(Default)]
pub(super) struct Usage {
    rows: RefCell<Rows>,
}

#[derive(Default)]
struct Rows {
    of_tenants: HashMap<Arc<str>, HashMap<Arc<str>, Row>>,
    count: usize,
    /// Tenant and user of those that are not stored yet.
    changed: Vec<(Arc<str>, Arc<str>)>,
}

#[derive(Clone, Copy, Default)]
struct Row {
    queued: i64,
    /// Zero in the rows of users.
    bytes: i64,
    has_changed: bool,
}

impl Usage {
    /// Stores what has changed, in the transaction of the changes.
    pub(super) fn store(&self, db: &Connection) -> rusqlite::Result<()> {
        let mut rows = self.rows.borrow_mut();
        let Rows { of_tenants, changed, .. } = &mut *rows;
        for (tenant, user) in changed.drain(..) {
            let Some(row) = of_tenants.get_mut(&tenant).and_then(|users| users.get_mut(&user))
            else {
                continue;
            };
            row.has_changed = false;
            if row.queued == 0 && row.bytes == 0 {
                db.prepare_cached("DELETE FROM usage WHERE tenant = ?1 AND user = ?2")?
                    .execute(params![tenant, user])?;
            } else {
                db.prepare_cached("INSERT OR REPLACE INTO usage VALUES (?1, ?2, ?3, ?4)")?
                    .execute(params![tenant, user, row.queued, row.bytes])?;
            }
        }
        drop(rows);
        self.trim(MAX_ROWS);
        Ok(())
    }

    /// Forgets what is in memory. What is stored after a rollback is read anew.
    pub(super) fn forget(&self) {
        *self.rows.borrow_mut() = Rows::default();
    }

    fn trim(&self, max_rows: usize) {
        if self.rows.borrow().count > max_rows {
            self.forget();
        }
    }
}

impl Rows {
    fn get(&mut self, db: &Connection, tenant: &str, user: &str) -> rusqlite::Result<&mut Row> {
        // Looked up twice: a borrow that is returned from one branch would last through the other.
        if !self.of_tenants.get(tenant).is_some_and(|users| users.contains_key(user)) {
            let row = db
                .prepare_cached("SELECT queued, bytes FROM usage WHERE tenant = ?1 AND user = ?2")?
                .query_row(params![tenant, user], |row| {
                    Ok(Row { queued: row.get(0)?, bytes: row.get(1)?, has_changed: false })
                })
                .optional()?;
            self.count += 1;
            let users = self.of_tenants.entry(tenant.into()).or_default();
            users.insert(user.into(), row.unwrap_or_default());
        }
        let row = self.of_tenants.get_mut(tenant).and_then(|users| users.get_mut(user));
        row.ok_or(rusqlite::Error::QueryReturnedNoRows)
    }

    fn change(
        &mut self,
        db: &Connection,
        tenant: &str,
        user: &str,
        queued: i64,
        bytes: i64,
    ) -> rusqlite::Result<()> {
        let row = self.get(db, tenant, user)?;
        row.queued += queued;
        row.bytes += bytes;
        if !std::mem::replace(&mut row.has_changed, true) {
            self.changed.push((tenant.into(), user.into()));
        }
        Ok(())
    }
}

fn unsigned(count: i64) -> u64 {
    u64::try_from(count).unwrap_or(0)
}

/// A size as the table holds it.
pub(super) fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(super::super::schema::USAGE).unwrap();
        connection
    }

    fn owner(user: &str) -> Owner {
        Owner { tenant: "acme".into(), user: user.into() }
    }

    #[test]
    fn what_was_stored_is_found_again_and_what_was_not_is_forgotten() {
        let (connection, usage) = (table(), Usage::default());
        let db = Db { connection: &connection, usage: &usage };
        let used = |user: &str| {
            let used = db.usage_of(&owner(user)).unwrap();
            (used.queued_of_tenant, used.queued_of_user, used.stored_bytes_of_tenant)
        };
        db.change_usage(&owner("ann"), 2, 100).unwrap();
        db.change_usage(&owner("bob"), 1, 10).unwrap();
        assert_eq!((used("ann"), used("bob")), ((3, 2, 110), (3, 1, 110)));
        usage.store(&connection).unwrap();
        db.change_usage(&owner("ann"), 5, 5).unwrap();
        usage.forget();
        assert_eq!((used("ann"), used("bob")), ((3, 2, 110), (3, 1, 110)));
    }

    #[test]
    fn nothing_is_kept_of_those_who_have_nothing() {
        let (connection, usage) = (table(), Usage::default());
        let db = Db { connection: &connection, usage: &usage };
        db.change_usage(&owner("ann"), 1, 100).unwrap();
        usage.store(&connection).unwrap();
        let stored =
            || connection.query_row("SELECT COUNT(*) FROM usage", [], |row| row.get::<_, i64>(0));
        assert_eq!(stored(), Ok(2));
        db.change_usage(&owner("ann"), -1, -100).unwrap();
        usage.store(&connection).unwrap();
        assert_eq!(stored(), Ok(0));
        usage.trim(1);
        assert_eq!(usage.rows.borrow().count, 0);
    }
}
