//! Messages from client to server in subprotocol `streamer.v1.json`.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use streamer_core::{RequestState, Seq, Violations, limits, validate};
use streamer_telemetry::TraceContext;
use strum::{EnumCount, IntoStaticStr};

/// A client message. Unknown fields are ignored.
#[derive(Debug)]
pub(crate) enum ClientMessage<'a> {
    /// Submits a request.
    Request(RequestMessage<'a>),
    /// Subscribes to the events of a request.
    Subscribe { request_id: Cow<'a, str>, after_seq: Option<Seq>, latest: bool },
    /// Ends a subscription.
    Unsubscribe { request_id: Cow<'a, str> },
    /// Cancels a request.
    Cancel { request_id: Cow<'a, str>, reason: Cow<'a, str> },
    /// Gets a request.
    Get { request_id: Cow<'a, str> },
    /// Lists a page of requests.
    List { states: Vec<RequestState>, limit: i32, page_token: Cow<'a, str> },
    /// Replaces the token of the connection.
    Auth { token: Cow<'a, str> },
    /// Requests a `pong`.
    Ping,
}

/// `type` of a message.
#[derive(Clone, Copy, Debug, EnumCount, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum MessageType {
    Request,
    Subscribe,
    Unsubscribe,
    Cancel,
    Get,
    List,
    Auth,
    Ping,
}

impl ClientMessage<'_> {
    /// Returns the `type` of the message.
    pub(crate) fn kind(&self) -> MessageType {
        match self {
            Self::Request(_) => MessageType::Request,
            Self::Subscribe { .. } => MessageType::Subscribe,
            Self::Unsubscribe { .. } => MessageType::Unsubscribe,
            Self::Cancel { .. } => MessageType::Cancel,
            Self::Get { .. } => MessageType::Get,
            Self::List { .. } => MessageType::List,
            Self::Auth { .. } => MessageType::Auth,
            Self::Ping => MessageType::Ping,
        }
    }

    /// Returns whether the reply contains payloads or many requests.
    pub(crate) fn has_large_reply(&self) -> bool {
        matches!(self, Self::Get { .. } | Self::List { .. })
    }
}

/// Submission of a request.
#[derive(Debug)]
pub(crate) struct RequestMessage<'a> {
    pub(crate) id: Cow<'a, str>,
    pub(crate) action: Cow<'a, str>,
    pub(crate) payload: Option<&'a RawValue>,
    pub(crate) metadata: Option<&'a RawValue>,
    pub(crate) wait_ms: i64,
    pub(crate) priority: i32,
    pub(crate) delay_ms: i64,
    pub(crate) latest: bool,
    /// Trace context from the fields `traceparent` and `tracestate` (W3C), for clients that cannot set headers.
    pub(crate) trace: Option<TraceContext>,
}

/// A rejected message.
#[derive(Debug)]
pub(crate) struct InvalidMessage {
    /// `request_id` of the message, if it could be read.
    pub(crate) request_id: Option<String>,
    /// All violated rules.
    pub(crate) violations: Violations,
}

/// Fields of all message types; the type of a message determines which of them are used. Values remain raw
/// JSON, so that a violation can name the field that has the wrong JSON type.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    request_id: Option<&'a RawValue>,
    #[serde(borrow)]
    action: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    payload: Option<&'a RawValue>,
    #[serde(borrow)]
    metadata: Option<&'a RawValue>,
    #[serde(borrow)]
    wait_ms: Option<&'a RawValue>,
    #[serde(borrow)]
    priority: Option<&'a RawValue>,
    #[serde(borrow)]
    delay_ms: Option<&'a RawValue>,
    #[serde(borrow)]
    after_seq: Option<&'a RawValue>,
    #[serde(borrow)]
    mode: Option<&'a RawValue>,
    #[serde(borrow)]
    reason: Option<&'a RawValue>,
    #[serde(borrow)]
    states: Option<&'a RawValue>,
    #[serde(borrow)]
    limit: Option<&'a RawValue>,
    #[serde(borrow)]
    page_token: Option<&'a RawValue>,
    #[serde(borrow)]
    token: Option<&'a RawValue>,
    #[serde(borrow)]
    traceparent: Option<&'a RawValue>,
    #[serde(borrow)]
    tracestate: Option<&'a RawValue>,
}

impl Fields<'_> {
    fn request_id(&self) -> Option<String> {
        let request_id = self.request_id.or(self.id)?;
        serde_json::from_str(request_id.get()).ok()
    }
}

