//! `echo`: returns its payload. The smallest possible handler.

use serde::Serialize;
use serde_json::value::RawValue;
use streamer_handler::{ActionSpec, Context, Handler, HandlerError, async_trait};

/// Returns the payload unchanged.
#[derive(Clone, Copy, Debug, Default)]
pub struct Echo;

/// Result of [`Echo`].
#[derive(Debug, Serialize)]
pub struct EchoResult {
    /// Payload as received: parsing and serializing the payload could change numbers, the order of keys
    /// or white space.
    pub echo: Box<RawValue>,
}

#[async_trait]
impl Handler for Echo {
    type Input = Box<RawValue>;
    type Output = EchoResult;

    fn spec(&self) -> ActionSpec {
        ActionSpec::sync("echo").describe("Returns the payload unchanged")
    }

    async fn handle(
        &self,
        _context: &Context,
        payload: Box<RawValue>,
    ) -> Result<EchoResult, HandlerError> {
        Ok(EchoResult { echo: payload })
    }
}

#[cfg(test)]
mod tests {
    use streamer_handler::DynHandler;

    use super::*;

    #[tokio::test]
    async fn the_payload_is_returned_byte_for_byte() {
        for payload in [
            "9223372036854775807",
            "-0.10e+05",
            "null",
            r#"{ "b":1,  "a" : [1.0, 1e2, "\u00e9é"], "b":2 }"#,
            "123456789012345678901234567890.123456789",
        ] {
            let (context, _) = Context::for_test("echo");
            let result = Echo.run(&context, payload.into()).await.unwrap();
            let expected = format!(r#"{{"echo":{payload}}}"#);
            assert_eq!(String::from_utf8(result.to_vec()).unwrap(), expected);
        }
    }
}
