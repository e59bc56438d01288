//! Payload schemas, compiled on first use.

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
use streamer_core::{RequestError, Violations, saturate, validate};
use streamer_proto::common::v1::Action;
use streamer_rpc::status;
use streamer_schema::{Busy, PayloadSchema, Pool};
use tokio::time::timeout;
use tonic::Status;

use crate::error::failed_precondition;

/// Maximum total text size of the cached compiled schemas, in bytes. Evicted schemas are compiled again on use. A
/// compiled schema is many times larger than its text.
const MAX_BYTES: u64 = 4 * 1024 * 1024;
/// Minimum size that is counted for a compiled schema, in bytes.
const MIN_SCHEMA_BYTES: usize = 1024;
/// Maximum time to wait for the compilation of a schema.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(15);

/// Declared schema of a catalog entry. This router never compiles most declared schemas.
pub(crate) struct DeclaredSchema {
    /// Tenant for which the schema is declared; empty for all tenants.
    tenant: String,
    /// Identifier of the schema within this router.
    id: u64,
    /// Whether the compilation error of the schema has been logged.
    is_error_logged: AtomicBool,
}

struct CompiledSchema {
    /// The schema, or the reason for its rejection: an earlier version may have stored a schema that this version
    /// rejects.
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

/// Validates payloads and caches recently used schemas.
pub(crate) struct CompiledSchemas {
    pool: Pool,
    compiled: Cache<u64, Arc<CompiledSchema>, TextBytes>,
    next_id: AtomicU64,
}

impl Default for CompiledSchemas {
    fn default() -> Self {
        Self::new(MAX_BYTES)
    }
}

impl CompiledSchemas {
    fn new(max_bytes: u64) -> Self {
        let items = saturate::to_usize(max_bytes) / MIN_SCHEMA_BYTES;
        // A single shard, half of whose capacity is for new schemas, so that a large schema fits.
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
            // Unreachable: both capacities are set.
            Err(_) => Cache::with_weighter(items, max_bytes, TextBytes),
        };
        Self { pool: Pool::default(), compiled, next_id: AtomicU64::new(0) }
    }

    /// Returns a new schema that is declared for the given tenant.
    pub(crate) fn declare(&self, tenant: &str) -> DeclaredSchema {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        DeclaredSchema { tenant: tenant.to_owned(), id, is_error_logged: AtomicBool::new(false) }
    }

    /// Validates a JSON payload of `tenant` against the schema of an action and records the violations.
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
                    "the payload schema of action {name:?} is invalid, declare a new one: {rule}"
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
            // Runs on behalf of the declaring tenant, because callers of other tenants wait for the same compilation.
            let compiled = self.pool.run(&schema.tenant, move || PayloadSchema::compile(&text));
            let outcome = compiled.await?.map(Arc::new).map_err(|error| {
                if !schema.is_error_logged.swap(true, Ordering::Relaxed) {
                    let (action, error) = (&action.name, error.to_string());
                    // The error contains text of the schema.
                    let error = validate::logged_text(&error);
                    tracing::error!(action, error, "a payload schema is invalid");
                }
                error.to_string()
            });
            Ok(Arc::new(CompiledSchema { outcome, text_bytes }))
        };
        let compiled = self.compiled.get_or_insert_async(&schema.id, compile);
        timeout(COMPILE_TIMEOUT, compiled).await.unwrap_or(Err(Busy::All))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn evicted_schemas_are_compiled_again() {
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
        assert!(schemas.compiled.get(&schema.id).is_some());
    }
}
