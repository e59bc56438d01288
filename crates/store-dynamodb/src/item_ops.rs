//! Item operations that several parts of the engine share, and accessors for attributes.

use std::collections::HashMap;

use aws_sdk_dynamodb::{
    error::ProvideErrorMetadata,
    operation::query::{QueryOutput, builders::QueryFluentBuilder},
    types::{AttributeValue, ReturnConsumedCapacity},
};
use streamer_core::{AttemptNumber, Uid, saturate};
use streamer_store::StoreError;

use crate::{
    client::{Backoff, Dynamo},
    error::{corrupt, is_conflict, store_error},
    expression::{Attributes, Expression},
};

/// Maximum number of items in one page of an index.
const MAX_PAGE_ITEMS: usize = 1000;

impl Dynamo {
    /// Reads an item with strong consistency.
    pub(crate) async fn get_item(
        &self,
        doing: &'static str,
        table: &str,
        key: Attributes,
    ) -> Result<Option<Attributes>, StoreError> {
        let found = self
            .client
            .get_item()
            .table_name(table)
            .set_key(Some(key))
            .consistent_read(true)
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await
            .map_err(|error| store_error(doing, &error))?;
        self.metrics.record_read(found.consumed_capacity());
        Ok(found.item)
    }

    /// Updates or creates an item. Returns whether the conditions were met.
    pub(crate) async fn update_item(
        &self,
        doing: &'static str,
        table: &str,
        key: Attributes,
        expression: &Expression,
    ) -> Result<bool, StoreError> {
        let mut backoff = Backoff::default();
        loop {
            let done = self
                .client
                .update_item()
                .table_name(table)
                .set_key(Some(key.clone()))
                .set_update_expression(expression.update())
                .set_condition_expression(expression.condition())
                .set_expression_attribute_names(expression.names())
                .set_expression_attribute_values(expression.values())
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await;
            let error = match done {
                Ok(done) => {
                    self.metrics.record_write(done.consumed_capacity());
                    return Ok(true);
                }
                Err(error) => error,
            };
            match error.code() {
                Some("ConditionalCheckFailedException") => return Ok(false),
                // The update conflicted with a transaction.
                Some(code) if is_conflict(code) => {
                    backoff.wait(store_error(doing, &error)).await?;
                }
                _ => return Err(store_error(doing, &error)),
            }
        }
    }

    /// Deletes an item if the conditions are met.
    pub(crate) async fn delete_item(
        &self,
        doing: &'static str,
        table: &str,
        key: Attributes,
        condition: &Expression,
    ) -> Result<(), StoreError> {
        let deleted = self
            .client
            .delete_item()
            .table_name(table)
            .set_key(Some(key))
            .set_condition_expression(condition.condition())
            .set_expression_attribute_names(condition.names())
            .set_expression_attribute_values(condition.values())
            .send()
            .await;
        match deleted {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some("ConditionalCheckFailedException") => Ok(()),
            Err(error) => Err(store_error(doing, &error)),
        }
    }

    /// Returns a query for the items of a table, or of one of its indexes, that meet `condition`.
    pub(crate) fn query(
        &self,
        table: &str,
        index: Option<&str>,
        condition: &Expression,
    ) -> QueryFluentBuilder {
        self.client
            .query()
            .table_name(table)
            .set_index_name(index.map(ToOwned::to_owned))
            .set_key_condition_expression(condition.condition())
            .set_expression_attribute_names(condition.names())
            .set_expression_attribute_values(condition.values())
    }

    /// Reads one page of the items of a query.
    pub(crate) async fn read_page(
        &self,
        doing: &'static str,
        query: QueryFluentBuilder,
    ) -> Result<QueryOutput, StoreError> {
        let query = query.return_consumed_capacity(ReturnConsumedCapacity::Total);
        let page = query.send().await.map_err(|error| store_error(doing, &error))?;
        self.metrics.record_read(page.consumed_capacity());
        Ok(page)
    }

    /// Reads the first items of an index that meet `condition`, at most `limit`.
    pub(crate) async fn query_index(
        &self,
        table: &str,
        index: &str,
        condition: Expression,
        limit: usize,
    ) -> Result<Vec<Attributes>, StoreError> {
        let mut items = Vec::new();
        let mut start = None;
        loop {
            let left = (limit - items.len()).min(MAX_PAGE_ITEMS);
            let query = self
                .query(table, Some(index), &condition)
                .limit(saturate::to_i32(left))
                .set_exclusive_start_key(start);
            let page = self.read_page("reading an index", query).await?;
            items.extend(page.items.unwrap_or_default());
            start = page.last_evaluated_key;
            if items.len() >= limit || start.is_none() {
                return Ok(items);
            }
        }
    }
}

pub(crate) fn text_of<'a>(item: &'a Attributes, name: &str) -> Result<&'a str, StoreError> {
    match item.get(name) {
        Some(AttributeValue::S(value)) => Ok(value),
        _ => Err(corrupt("reading an item", format!("attribute {name} is not a string"))),
    }
}

pub(crate) fn number_of(item: &Attributes, name: &str) -> Result<i64, StoreError> {
    let number = match item.get(name) {
        Some(AttributeValue::N(value)) => value.parse().ok(),
        _ => None,
    };
    number.ok_or_else(|| corrupt("reading an item", format!("attribute {name} is not a number")))
}

pub(crate) fn attempt_of(item: &Attributes, name: &str) -> Result<AttemptNumber, StoreError> {
    AttemptNumber::from_i64(number_of(item, name)?)
        .map_err(|rule| corrupt("reading an item", format!("attribute {name} {rule}")))
}

pub(crate) fn uid_of(item: &Attributes) -> Result<Uid, StoreError> {
    text_of(item, "uid")?.parse().map_err(|error| corrupt("reading an item", error))
}

/// Returns a map from the text attribute `name` to the number attribute `value`, for the items that have both.
pub(crate) fn numbers_by_name(
    items: &[Attributes],
    name: &str,
    value: &str,
) -> HashMap<String, i64> {
    items
        .iter()
        .filter_map(|item| {
            Some((text_of(item, name).ok()?.to_owned(), number_of(item, value).ok()?))
        })
        .collect()
}
