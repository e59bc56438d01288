//! Stores declarations of actions, which apply while no processor or worker offers the actions.

use aws_sdk_dynamodb::{
    primitives::Blob,
    types::{AttributeValue, ReturnConsumedCapacity},
};
use prost::Message;
use streamer_core::Timestamp;
use streamer_proto::common::v1::Action;
use streamer_store::{DeclaredAction, StoreError};

use crate::{
    client::Dynamo,
    error::{corrupt, store_error},
    expression::{key, number, text},
    item_ops::{number_of, text_of},
};

const KIND: &str = "action";

impl Dynamo {
    pub(crate) async fn save_actions(
        &self,
        actions: &[DeclaredAction],
        now: Timestamp,
    ) -> Result<(), StoreError> {
        for DeclaredAction { tenant, action } in actions {
            let tenant = tenant.as_deref().unwrap_or_default();
            let name = serde_json::json!([tenant, action.name]).to_string();
            let mut item = key([("kind", KIND), ("name", name.as_str())]);
            item.insert("tenant".into(), text(tenant));
            item.insert("declare_time".into(), number(now.as_millis()));
            item.insert("declaration".into(), AttributeValue::B(Blob::new(action.encode_to_vec())));
            let put = self
                .client
                .put_item()
                .table_name(&self.tables.fleet)
                .set_item(Some(item))
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map_err(|error| store_error("saving actions", &error))?;
            self.metrics.record_write(put.consumed_capacity());
        }
        Ok(())
    }

    pub(crate) async fn list_actions(
        &self,
        since: Timestamp,
    ) -> Result<Vec<DeclaredAction>, StoreError> {
        let doing = "reading actions";
        let mut actions = Vec::new();
        for item in self.list_members(KIND).await? {
            if number_of(&item, "declare_time")? < since.as_millis() {
                continue;
            }
            let Some(AttributeValue::B(declaration)) = item.get("declaration") else {
                return Err(corrupt(doing, "a declaration is missing"));
            };
            let action =
                Action::decode(declaration.as_ref()).map_err(|error| corrupt(doing, error))?;
            let tenant = text_of(&item, "tenant")?;
            let tenant = Some(tenant.to_owned()).filter(|tenant| !tenant.is_empty());
            actions.push(DeclaredAction { tenant, action });
        }
        Ok(actions)
    }
}
