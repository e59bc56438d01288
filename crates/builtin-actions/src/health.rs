//! `health`: checks the path from the caller to a handler and back.

use serde::Serialize;
use serde_json::value::RawValue;
use streamer_handler::{ActionSpec, Context, Handler, HandlerError, async_trait};

/// Returns `ok`, and the identity of the caller.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health;

/// Result of [`Health`].
#[derive(Debug, Serialize)]
pub struct HealthResult {
    /// Always `ok`: an unhealthy server does not respond.
    pub status: &'static str,
    /// Name of the action: `health`.
    pub action: &'static str,
    /// Version of the handler crate.
    pub version: &'static str,
    /// User of the caller, according to its token.
    pub user: String,
    /// Tenant of the caller, according to its token.
    pub tenant: String,
}

#[async_trait]
impl Handler for Health {
    /// Any JSON, which is ignored.
    type Input = Box<RawValue>;
    type Output = HealthResult;

    fn spec(&self) -> ActionSpec {
        ActionSpec::sync("health").describe("Returns ok, and the identity of the caller")
    }

    async fn handle(
        &self,
        context: &Context,
        _payload: Box<RawValue>,
    ) -> Result<HealthResult, HandlerError> {
        Ok(HealthResult {
            status: "ok",
            action: "health",
            version: env!("CARGO_PKG_VERSION"),
            user: context.user().to_owned(),
            tenant: context.tenant().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use streamer_handler::DynHandler;

    use super::*;

    #[tokio::test]
    async fn the_caller_is_identified_for_any_payload() {
        for payload in ["{}", "null", "[1,2]"] {
            let (context, _) = Context::for_test("health");
            let result = Health.run(&context, payload.into()).await.unwrap();
            let result: serde_json::Value = serde_json::from_slice(&result).unwrap();
            let expected = serde_json::json!({
                "status": "ok",
                "action": "health",
                "version": env!("CARGO_PKG_VERSION"),
                "user": "test",
                "tenant": "test",
            });
            assert_eq!(result, expected);
        }
    }
}
