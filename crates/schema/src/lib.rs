//! JSON Schemas that users declare, checked and run at a bounded cost.
//!
//! A schema is a program that a user writes, and a payload is its input. The processor compiles
//! each schema when it is declared, to refuse what is wrong; the router compiles it again and
//! validates payloads with it. The validator is the crate `jsonschema`. It has no limit of its own:
//! 200 bytes of schema and 50 bytes of payload can keep it busy for years, or overflow its stack.
//!
//! Invariants:
//! - [`PayloadSchema::compile`] refuses schemas whose compilation, stack or memory has no bound.
//! - A payload is validated only if the steps that this takes at most, computed from the schema
//!   and the shape of the payload ([`cost`]), are within [`MAX_STEPS`].
//! - What may take long runs on threads of its own, of which a tenant uses one ([`pool`]).

mod cost;
mod graph;
mod pattern;
mod pool;
mod unique;

use std::sync::Arc;

use bytes::Bytes;
use jsonschema::{Keyword, PatternOptions, ValidationError, Validator, paths::Location};
use serde_json::Value;
use streamer_core::validate::cut;

pub use crate::pool::{Busy, Pool};
use crate::{
    cost::{Bound, Shape},
    graph::Graph,
    unique::UniqueItems,
};

/// Steps that a validation takes at most: some tenths of a second.
pub const MAX_STEPS: u64 = 20_000_000;
/// Steps that are spent on collecting all violations at most; a step costs more than otherwise, and
/// violations take memory. Beyond it a payload is just reported as not matching.
const MAX_STEPS_TO_EXPLAIN: u64 = 200_000;
/// A validation is short below this many steps ...
const SHORT_STEPS: u64 = 20_000;
/// ... when the payload is not nested deeper than this: the stack of the caller is enough.
const SHORT_DEPTH: usize = 8;
/// Larger payloads, in bytes, are parsed on a thread of the pool too.
const SHORT_BYTES: usize = 16 << 10;
/// Violations that are reported at most.
const MAX_VIOLATIONS: usize = 50;
/// Longest path and longest text of a rule, in bytes.
const MAX_TEXT_BYTES: usize = 512;
/// Cache of a regular expression for the states that it has seen, in bytes.
const PATTERN_CACHE_BYTES: usize = 256 << 10;

/// Why a schema is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SchemaError {
    #[error("is not JSON: {0}")]
    NotJson(String),
    #[error("is not a JSON Schema: {0}")]
    NotASchema(String),
    #[error("$schema {0} is not one of the drafts 2020-12, 2019-09, 7, 6 and 4")]
    UnknownDraft(String),
    #[error("{location:?} has {keyword}, which is not supported")]
    Unsupported { location: String, keyword: String },
    #[error("{location:?} refers to {reference}, which is not '#' or '#/…' of a place in it")]
    Reference { location: String, reference: String },
    #[error("a pattern of {location:?} {rule}")]
    Pattern { location: String, rule: String },
    #[error("has more than {max} subschemas")]
    TooManySubschemas { max: usize },
    #[error(
        "has locations (JSON Pointers) of subschemas and keywords longer than {max} bytes in all: \
         shorten the names of properties, or nest them less"
    )]
    TooLongLocations { max: u64 },
    #[error("{location:?} applies itself to the same value again, without end")]
    EndlessReference { location: String },
    #[error("{location:?} starts a chain of more than {max} subschemas for the same value")]
    TooLongChain { location: String, max: usize },
    #[error("{location:?} applies too many subschemas to the same value")]
    TooManyAlternatives { location: String },
    #[error("the recursion through {location:?} passes more than {max} subschemas")]
    TooDeepRecursion { location: String, max: usize },
    #[error(
        "may take {steps} steps for one value nested {depth} deep, {max} are allowed: its \
         subschemas refer back to it along several ways"
    )]
    TooExpensive { steps: u64, depth: usize, max: u64 },
}

impl SchemaError {
    fn unsupported(location: &str, keyword: &str) -> Self {
        Self::Unsupported { location: location.to_owned(), keyword: keyword.to_owned() }
    }
}

/// Why a payload does not match.
#[derive(Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// JSON Pointer to the value.
    pub path: String,
    /// The rule that it breaks; the value itself is left out.
    pub rule: String,
}

/// A schema that payloads are validated with.
pub struct PayloadSchema {
    validator: Validator,
    bound: Bound,
}

