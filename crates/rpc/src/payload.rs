//! Payloads: opaque bytes within the system, and protobuf JSON at its edges if requested.

use bytes::Bytes;
use prost_types::{Struct, Value, value::Kind};
use serde_json::{Map, Number};
use streamer_proto::common::v1::{Event, Payload, PayloadEncoding, event, payload::Body};

/// Content type of payloads that do not specify one.
pub const JSON: &str = "application/json";

/// Returns the payload of requests that do not specify one.
#[must_use]
pub fn empty_object() -> Bytes {
    Bytes::from_static(b"{}")
}

/// Returns a JSON payload.
#[must_use]
pub fn json_payload(data: impl Into<Bytes>) -> Payload {
    Payload { content_type: JSON.to_owned(), body: Some(Body::Data(data.into())) }
}

/// Returns the content type and the bytes of a received payload.
#[must_use]
pub fn payload_into_parts(payload: Option<Payload>) -> (String, Bytes) {
    let Some(payload) = payload else { return (JSON.to_owned(), empty_object()) };
    let content_type =
        if payload.content_type.is_empty() { JSON.to_owned() } else { payload.content_type };
    let data = match payload.body {
        None => empty_object(),
        Some(Body::Data(data)) => data,
        Some(Body::Json(value)) => to_json(&value).to_string().into(),
    };
    (content_type, data)
}

/// Returns the bytes of a payload from a Streamer service, which always contains bytes.
#[must_use]
pub fn payload_bytes(payload: Option<&Payload>) -> Bytes {
    match payload.and_then(|payload| payload.body.as_ref()) {
        Some(Body::Data(data)) => data.clone(),
        Some(Body::Json(value)) => to_json(value).to_string().into(),
        None => empty_object(),
    }
}

/// Maximum size of a body that is converted to typed values, in bytes: larger typed values would exceed the
/// message limit.
const MAX_TYPED_BYTES: usize = 256 * 1024;
/// Maximum nesting depth of a body that is converted to typed values: protobuf libraries reject more than 100
/// nested messages, and a level of JSON requires up to three.
const MAX_TYPED_DEPTH: usize = 24;

/// Converts a payload to the requested encoding.
pub fn encode_payload(payload: &mut Payload, encoding: PayloadEncoding) {
    let is_json = payload.content_type.is_empty() || payload.content_type == JSON;
    if encoding != PayloadEncoding::JsonValue || !is_json {
        return;
    }
    if let Some(Body::Data(data)) = &payload.body
        && data.len() <= MAX_TYPED_BYTES
        && let Ok(value) = serde_json::from_slice::<serde_json::Value>(data)
        && is_shallow(&value, MAX_TYPED_DEPTH)
    {
        payload.body = Some(Body::Json(from_json(value)));
    }
}

fn is_shallow(value: &serde_json::Value, levels: usize) -> bool {
    match value {
        serde_json::Value::Array(values) => {
            levels > 0 && values.iter().all(|value| is_shallow(value, levels - 1))
        }
        serde_json::Value::Object(members) => {
            levels > 0 && members.values().all(|value| is_shallow(value, levels - 1))
        }
        _ => true,
    }
}

/// Converts the payloads of an event to the requested encoding.
pub fn encode_event(event: &mut Event, encoding: PayloadEncoding) {
    use event::Kind;
    let payload = match &mut event.kind {
        Some(Kind::Progress(progress)) => progress.metadata.as_mut(),
        Some(Kind::Output(output)) => output.data.as_mut(),
        Some(Kind::Succeeded(succeeded)) => succeeded.result.as_mut(),
        Some(Kind::Failed(failed)) => {
            failed.error.as_mut().and_then(|error| error.details.as_mut())
        }
        Some(Kind::Retrying(retrying)) => {
            retrying.error.as_mut().and_then(|error| error.details.as_mut())
        }
        Some(Kind::Accepted(_) | Kind::Started(_) | Kind::Cancelled(_)) | None => None,
    };
    if let Some(payload) = payload {
        encode_payload(payload, encoding);
    }
}

fn to_json(value: &Value) -> serde_json::Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::BoolValue(value)) => (*value).into(),
        Some(Kind::NumberValue(number)) => json_number(*number),
        Some(Kind::StringValue(text)) => text.clone().into(),
        Some(Kind::ListValue(list)) => list.values.iter().map(to_json).collect(),
        Some(Kind::StructValue(object)) => {
            let members = object.fields.iter().map(|(name, value)| (name.clone(), to_json(value)));
            serde_json::Value::Object(members.collect())
        }
    }
}

/// Converts a double to JSON; an integer that a double represents exactly has no fraction.
fn json_number(number: f64) -> serde_json::Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if number.fract() == 0.0 && number.abs() <= EXACT {
        #[expect(clippy::cast_possible_truncation, reason = "within the exact range")]
        return (number as i64).into();
    }
    Number::from_f64(number).map_or(serde_json::Value::Null, serde_json::Value::Number)
}

fn from_json(value: serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(value) => Kind::BoolValue(value),
        serde_json::Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        serde_json::Value::String(text) => Kind::StringValue(text),
        serde_json::Value::Array(values) => Kind::ListValue(prost_types::ListValue {
            values: values.into_iter().map(from_json).collect(),
        }),
        serde_json::Value::Object(members) => Kind::StructValue(to_struct(members)),
    };
    Value { kind: Some(kind) }
}

fn to_struct(members: Map<String, serde_json::Value>) -> Struct {
    Struct { fields: members.into_iter().map(|(name, value)| (name, from_json(value))).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_json_round_trips_through_bytes() {
        let json = serde_json::json!({"a": [1, 2.5, null, true], "b": {"c": "é😀"}, "n": -3});
        let payload = Payload {
            content_type: String::new(),
            body: Some(Body::Json(from_json(json.clone()))),
        };
        let (content_type, data) = payload_into_parts(Some(payload));
        assert_eq!(content_type, JSON);
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&data).unwrap(), json);
        let mut typed = json_payload(data);
        encode_payload(&mut typed, PayloadEncoding::JsonValue);
        let Some(Body::Json(value)) = typed.body else { panic!("not typed JSON") };
        assert_eq!(to_json(&value), json);
    }

    #[test]
    fn an_absent_payload_is_an_empty_object() {
        assert_eq!(payload_into_parts(None), (JSON.to_owned(), empty_object()));
        assert_eq!(payload_into_parts(Some(Payload::default())).1, empty_object());
    }

    #[test]
    fn bytes_that_are_not_json_stay_bytes() {
        let mut payload = json_payload("\u{0}not json");
        encode_payload(&mut payload, PayloadEncoding::JsonValue);
        assert!(matches!(payload.body, Some(Body::Data(_))));
    }
}
