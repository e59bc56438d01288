//! Checks the payload schemas that workers declare.

use quick_cache::sync::Cache;
use sha2::{Digest, Sha256};
use streamer_core::{ErrorCode, RequestError};
use streamer_proto::common::v1::Action;
use streamer_rpc::{MAX_SCHEMA_BYTES, status};
use streamer_schema::{Busy, PayloadSchema, Pool, SchemaError};
use tonic::Status;

use crate::hello::MAX_ACTIONS;

/// Schemas that were accepted and need no second check, at most.
const MAX_ACCEPTED: usize = 10_000;

pub(crate) struct SchemaChecks {
    pool: Pool,
    /// SHA-256 of schemas that were accepted: workers that reconnect repeat theirs.
    accepted: Cache<[u8; 32], ()>,
}

impl Default for SchemaChecks {
    fn default() -> Self {
        Self { pool: Pool::default(), accepted: Cache::new(MAX_ACCEPTED) }
    }
}

impl SchemaChecks {
    /// Says for each action which rule its schema breaks. Those that are too long are left to the
    /// rule for their length.
    pub(crate) async fn check(
        &self,
        tenant: &str,
        actions: &[Action],
    ) -> Result<Vec<Result<(), String>>, Status> {
        let hash = |text: &str| <[u8; 32]>::from(Sha256::digest(text));
        let mut texts = Vec::new();
        for (index, action) in actions.iter().take(MAX_ACTIONS).enumerate() {
            let text = &action.payload_schema;
            let is_new = || self.accepted.get(&hash(text)).is_none();
            if !text.is_empty() && text.len() <= MAX_SCHEMA_BYTES && is_new() {
                texts.push((index, text.clone()));
            }
        }
        let mut outcomes = vec![Ok(()); actions.len().min(MAX_ACTIONS)];
        if texts.is_empty() {
            return Ok(outcomes);
        }
        let compile = move || {
            let compiled = texts.into_iter().map(|(index, text)| {
                let outcome = PayloadSchema::compile(&text).map(|_| hash(&text));
                (index, outcome)
            });
            compiled.collect::<Vec<(usize, Result<_, SchemaError>)>>()
        };
        let compiled = self.pool.run(tenant, compile).await.map_err(|busy| busy_status(&busy))?;
        for (index, outcome) in compiled {
            match outcome {
                Ok(hash) => self.accepted.insert(hash, ()),
                Err(error) => outcomes[index] = Err(error.to_string()),
            }
        }
        Ok(outcomes)
    }
}

fn busy_status(busy: &Busy) -> Status {
    let code = match busy {
        Busy::Tenant => ErrorCode::RateLimited,
        Busy::Broken => ErrorCode::InternalError,
    };
    status(&RequestError::new(code, busy.to_string()))
}