/// Deserializes a payload of `null` as present, to distinguish it from a missing payload.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Parses a message.
///
/// # Errors
/// Returns all rules that the message violates.
pub(crate) fn parse(text: &str) -> Result<ClientMessage<'_>, InvalidMessage> {
    if !text.trim_start().starts_with('{') {
        // Checked before parsing, so that the error for any other JSON value is that it is not an object.
        let rule = match serde_json::from_str::<&RawValue>(text) {
            Ok(_) => "must be a JSON object".to_owned(),
            Err(error) => format!("is not JSON: {error}"),
        };
        return Err(invalid(None, "message", rule));
    }
    let fields: Fields<'_> = serde_json::from_str(text)
        .map_err(|error| invalid(None, "message", format!("is not JSON: {error}")))?;
    let mut reader = Reader { violations: Violations::default() };
    let message = reader.message(&fields);
    match message {
        Some(message) if reader.violations.is_empty() => Ok(message),
        _ => Err(InvalidMessage { request_id: fields.request_id(), violations: reader.violations }),
    }
}

/// Returns the `request_id` of a message, if it can be read.
pub(crate) fn request_id(text: &str) -> Option<String> {
    serde_json::from_str::<Fields<'_>>(text).ok()?.request_id()
}

fn invalid(request_id: Option<String>, field: &str, rule: String) -> InvalidMessage {
    let mut violations = Violations::default();
    violations.push(field, rule);
    InvalidMessage { request_id, violations }
}

struct Reader {
    violations: Violations,
}

