//! Compiles user-declared JSON Schemas and validates payloads at a bounded cost.
//!
//! A schema is a program that a user writes, and a payload is its input. The processor compiles
//! each schema when it is declared, to reject invalid ones; the router compiles it again and
//! validates payloads with it. The validator is the crate `jsonschema`, which has no limits:
//! 200 bytes of schema and 50 bytes of payload can keep it busy for years or overflow its stack.
//!
//! Invariants:
//! - [`PayloadSchema::compile`] rejects schemas whose compilation, stack or memory has no bound.
//! - A payload is validated only if the maximum number of steps, computed from the schema and the
//!   shape of the payload (`cost.rs`), is within [`MAX_STEPS`].
//! - Long validations run on dedicated threads, of which a tenant uses one at a time (`pool.rs`).

mod cost;
mod error;
mod graph;
mod pattern;
mod pool;
mod unique;

use std::sync::Arc;

use bytes::Bytes;
use jsonschema::{Keyword, PatternOptions, ValidationError, Validator, paths::Location};
use serde_json::Value;
use streamer_core::validate::cut;

use crate::{
    cost::{Bound, Shape},
    graph::Graph,
    unique::UniqueItems,
};
pub use crate::{
    error::SchemaError,
    pool::{Busy, Pool},
};

/// Maximum number of steps of a validation, which take some tenths of a second.
pub const MAX_STEPS: u64 = 20_000_000;
/// Maximum number of steps to collect all violations, which takes more time per step and uses memory. If more
/// steps are required, a payload is reported as not matching, without the violations.
const MAX_STEPS_TO_EXPLAIN: u64 = 200_000;
/// Maximum number of steps of a validation that does not require a thread of the pool.
const SHORT_STEPS: u64 = 20_000;
/// Maximum depth of a payload whose validation does not require a thread of the pool: the stack of the caller
/// suffices.
const SHORT_DEPTH: usize = 8;
/// Maximum size of a payload, in bytes, that is not parsed on a thread of the pool.
const SHORT_BYTES: usize = 16 << 10;
/// Maximum number of reported violations.
const MAX_VIOLATIONS: usize = 50;
/// Maximum length of a path and of the text of a rule, in bytes.
const MAX_TEXT_BYTES: usize = 512;
/// Size of the state cache of a regular expression, in bytes.
const PATTERN_CACHE_BYTES: usize = 256 << 10;

/// Reason why a payload does not match.
#[derive(Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// JSON Pointer to the value.
    pub path: String,
    /// Violated rule, without the value.
    pub rule: String,
}

/// Schema against which payloads are validated.
pub struct PayloadSchema {
    validator: Validator,
    bound: Bound,
}

/// Payload that is parsed and measured, but not validated.
struct Measured {
    payload: Value,
    shape: Shape,
    steps: u64,
}

impl PayloadSchema {
    /// Compiles a schema from JSON text.
    ///
    /// Requires up to some tenths of a second and some megabytes of stack for the largest schemas: call
    /// it in a [`Pool`].
    ///
    /// # Errors
    ///
    /// Returns an error if the schema is invalid, uses unsupported keywords, or has no bound.
    pub fn compile(text: &str) -> Result<Self, SchemaError> {
        let schema =
            serde_json::from_str(text).map_err(|error| SchemaError::NotJson(error.to_string()))?;
        let bound = Bound::of(&Graph::read(&schema)?)?;
        let patterns = PatternOptions::regex()
            .size_limit(pattern::MAX_SIZE)
            .dfa_size_limit(PATTERN_CACHE_BYTES);
        let validator = jsonschema::options()
            .with_pattern_options(patterns)
            // Drafts since 2019-09 do not validate formats by default, and most formats have no bound.
            .should_validate_formats(false)
            .with_keyword("uniqueItems", unique_items)
            .build(&schema)
            .map_err(|error| SchemaError::NotASchema(error.to_string()))?;
        Ok(Self { validator, bound })
    }

    /// Returns the violations of a payload; empty if it matches. A long validation runs in the pool, on
    /// behalf of the tenant.
    ///
    /// # Errors
    ///
    /// Returns an error if the pool has no capacity for the tenant, or the job failed.
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

    /// Parses a payload and computes the maximum number of steps of its validation.
    fn measure(&self, payload: &[u8]) -> Result<Measured, Mismatch> {
        let mismatch = |rule| Mismatch { path: String::new(), rule };
        let payload: Value = serde_json::from_slice(payload)
            .map_err(|error| mismatch(format!("is not JSON: {error}")))?;
        let shape = Shape::of(&payload);
        let steps = self.bound.steps_to_decide(&shape);
        if steps > MAX_STEPS {
            return Err(mismatch(format!(
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
            let rule = "does not match the schema of this action, and is too large to locate the violations";
            return vec![Mismatch { path: String::new(), rule: rule.into() }];
        }
        let errors = self.validator.iter_errors(payload).take(MAX_VIOLATIONS);
        let mismatches = errors.map(|error| Mismatch {
            path: cut(error.instance_path().to_string(), MAX_TEXT_BYTES),
            rule: cut(error.masked().to_string(), MAX_TEXT_BYTES),
        });
        mismatches.collect()
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
    /// Returns whether the time and stack of the validation are small enough for any thread.
    fn is_short(&self) -> bool {
        self.steps <= SHORT_STEPS && self.shape.depth() <= SHORT_DEPTH
    }
}

#[cfg(test)]
mod tests;
