//! Schemas of payloads, compiled when they are needed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use quick_cache::{
    DefaultHashBuilder, OptionsBuilder, Weighter, sync::Cache, sync::DefaultLifecycle,
};
use streamer_core::{RequestError, Violations};
use streamer_proto::common::v1::Action;
use streamer_rpc::status;
use streamer_schema::{Busy, PayloadSchema, Pool};
use tokio::time::timeout;
use tonic::Status;

use crate::refusal::failed_precondition;

/// Text of the schemas that are kept compiled, in bytes; the others are compiled again when they are needed.
/// Compiled, they take many times as much.
const MAX_BYTES: u64 = 4 * 1024 * 1024;
/// What a compiled schema counts at least.
const MIN_SCHEMA_BYTES: usize = 1024;
/// Longest wait for a schema to be compiled.
const MAX_COMPILE: Duration = Duration::from_secs(15);

/// A schema of an action that is known. Most are never needed here.
pub(crate) struct DeclaredSchema {
    /// Tenant for which it is declared; empty for every tenant.
    tenant: String,
    /// Names it among all of this router.
    number: u64,
    /// It was logged that it cannot be used.
    is_reported: AtomicBool,
}

struct CompiledSchema {
    /// The schema, or why it is refused, as one may be that an earlier version stored.
    outcome: Result<Arc<PayloadSchema>, String>,
    text_bytes: usize,
}

#[derive(Clone, Copy)]
struct TextBytes;

impl Weighter<u64, Arc<CompiledSchema>> for TextBytes {
    fn weight(&self, _: &u64, schema: &Arc<CompiledSchema>) -> u64 {
        schema.text_bytes.max(MIN_SCHEMA_BYTES) as u64
    }
}

/// Validates payloads; keeps the schemas that were needed lately.
pub(crate) struct CompiledSchemas {
    pool: Pool,
    compiled: Cache<u64, Arc<CompiledSchema>, TextBytes>,
    next_number: AtomicU64,
}

impl Default for CompiledSchemas {
    fn default() -> Self {
        Self::new(MAX_BYTES)
    }
}

impl CompiledSchemas {
    fn new(max_bytes: u64) -> Self {
        let items = usize::try_from(max_bytes).unwrap_or(usize::MAX) / MIN_SCHEMA_BYTES;
        // In one shard, half of it for schemas that are new, so that a large one finds room.
        let options = OptionsBuilder::new()
            .shards(1)
            .hot_allocation(0.5)
            .estimated_items_capacity(items)
            .weight_capacity(max_bytes)
            .build();
        let compiled = match options {
            Ok(options) => Cache::with_options(
                options,
                TextBytes,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
            // Both capacities are given.
            Err(_) => Cache::with_weighter(items, max_bytes, TextBytes),
        };
        Self { pool: Pool::default(), compiled, next_number: AtomicU64::new(0) }
    }

    /// A schema that was declared for this tenant.
    pub(crate) fn declare(&self, tenant: &str) -> DeclaredSchema {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        DeclaredSchema { tenant: tenant.to_owned(), number, is_reported: AtomicBool::new(false) }
    }

    /// Checks a JSON payload of `tenant` against the schema of an action; notes how it does not match.
    pub(crate) async fn check(
        &self,
        schema: &DeclaredSchema,
        action: &Action,
        tenant: &str,
        payload: &Bytes,
        violations: &mut Violations,
    ) -> Result<(), Status> {
        let busy = |busy: Busy| status(&RequestError::from(&busy));
        let compiled = self.get(schema, action).await.map_err(busy)?;
        let schema = match &compiled.outcome {
            Ok(schema) => schema,
            Err(rule) => {
                let name = &action.name;
                return Err(failed_precondition(format!(
                    "the payload schema of action {name:?} cannot be used, declare a new one: {rule}"
                )));
            }
        };
        for mismatch in schema.check(payload, &self.pool, tenant).await.map_err(busy)? {
            violations.push(format!("payload{}", mismatch.path.replace('/', ".")), mismatch.rule);
        }
        Ok(())
    }

    async fn get(
        &self,
        schema: &DeclaredSchema,
        action: &Action,
    ) -> Result<Arc<CompiledSchema>, Busy> {
        let compile = async {
            let text = action.payload_schema.clone();
            let text_bytes = text.len();
            // On behalf of who declared it: other callers wait for the outcome too.
            let compiled = self.pool.run(&schema.tenant, move || PayloadSchema::compile(&text));
            let outcome = compiled.await?.map(Arc::new).map_err(|error| {
                if !schema.is_reported.swap(true, Ordering::Relaxed) {
                    let action = &action.name;
                    tracing::error!(action, %error, "a payload schema cannot be used");
                }
                error.to_string()
            });
            Ok(Arc::new(CompiledSchema { outcome, text_bytes }))
        };
        let compiled = self.compiled.get_or_insert_async(&schema.number, compile);
        timeout(MAX_COMPILE, compiled).await.unwrap_or(Err(Busy::All))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn schemas_that_were_not_needed_lately_are_compiled_again() {
        let schemas = CompiledSchemas::new(40 * 1024);
        let action = Action {
            name: "work".into(),
            payload_schema: r#"{"type":"object"}"#.into(),
            ..Action::default()
        };
        let declared: Vec<_> = (0..100).map(|_| schemas.declare("acme")).collect();
        for schema in &declared {
            let mut violations = Violations::default();
            let payload = Bytes::from_static(b"1");
            schemas.check(schema, &action, "acme", &payload, &mut violations).await.unwrap();
            assert!(violations.to_string().contains("is not of type"), "{violations}");
        }
        assert!(schemas.compiled.len() <= 40, "{}", schemas.compiled.len());
        let large = Action {
            payload_schema: format!("{}{}", " ".repeat(15_000), action.payload_schema),
            ..action
        };
        let schema = schemas.declare("acme");
        schemas.get(&schema, &large).await.unwrap();
        assert!(schemas.compiled.get(&schema.number).is_some());
    }
}
