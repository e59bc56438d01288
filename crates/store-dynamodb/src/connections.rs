//! Live connections and the gateways that serve them.

use std::time::Duration;

use aws_sdk_dynamodb::types::{DeleteRequest, PutRequest, ReturnConsumedCapacity, WriteRequest};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use streamer_core::{Timestamp, Uid};
use streamer_store::{ConnectionPage, ConnectionRecord, Owner, StoreError};

use crate::{
    client::{Backoff, Dynamo},
    error::{corrupt, store_error},
    expression::{Expression, key, text},
    item::{decode, encode_item},
    item_ops::{numbers_by_name, text_of},
};

const KIND: &str = "gateway";
/// Maximum number of writes in one `BatchWriteItem` call.
const MAX_BATCH_WRITES: usize = 25;
/// Time after which other gateways remove the connections of a dead gateway.
const REMOVE_AFTER: Duration = Duration::from_secs(600);
/// Maximum number of connections of a dead gateway that are removed at once.
const MAX_REMOVED: usize = 500;

#[derive(Serialize, Deserialize)]
struct ConnectionItem {
    id: String,
    tenant: String,
    user: String,
    gateway: String,
    remote_address: String,
    user_agent: String,
    connect_time: i64,
    tenant_shard: String,
}

impl ConnectionItem {
    fn into_record(self) -> Result<ConnectionRecord, StoreError> {
        Ok(ConnectionRecord {
            id: self.id.parse().map_err(|error| corrupt("reading a connection", error))?,
            owner: Owner { tenant: self.tenant, user: self.user },
            gateway: self.gateway,
            remote_address: self.remote_address,
            user_agent: self.user_agent,
            connect_time: Timestamp::from_millis(self.connect_time),
        })
    }
}

impl Dynamo {
    pub(crate) async fn update_connections(
        &self,
        opened: Vec<ConnectionRecord>,
        closed: Vec<Uid>,
    ) -> Result<(), StoreError> {
        let doing = "updating connections";
        let mut writes = Vec::with_capacity(opened.len() + closed.len());
        for connection in opened {
            if closed.contains(&connection.id) {
                continue;
            }
            let id = connection.id.to_string();
            let item = ConnectionItem {
                tenant_shard: format!("{}\t{}", connection.owner.tenant, self.shard_of(&id)),
                id,
                tenant: connection.owner.tenant,
                user: connection.owner.user,
                gateway: connection.gateway,
                remote_address: connection.remote_address,
                user_agent: connection.user_agent,
                connect_time: connection.connect_time.as_millis(),
            };
            let put = PutRequest::builder().set_item(Some(encode_item(&item)?)).build();
            let put = put.map_err(|error| corrupt(doing, error))?;
            writes.push(WriteRequest::builder().put_request(put).build());
        }
        for id in closed {
            writes.push(delete_connection(&id.to_string())?);
        }
        self.write_connections(writes).await
    }

    async fn write_connections(&self, writes: Vec<WriteRequest>) -> Result<(), StoreError> {
        let doing = "updating connections";
        for batch in writes.chunks(MAX_BATCH_WRITES) {
            let mut left = batch.to_vec();
            let mut backoff = Backoff::default();
            while !left.is_empty() {
                let written = self
                    .client
                    .batch_write_item()
                    .request_items(&self.tables.connections, left)
                    .return_consumed_capacity(ReturnConsumedCapacity::Total)
                    .send()
                    .await
                    .map_err(|error| store_error(doing, &error))?;
                self.metrics.record_write(written.consumed_capacity());
                left = written
                    .unprocessed_items
                    .and_then(|mut all| all.remove(&self.tables.connections))
                    .unwrap_or_default();
                if !left.is_empty() {
                    let reason = "some items were not processed".into();
                    backoff.wait(StoreError::Overloaded { doing, reason }).await?;
                }
            }
        }
        Ok(())
    }

    pub(crate) async fn renew_gateway(
        &self,
        gateway: &str,
        until: Timestamp,
    ) -> Result<(), StoreError> {
        self.renew_member(KIND, gateway, until).await?;
        self.remove_dead_gateways(until).await
    }

    /// Removes the connections of dead gateways.
    async fn remove_dead_gateways(&self, now: Timestamp) -> Result<(), StoreError> {
        let dead_since = now.minus(REMOVE_AFTER).as_millis();
        let gateways = numbers_by_name(&self.list_members(KIND).await?, "name", "alive_until");
        for (gateway, until) in gateways.into_iter().filter(|(_, until)| *until < dead_since) {
            let left = self.connections_of(&gateway).await?;
            if left.is_empty() {
                self.remove_member(KIND, &gateway, until).await?;
                continue;
            }
            let deletes: Result<Vec<_>, _> = left.iter().map(|id| delete_connection(id)).collect();
            self.write_connections(deletes?).await?;
        }
        Ok(())
    }

    async fn connections_of(&self, gateway: &str) -> Result<Vec<String>, StoreError> {
        let condition = Expression::default().when("gateway", "=", text(gateway));
        let items =
            self.query_index(&self.tables.connections, "gateway", condition, MAX_REMOVED).await?;
        items.iter().map(|item| text_of(item, "id").map(str::to_owned)).collect()
    }

    pub(crate) async fn list_connections(
        &self,
        tenant: &str,
        user: Option<&str>,
        after: Option<Uid>,
        limit: usize,
        now: Timestamp,
    ) -> Result<ConnectionPage, StoreError> {
        let gateways = numbers_by_name(&self.list_members(KIND).await?, "name", "alive_until");
        let mut after = after;
        let mut connections: Vec<ConnectionRecord> = Vec::new();
        let wanted = limit.saturating_add(1);
        loop {
            let page = try_join_all(self.shards().map(|shard| {
                let mut condition = Expression::default().when(
                    "tenant_shard",
                    "=",
                    text(format!("{tenant}\t{shard}")),
                );
                if let Some(after) = after {
                    condition = condition.when("id", ">", text(after.to_string()));
                }
                self.query_index(&self.tables.connections, "tenant", condition, wanted)
            }))
            .await?;
            let mut found = Vec::new();
            for item in page.into_iter().flatten() {
                found.push(decode::<ConnectionItem>("reading a connection", item)?.into_record()?);
            }
            found.sort_by_key(|connection| connection.id);
            let is_last_page = found.len() < wanted;
            found.truncate(wanted);
            after = found.last().map(|connection| connection.id).or(after);
            connections.extend(found.into_iter().filter(|connection| {
                let is_alive = |until: &i64| *until > now.as_millis();
                gateways.get(&connection.gateway).is_some_and(is_alive)
                    && user.is_none_or(|user| connection.owner.user == user)
            }));
            if connections.len() > limit {
                connections.truncate(limit);
                let next = connections.last().map(|connection| connection.id);
                return Ok(ConnectionPage { connections, next });
            }
            if is_last_page {
                return Ok(ConnectionPage { connections, next: None });
            }
        }
    }
}

fn delete_connection(id: &str) -> Result<WriteRequest, StoreError> {
    let delete = DeleteRequest::builder().set_key(Some(key([("id", id)]))).build();
    let delete = delete.map_err(|error| corrupt("updating connections", error))?;
    Ok(WriteRequest::builder().delete_request(delete).build())
}
