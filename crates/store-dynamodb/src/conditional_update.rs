//! Conditional updates of the item of a request.

use aws_sdk_dynamodb::{
    error::ProvideErrorMetadata,
    operation::update_item::UpdateItemError,
    types::{ReturnConsumedCapacity, ReturnValue, ReturnValuesOnConditionCheckFailure},
};
use streamer_store::StoreError;

use crate::{
    client::{Backoff, Dynamo},
    error::{is_conflict, store_error},
    expression::{Expression, key},
    item::{RequestItem, decode},
};

/// Outcome of an update.
pub(crate) enum ConditionalUpdate {
    /// The update is stored. Contains the new item.
    Applied(RequestItem),
    /// A condition was not met. Contains the current item, if it exists.
    ConditionFailed(Option<RequestItem>),
}

impl Dynamo {
    /// Updates the item of a request. Returns the existing item if a condition was not met.
    pub(crate) async fn update_request(
        &self,
        doing: &'static str,
        uid: &str,
        expression: Expression,
    ) -> Result<ConditionalUpdate, StoreError> {
        let mut backoff = Backoff::default();
        loop {
            let update = self
                .client
                .update_item()
                .table_name(&self.tables.requests)
                .set_key(Some(key([("uid", uid)])))
                .set_update_expression(expression.update())
                .set_condition_expression(expression.condition())
                .set_expression_attribute_names(expression.names())
                .set_expression_attribute_values(expression.values())
                .return_values(ReturnValue::AllNew)
                .return_values_on_condition_check_failure(
                    ReturnValuesOnConditionCheckFailure::AllOld,
                )
                .return_consumed_capacity(ReturnConsumedCapacity::Total);
            let error = match update.send().await {
                Ok(mut done) => {
                    self.metrics.record_write(done.consumed_capacity());
                    let item = done.attributes.take().unwrap_or_default();
                    return Ok(ConditionalUpdate::Applied(decode(doing, item)?));
                }
                Err(error) => error,
            };
            match error.as_service_error() {
                Some(UpdateItemError::ConditionalCheckFailedException(failed)) => {
                    // Not every implementation returns the existing item.
                    let found = match failed.item.clone() {
                        Some(item) => Some(decode(doing, item)?),
                        None => self.get(uid).await?,
                    };
                    return Ok(ConditionalUpdate::ConditionFailed(found));
                }
                // The update conflicted with a transaction; the conditions make a retry safe.
                _ if error.code().is_some_and(is_conflict) => {
                    backoff.wait(store_error(doing, &error)).await?;
                }
                _ => return Err(store_error(doing, &error)),
            }
        }
    }
}
