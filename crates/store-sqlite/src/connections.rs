//! Live connections and the gateways that serve them.

use rusqlite::{Connection, params};
use streamer_core::{Timestamp, Uid, saturate};

use super::row;
use streamer_store::{ConnectionPage, ConnectionRecord, Owner};

pub(super) fn update(
    db: &Connection,
    opened: &[ConnectionRecord],
    closed: &[Uid],
) -> rusqlite::Result<()> {
    let mut insert = db
        .prepare_cached("INSERT OR REPLACE INTO connections VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
    for connection in opened {
        insert.execute(params![
            connection.id.to_bytes(),
            connection.owner.tenant,
            connection.owner.user,
            connection.gateway,
            connection.remote_address,
            connection.user_agent,
            connection.connect_time.as_millis(),
        ])?;
    }
    let mut delete = db.prepare_cached("DELETE FROM connections WHERE id = ?1")?;
    for id in closed {
        delete.execute([id.to_bytes()])?;
    }
    Ok(())
}

pub(super) fn renew_gateway(
    db: &Connection,
    gateway: &str,
    until: Timestamp,
) -> rusqlite::Result<()> {
    db.prepare_cached("INSERT OR REPLACE INTO gateways VALUES (?1, ?2)")?
        .execute(params![gateway, until.as_millis()])
        .map(drop)
}

pub(super) fn list(
    db: &Connection,
    tenant: &str,
    user: Option<&str>,
    after: Option<Uid>,
    limit: usize,
    now: Timestamp,
) -> rusqlite::Result<ConnectionPage> {
    let mut query = db.prepare_cached(
        "SELECT id, tenant, user, gateway, remote_address, user_agent, connect_time
         FROM connections
         WHERE tenant = ?1 AND id > ?2 AND (?3 IS NULL OR user = ?3)
           AND gateway IN (SELECT gateway FROM gateways WHERE alive_until > ?4)
         ORDER BY id LIMIT ?5",
    )?;
    let after = after.map_or_else(Vec::new, |id| id.to_bytes().to_vec());
    let wanted = saturate::to_i64(limit.saturating_add(1));
    let rows = query.query_map(params![tenant, after, user, now.as_millis(), wanted], |row| {
        Ok(ConnectionRecord {
            id: row::uid(row, 0)?,
            owner: Owner { tenant: row.get(1)?, user: row.get(2)? },
            gateway: row.get(3)?,
            remote_address: row.get(4)?,
            user_agent: row.get(5)?,
            connect_time: Timestamp::from_millis(row.get(6)?),
        })
    })?;
    let mut connections = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    let more = connections.len() > limit;
    connections.truncate(limit);
    let next = if more { connections.last().map(|connection| connection.id) } else { None };
    Ok(ConnectionPage { connections, next })
}
