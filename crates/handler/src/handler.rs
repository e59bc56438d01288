//! The trait that actions are written with.

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use streamer_core::ActionSpec;

use crate::{Context, HandlerError, context::json};

/// One action: a typed payload in, a typed result out. Use `Box<serde_json::value::RawValue>` for
/// JSON that shall pass untouched.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// The payload.
    type Input: DeserializeOwned + Send;
    /// The result.
    type Output: Serialize + Send;

    /// What it declares about itself.
    fn spec(&self) -> ActionSpec;

    /// Does the work of one attempt.
    async fn handle(
        &self,
        context: &Context,
        input: Self::Input,
    ) -> Result<Self::Output, HandlerError>;
}

/// A handler whose types are hidden: JSON bytes in, JSON bytes out.
#[async_trait]
pub trait DynHandler: Send + Sync + 'static {
    /// What it declares about itself.
    fn spec(&self) -> ActionSpec;

    /// Does the work of one attempt.
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
        // A result that cannot be written as JSON will not become writable by trying again.
        json(&output)
            .map_err(|error| HandlerError::fatal(format!("the result is not JSON: {error}")))
    }
}