/// A payload that is parsed and measured, not validated yet.
struct Measured {
    payload: Value,
    shape: Shape,
    steps: u64,
}

impl PayloadSchema {
    /// Compiles a schema, given as JSON text.
    ///
    /// Takes up to some tenths of a second and some megabytes of stack for the largest schemas: call
    /// it in a [`Pool`].
    ///
    /// # Errors
    ///
    /// The schema is not one, uses what is not supported, or has no bound.
    pub fn compile(text: &str) -> Result<Self, SchemaError> {
        let schema =
            serde_json::from_str(text).map_err(|error| SchemaError::NotJson(error.to_string()))?;
        let bound = Bound::of(&Graph::read(&schema)?)?;
        let patterns = PatternOptions::regex()
            .size_limit(pattern::MAX_SIZE)
            .dfa_size_limit(PATTERN_CACHE_BYTES);
        let validator = jsonschema::options()
            .with_pattern_options(patterns)
            // As drafts since 2019-09 have it: most formats have no bound of their own.
            .should_validate_formats(false)
            .with_keyword("uniqueItems", unique_items)
            .build(&schema)
            .map_err(|error| SchemaError::NotASchema(error.to_string()))?;
        Ok(Self { validator, bound })
    }

    /// Finds how a payload does not match; nothing when it does. What may take long runs in the
    /// pool, on behalf of the tenant.
    ///
    /// # Errors
    ///
    /// The tenant uses too much of the pool.
    pub async fn check(
        self: &Arc<Self>,
        payload: &Bytes,
        pool: &Pool,
        tenant: &str,
    ) -> Result<Vec<Mismatch>, Busy> {
        let (schema, payload) = (self.clone(), payload.clone());
        if payload.len() > SHORT_BYTES {
            let check = move || match schema.measure(&payload) {
                Ok(measured) => schema.validate(&measured),
                Err(mismatch) => vec![mismatch],
            };
            return pool.run(tenant, check).await;
        }
        match self.measure(&payload) {
            Ok(measured) if measured.is_short() => Ok(self.validate(&measured)),
            Ok(measured) => pool.run(tenant, move || schema.validate(&measured)).await,
            Err(mismatch) => Ok(vec![mismatch]),
        }
    }

    /// Parses a payload and computes what its validation takes at most.
    fn measure(&self, payload: &[u8]) -> Result<Measured, Mismatch> {
        let broken = |rule| Mismatch { path: String::new(), rule };
        let payload: Value = serde_json::from_slice(payload)
            .map_err(|error| broken(format!("is not JSON: {error}")))?;
        let shape = Shape::of(&payload);
        let steps = self.bound.steps_to_decide(&shape);
        if steps > MAX_STEPS {
            return Err(broken(format!(
                "is too large or nested too deep for the schema of this action: validating it may \
                 take {steps} steps, {MAX_STEPS} are allowed"
            )));
        }
        Ok(Measured { payload, shape, steps })
    }

    fn validate(&self, measured: &Measured) -> Vec<Mismatch> {
        let Measured { payload, shape, .. } = measured;
        if self.validator.is_valid(payload) {
            return Vec::new();
        }
        if self.bound.steps_to_explain(shape) > MAX_STEPS_TO_EXPLAIN {
            let rule = "does not match the schema of this action, and is too large to say where";
            return vec![Mismatch { path: String::new(), rule: rule.into() }];
        }
        let errors = self.validator.iter_errors(payload).take(MAX_VIOLATIONS);
        let mismatch = errors.map(|error| Mismatch {
            path: cut(error.instance_path().to_string(), MAX_TEXT_BYTES),
            rule: cut(error.masked().to_string(), MAX_TEXT_BYTES),
        });
        mismatch.collect()
    }
}

fn unique_items<'a>(
    _: &'a serde_json::Map<String, Value>,
    value: &'a Value,
    _: Location,
) -> Result<Box<dyn for<'i> Keyword<'i>>, ValidationError<'a>> {
    if *value == Value::Bool(false) {
        return Ok(Box::new(unique::AnyItems));
    }
    Ok(Box::new(UniqueItems::new()))
}

impl Measured {
    /// Whether the validation is so short, and needs so little stack, that it can run anywhere.
    fn is_short(&self) -> bool {
        self.steps <= SHORT_STEPS && self.shape.depth() <= SHORT_DEPTH
    }
}

#[cfg(test)]
mod tests;
