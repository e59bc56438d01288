//! Tracks the usage of the store by tenants and users in table `usage`. The writer caches the rows that it has read,
//! and stores changed rows once per group of operations.

use std::{cell::RefCell, collections::HashMap, ops::Deref, sync::Arc};

use rusqlite::{Connection, OptionalExtension, params};

use streamer_core::saturate;
use streamer_store::{Owner, QuotaUsage};

/// Estimated size of the rows and index entries of a request without its payload, metadata, events and checkpoint, in
/// bytes. `schema.rs` contains the same number.
pub(super) const REQUEST_BYTES: usize = 1024;
/// Estimated size of the row of a batch without its events, in bytes. `schema.rs` contains the same number.
pub(super) const BATCH_BYTES: usize = 64;
/// Maximum number of rows that stay cached between groups.
const MAX_ROWS: usize = 10_000;
/// User name in the row of a whole tenant. Names of users are never empty.
const WHOLE_TENANT: &str = "";

/// Context of a writer operation: the open transaction, and the usage of owners.
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
    /// Returns the usage of an owner.
    pub(super) fn usage_of(&self, owner: &Owner) -> rusqlite::Result<QuotaUsage> {
        let mut rows = self.usage.rows.borrow_mut();
        let tenant = *rows.get(self, &owner.tenant, WHOLE_TENANT)?;
        let user = *rows.get(self, &owner.tenant, &owner.user)?;
        Ok(QuotaUsage {
            queued_of_tenant: saturate::to_u64(tenant.queued),
            queued_of_user: saturate::to_u64(user.queued),
            stored_bytes_of_tenant: saturate::to_u64(tenant.bytes),
        })
    }

    /// Adds `queued` to the number of queued requests of an owner, and `bytes` to the size of its requests. Both can be
    /// negative.
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

/// Cached rows of table `usage`.
#[derive(Default)]
pub(super) struct Usage {
    rows: RefCell<Rows>,
}

#[derive(Default)]
struct Rows {
    by_tenant: HashMap<Arc<str>, HashMap<Arc<str>, Row>>,
    count: usize,
    /// Tenant and user of each changed row that is not yet stored.
    changed: Vec<(Arc<str>, Arc<str>)>,
}

#[derive(Clone, Copy, Default)]
struct Row {
    queued: i64,
    /// Size of the requests; zero in the rows of users.
    bytes: i64,
    has_changed: bool,
}

impl Usage {
    /// Stores the changed rows in the same transaction as the changes.
    pub(super) fn store(&self, db: &Connection) -> rusqlite::Result<()> {
        let mut rows = self.rows.borrow_mut();
        let Rows { by_tenant, changed, .. } = &mut *rows;
        for (tenant, user) in changed.drain(..) {
            let Some(row) = by_tenant.get_mut(&tenant).and_then(|users| users.get_mut(&user))
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

    /// Clears the cache, so that after a rollback the stored rows are read again.
    pub(super) fn clear_cache(&self) {
        *self.rows.borrow_mut() = Rows::default();
    }

    fn trim(&self, max_rows: usize) {
        if self.rows.borrow().count > max_rows {
            self.clear_cache();
        }
    }
}

impl Rows {
    fn get(&mut self, db: &Connection, tenant: &str, user: &str) -> rusqlite::Result<&mut Row> {
        // The row is looked up twice, because a borrow that one branch returns would extend through the other branch.
        if !self.by_tenant.get(tenant).is_some_and(|users| users.contains_key(user)) {
            let row = db
                .prepare_cached("SELECT queued, bytes FROM usage WHERE tenant = ?1 AND user = ?2")?
                .query_row(params![tenant, user], |row| {
                    Ok(Row { queued: row.get(0)?, bytes: row.get(1)?, has_changed: false })
                })
                .optional()?;
            self.count += 1;
            let users = self.by_tenant.entry(tenant.into()).or_default();
            users.insert(user.into(), row.unwrap_or_default());
        }
        let row = self.by_tenant.get_mut(tenant).and_then(|users| users.get_mut(user));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(crate::schema::USAGE).unwrap();
        connection
    }

    fn owner(user: &str) -> Owner {
        Owner { tenant: "acme".into(), user: user.into() }
    }

    #[test]
    fn clearing_the_cache_discards_only_changes_that_are_not_stored() {
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
        usage.clear_cache();
        assert_eq!((used("ann"), used("bob")), ((3, 2, 110), (3, 1, 110)));
    }

    #[test]
    fn rows_without_usage_are_deleted() {
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
