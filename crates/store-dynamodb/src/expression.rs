//! Update and condition expressions. All attributes are referenced through placeholders, because many attribute names
//! are reserved words.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::AttributeValue;
use streamer_core::{AttemptNumber, Seq};

pub(crate) type Attributes = HashMap<String, AttributeValue>;

pub(crate) fn text(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

pub(crate) fn number(value: impl Into<i64>) -> AttributeValue {
    AttributeValue::N(value.into().to_string())
}

pub(crate) fn seq(value: Seq) -> AttributeValue {
    number(value.as_i64())
}

pub(crate) fn attempt_number(value: AttemptNumber) -> AttributeValue {
    number(value.as_u32())
}

/// Expressions of one call, with their placeholders.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expression {
    set: Vec<String>,
    remove: Vec<String>,
    conditions: Vec<String>,
    names: HashMap<String, String>,
    values: Attributes,
}

impl Expression {
    fn name(&mut self, attribute: &str) -> String {
        let name = format!("#{attribute}");
        self.names.entry(name.clone()).or_insert_with(|| attribute.to_owned());
        name
    }

    fn value(&mut self, value: AttributeValue) -> String {
        let name = format!(":{}", self.values.len());
        self.values.insert(name.clone(), value);
        name
    }

    pub(crate) fn set(mut self, attribute: &str, value: AttributeValue) -> Self {
        let (name, value) = (self.name(attribute), self.value(value));
        self.set.push(format!("{name} = {value}"));
        self
    }

    /// Sets the attribute, or removes it if the value is `None`.
    pub(crate) fn set_or_remove(self, attribute: &str, value: Option<AttributeValue>) -> Self {
        match value {
            Some(value) => self.set(attribute, value),
            None => self.remove(&[attribute]),
        }
    }

    /// Appends `list` to an existing list.
    pub(crate) fn extend(mut self, attribute: &str, list: AttributeValue) -> Self {
        let (name, value) = (self.name(attribute), self.value(list));
        self.set.push(format!("{name} = list_append({name}, {value})"));
        self
    }

    /// Adds `amount` to a number, which counts as 0 if the attribute does not exist.
    pub(crate) fn add(mut self, attribute: &str, amount: i64) -> Self {
        let (name, amount) = (self.name(attribute), self.value(number(amount)));
        let zero = self.value(number(0));
        self.set.push(format!("{name} = if_not_exists({name}, {zero}) + {amount}"));
        self
    }

    pub(crate) fn remove(mut self, attributes: &[&str]) -> Self {
        for attribute in attributes {
            let name = self.name(attribute);
            self.remove.push(name);
        }
        self
    }

    pub(crate) fn when(mut self, attribute: &str, operator: &str, value: AttributeValue) -> Self {
        let (name, value) = (self.name(attribute), self.value(value));
        self.conditions.push(format!("{name} {operator} {value}"));
        self
    }

    pub(crate) fn when_begins(mut self, attribute: &str, prefix: &str) -> Self {
        let (name, value) = (self.name(attribute), self.value(text(prefix)));
        self.conditions.push(format!("begins_with({name}, {value})"));
        self
    }

    /// Adds a condition that is also true if the attribute does not exist.
    pub(crate) fn when_or_missing(
        mut self,
        attribute: &str,
        operator: &str,
        value: AttributeValue,
    ) -> Self {
        let (name, value) = (self.name(attribute), self.value(value));
        self.conditions
            .push(format!("(attribute_not_exists({name}) OR {name} {operator} {value})"));
        self
    }

    pub(crate) fn when_missing(mut self, attribute: &str) -> Self {
        let name = self.name(attribute);
        self.conditions.push(format!("attribute_not_exists({name})"));
        self
    }

    pub(crate) fn when_exists(mut self, attribute: &str) -> Self {
        let name = self.name(attribute);
        self.conditions.push(format!("attribute_exists({name})"));
        self
    }

    /// Adds a condition that is true if the attribute still has the value `seen` or, if `seen` is `None`, still does
    /// not exist.
    pub(crate) fn when_unchanged(self, attribute: &str, seen: Option<AttributeValue>) -> Self {
        match seen {
            Some(seen) => self.when(attribute, "=", seen),
            None => self.when_missing(attribute),
        }
    }

    pub(crate) fn update(&self) -> Option<String> {
        let mut clauses = Vec::new();
        if !self.set.is_empty() {
            clauses.push(format!("SET {}", self.set.join(", ")));
        }
        if !self.remove.is_empty() {
            clauses.push(format!("REMOVE {}", self.remove.join(", ")));
        }
        (!clauses.is_empty()).then(|| clauses.join(" "))
    }

    pub(crate) fn condition(&self) -> Option<String> {
        (!self.conditions.is_empty()).then(|| self.conditions.join(" AND "))
    }

    pub(crate) fn names(&self) -> Option<HashMap<String, String>> {
        (!self.names.is_empty()).then(|| self.names.clone())
    }

    pub(crate) fn values(&self) -> Option<Attributes> {
        (!self.values.is_empty()).then(|| self.values.clone())
    }
}

/// Conditions on attributes that are not part of the key. They share the placeholders of the key condition.
#[derive(Default)]
pub(crate) struct Filter(Vec<String>);

impl Filter {
    /// Adds a condition to the filter, and its placeholders to `expression`.
    pub(crate) fn add(
        &mut self,
        mut expression: Expression,
        attribute: &str,
        value: AttributeValue,
    ) -> Expression {
        let (name, value) = (expression.name(attribute), expression.value(value));
        self.0.push(format!("{name} = {value}"));
        expression
    }

    pub(crate) fn expression(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.join(" AND "))
    }
}

/// Returns a key of one or two text attributes.
pub(crate) fn key<const N: usize>(attributes: [(&str, &str); N]) -> Attributes {
    attributes.into_iter().map(|(name, value)| (name.to_owned(), text(value))).collect()
}
