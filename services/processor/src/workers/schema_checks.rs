//! Validation of the payload schemas that workers declare.

use quick_cache::sync::Cache;
use sha2::{Digest, Sha256};
use streamer_core::{ErrorCode, RequestError};
use streamer_proto::common::v1::Action;
use streamer_rpc::{error_status, status, violation_status};
use streamer_schema::{PayloadSchema, Pool};
use tonic::Status;

use crate::actions::MAX_DECLARATION_BYTES;

/// Maximum number of accepted schemas in the cache.
const MAX_CACHED_SCHEMAS: usize = 10_000;

pub(crate) struct SchemaChecks {
    pool: Pool,
    /// SHA-256 hashes of accepted schemas, which workers declare again when they reconnect.
    accepted: Cache<[u8; 32], ()>,
}

impl Default for SchemaChecks {
    fn default() -> Self {
        Self { pool: Pool::default(), accepted: Cache::new(MAX_CACHED_SCHEMAS) }
    }
}

impl SchemaChecks {
    /// Validates the schemas of `actions` in order; returns the first violation. The other fields of the declarations
    /// were validated before.
    pub(crate) async fn check(&self, tenant: &str, actions: &[Action]) -> Result<(), Status> {
        let bytes = actions.iter().map(|action| action.payload_schema.len()).sum::<usize>();
        if bytes > MAX_DECLARATION_BYTES {
            let rule =
                format!("must have at most {MAX_DECLARATION_BYTES} bytes of schemas, have {bytes}");
            return Err(error_status(ErrorCode::RateLimited, format!("hello.actions: {rule}")));
        }
        for (index, action) in actions.iter().enumerate() {
            let text = &action.payload_schema;
            let hash = <[u8; 32]>::from(Sha256::digest(text));
            if text.is_empty() || self.accepted.get(&hash).is_some() {
                continue;
            }
            let text = text.clone();
            let compile = move || PayloadSchema::compile(&text).map(drop);
            let outcome = self.pool.run(tenant, compile).await;
            let outcome = outcome.map_err(|busy| status(&RequestError::from(&busy)))?;
            if let Err(error) = outcome {
                let field = format!("hello.actions[{index}].payload_schema");
                return Err(violation_status(&field, &error.to_string()));
            }
            self.accepted.insert(hash, ());
        }
        Ok(())
    }
}
