//! `health`: says that the way from the caller to a handler and back is open.

use serde::Serialize;
use serde_json::value::RawValue;
use streamer_handler::{ActionSpec, Context, Handler, HandlerError, async_trait};

/// Answers that it is well, and who it takes the caller for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health;

/// The answer of [`Health`].
#[derive(Debug, Serialize)]
pub struct HealthAnswer {
    /// Always `ok`: a server that is not does not answer.
    pub status: &'static str,
    /// `health`
    pub action: &'static str,
    /// Version of the handlers.
    pub version: &'static str,
    /// Who asks, according to the token.
    pub user: String,
    /// The tenant that asks, according to the token.
    pub tenant: String,
}

#[async_trait]
impl Handler for Health {
    /// Any JSON; it is not looked at.
    type Input = Box<RawValue>;
    type Output = HealthAnswer;

    fn spec(&self) -> ActionSpec {
        ActionSpec::sync("health").describe("Answers that the server is well, and who is asking")
    }

    async fn handle(
        &self,
        context: &Context,
        _payload: Box<RawValue>,
    ) -> Result<HealthAnswer, HandlerError> {
        Ok(HealthAnswer {
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
    async fn says_who_asks_whatever_the_payload() {
        for payload in ["{}", "null", "[1,2]"] {
            let (context, _) = Context::for_test("health");
            let answer = Health.run(&context, payload.into()).await.unwrap();
            let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
            let expected = serde_json::json!({
                "status": "ok",
                "action": "health",
                "version": env!("CARGO_PKG_VERSION"),
                "user": "test",
                "tenant": "test",
            });
            assert_eq!(answer, expected);
        }
    }
}