impl Reader {
    fn message<'a>(&mut self, fields: &Fields<'a>) -> Option<ClientMessage<'a>> {
        let kind = match fields.kind {
            None => Cow::Borrowed("request"),
            Some(kind) => self.text("type", Some(kind))?,
        };
        Some(match &*kind {
            "request" => ClientMessage::Request(self.request(fields)),
            "subscribe" => ClientMessage::Subscribe {
                request_id: self.request_id(fields),
                after_seq: self
                    .integer("after_seq", fields.after_seq, 0, i64::MAX, "")
                    .and_then(|number| Seq::from_i64(number).ok()),
                latest: self.latest(fields.mode),
            },
            "unsubscribe" => ClientMessage::Unsubscribe { request_id: self.request_id(fields) },
            "cancel" => ClientMessage::Cancel {
                request_id: self.request_id(fields),
                reason: self.text("reason", fields.reason).unwrap_or_default(),
            },
            "get" => ClientMessage::Get { request_id: self.request_id(fields) },
            "list" => ClientMessage::List {
                states: self.states(fields.states),
                limit: self.small_integer("limit", fields.limit, 1, 500, "").unwrap_or(50),
                page_token: self.text("page_token", fields.page_token).unwrap_or_default(),
            },
            "auth" => {
                let token = self.text("token", fields.token);
                if fields.token.is_none() {
                    self.violations.push("token", "is required");
                }
                ClientMessage::Auth { token: token.unwrap_or_default() }
            }
            "ping" => ClientMessage::Ping,
            other => {
                let truncated: String = other.chars().take(40).collect();
                self.violations.push(
                    "type",
                    format!(
                        "must be request, subscribe, unsubscribe, cancel, get, list, auth or ping, \
                         is {truncated:?}"
                    ),
                );
                return None;
            }
        })
    }

    fn request<'a>(&mut self, fields: &Fields<'a>) -> RequestMessage<'a> {
        let id = self.text("id", fields.id).unwrap_or_default();
        if fields.id.is_some() {
            self.violations.check("id", validate::request_id(&id));
        }
        let action = self.text("action", fields.action).unwrap_or_default();
        if fields.action.is_none() || !action.is_empty() {
            self.violations.check("action", validate::action_name(&action));
        }
        let metadata = fields.metadata.filter(|metadata| metadata.get() != "null");
        if metadata.is_some_and(|metadata| !metadata.get().starts_with('{')) {
            self.violations.push("metadata", "must be a JSON object");
        }
        RequestMessage {
            id,
            action,
            payload: fields.payload,
            metadata,
            wait_ms: self
                .integer("wait_ms", fields.wait_ms, 0, limits::MAX_WAIT_MS, " ms")
                .unwrap_or(0),
            priority: self
                .small_integer("priority", fields.priority, 0, limits::MAX_PRIORITY, "")
                .unwrap_or(0),
            delay_ms: self
                .integer("delay_ms", fields.delay_ms, 0, limits::MAX_DELAY_MS, " ms")
                .unwrap_or(0),
            latest: self.latest(fields.mode),
            trace: self.trace(fields),
        }
    }

    /// Ignores an invalid trace context, as W3C requires, but rejects a value that is not a string.
    fn trace(&mut self, fields: &Fields<'_>) -> Option<TraceContext> {
        let parent = self.text("traceparent", fields.traceparent)?;
        let state = self.text("tracestate", fields.tracestate);
        TraceContext::parse(&parent, state.as_deref())
    }

    fn request_id<'a>(&mut self, fields: &Fields<'a>) -> Cow<'a, str> {
        let Some(given) = fields.request_id.or(fields.id) else {
            self.violations.push("request_id", "is required");
            return Cow::Borrowed("");
        };
        let request_id = self.text("request_id", Some(given)).unwrap_or_default();
        self.violations.check("request_id", validate::request_id(&request_id));
        request_id
    }

    fn latest(&mut self, mode: Option<&RawValue>) -> bool {
        match self.text("mode", mode).as_deref() {
            None | Some("all") => false,
            Some("latest") => true,
            Some(_) => {
                self.violations.push("mode", "must be all or latest");
                false
            }
        }
    }

    fn states(&mut self, value: Option<&RawValue>) -> Vec<RequestState> {
        let Some(value) = value else { return Vec::new() };
        let Ok(names) = serde_json::from_str::<Vec<Cow<'_, str>>>(value.get()) else {
            self.violations.push("states", "must be a list of states");
            return Vec::new();
        };
        let mut states = Vec::with_capacity(names.len());
        for name in names {
            match name.parse() {
                Ok(state) => states.push(state),
                Err(error) => self.violations.push("states", format!("{name:?} {error}")),
            }
        }
        states
    }

    fn text<'a>(&mut self, field: &str, value: Option<&'a RawValue>) -> Option<Cow<'a, str>> {
        let json = value?.get();
        // If the string contains no escapes, the text between the quotes is its value.
        let plain = json.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        if let Some(plain) = plain.filter(|plain| !plain.contains('\\')) {
            return Some(Cow::Borrowed(plain));
        }
        match serde_json::from_str::<String>(json) {
            Ok(text) => Some(Cow::Owned(text)),
            Err(_) => {
                self.violations.push(field, "must be a string");
                None
            }
        }
    }

    fn integer(
        &mut self,
        field: &str,
        value: Option<&RawValue>,
        low: i64,
        high: i64,
        unit: &str,
    ) -> Option<i64> {
        let Ok(number) = serde_json::from_str::<i64>(value?.get()) else {
            self.violations.push(field, "must be a whole number");
            return None;
        };
        self.violations.check(field, validate::in_range(number, low, high, unit));
        Some(number)
    }

    fn small_integer(
        &mut self,
        field: &str,
        value: Option<&RawValue>,
        low: i32,
        high: i32,
        unit: &str,
    ) -> Option<i32> {
        let number = self.integer(field, value, low.into(), high.into(), unit)?;
        i32::try_from(number).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(text: &str) -> String {
        parse(text).map(|message| format!("{message:?}")).unwrap_err().violations.to_string()
    }

    #[test]
    fn type_defaults_to_request_and_unknown_fields_are_ignored() {
        let text = r#"{"action":"echo","payload":{"n":9223372036854775807, "s":"\u0000"},"x":[1]}"#;
        let Ok(ClientMessage::Request(request)) = parse(text) else { panic!("not a request") };
        assert_eq!(request.action, "echo");
        assert_eq!(request.payload.unwrap().get(), r#"{"n":9223372036854775807, "s":"\u0000"}"#);
        assert_eq!(request.id, "");
    }

    #[test]
    fn every_violation_is_reported() {
        let reported = violations(
            r#"{"id":7,"action":"No","metadata":[],"wait_ms":-1,"priority":10,"delay_ms":"x","mode":"x"}"#,
        );
        for field in [
            "id: must be a string",
            "action: must match",
            "metadata: must be a JSON",
            "wait_ms: must be 0 to",
            "priority: must be 0 to 9",
            "delay_ms: must be a whole",
            "mode: must be all or latest",
        ] {
            assert!(reported.contains(field), "{field} is missing in {reported}");
        }
    }

    #[test]
    fn invalid_messages_get_distinct_errors() {
        assert!(violations("nonsense").starts_with("message: is not JSON"));
        assert!(violations("{\"a\":").starts_with("message: is not JSON"));
        assert_eq!(violations("[1]"), "message: must be a JSON object");
        assert_eq!(violations("\"x\""), "message: must be a JSON object");
        assert!(violations(r#"{"type":"dance"}"#).contains("is \"dance\""));
        assert_eq!(violations(r#"{"type":5}"#), "type: must be a string");
        assert_eq!(violations(r#"{"type":"request"}"#), "action: is required");
        assert_eq!(violations(r#"{"type":"subscribe"}"#), "request_id: is required");
        assert_eq!(violations(r#"{"type":"auth"}"#), "token: is required");
        let invalid = parse(r#"{"type":"subscribe","request_id":"a","after_seq":-1}"#).unwrap_err();
        assert_eq!(invalid.request_id.as_deref(), Some("a"));
    }

    #[test]
    fn deeply_nested_payloads_are_accepted() {
        let deep = format!(
            "{{\"action\":\"echo\",\"payload\":{}{}}}",
            "[".repeat(50_000),
            "]".repeat(50_000)
        );
        assert!(matches!(parse(&deep), Ok(ClientMessage::Request(_))));
    }
}
