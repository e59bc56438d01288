//! Stores declarations of actions, which apply while no processor or worker offers the actions.

use prost::Message;
use rusqlite::{Connection, params};
use streamer_core::Timestamp;

use super::row;
use streamer_store::DeclaredAction;

pub(super) fn save(
    db: &Connection,
    actions: &[DeclaredAction],
    now: Timestamp,
) -> rusqlite::Result<()> {
    let mut insert = db.prepare_cached("INSERT OR REPLACE INTO actions VALUES (?1, ?2, ?3, ?4)")?;
    for DeclaredAction { tenant, action } in actions {
        let tenant = tenant.as_deref().unwrap_or_default();
        insert.execute(params![tenant, action.name, now.as_millis(), action.encode_to_vec()])?;
    }
    Ok(())
}

pub(super) fn list(db: &Connection, since: Timestamp) -> rusqlite::Result<Vec<DeclaredAction>> {
    db.prepare_cached("SELECT declaration, tenant FROM actions WHERE declare_time >= ?1")?
        .query_map([since.as_millis()], |row| {
            let tenant = Some(row.get::<_, String>(1)?).filter(|tenant| !tenant.is_empty());
            let action = row::message(row, 0)?.unwrap_or_default();
            Ok(DeclaredAction { tenant, action })
        })?
        .collect()
}
