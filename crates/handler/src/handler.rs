//! The handler traits.

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use streamer_core::ActionSpec;

use crate::{Context, HandlerError, context::to_json};

/// Handler of one action, with a typed payload as input and a typed result as output. Use
/// `Box<serde_json::value::RawValue>` to pass JSON through unchanged.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Type of the payload.
    type Input: DeserializeOwned + Send;
    /// Type of the result.
    type Output: Serialize + Send;

    /// Returns the declaration of the action.
    fn spec(&self) -> ActionSpec;

    /// Runs one attempt.
    async fn handle(
        &self,
        context: &Context,
        input: Self::Input,
    ) -> Result<Self::Output, HandlerError>;
}

/// Handler with erased types, whose input and output are JSON bytes.
#[async_trait]
pub trait DynHandler: Send + Sync + 'static {
    /// Returns the declaration of the action.
    fn spec(&self) -> ActionSpec;

    /// Runs one attempt.
    async fn run(&self, context: &Context, payload: Bytes) -> Result<Bytes, HandlerError>;
}

#[async_trait]
impl<H: Handler> DynHandler for H {
    fn spec(&self) -> ActionSpec {
        Handler::spec(self)
    }

    async fn run(&self, context: &Context, payload: Bytes) -> Result<Bytes, HandlerError> {
        let input = serde_json::from_slice(&payload)
            .map_err(|error| HandlerError::invalid("payload", error.to_string()))?;
        let output = self.handle(context, input).await?;
        // Not retried, because serialization would fail again.
        to_json(&output)
            .map_err(|error| HandlerError::fatal(format!("the result is not JSON: {error}")))
    }
}
