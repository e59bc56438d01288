//! Messages from server to client in subprotocol `streamer.v1.json`, as complete frames.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use streamer_core::{RequestError, Timestamp, hex, limits::MAX_REQUEST_ID_CHARS, saturate};
use streamer_proto::{
    common::v1::{
        Error, Event, OutputSummary, Payload, Progress, QueuePosition, Request, RequestState,
        event::Kind, payload::Body,
    },
    millis,
    router::v1::Completed,
};
use streamer_rpc::{JSON, error_from_proto, state_from_proto};

use crate::protocol::json_writer::{JsonWriter, write_text};

/// Identifiers of a request, present in every message about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestIds {
    pub(crate) request_id: String,
    pub(crate) uid: String,
}

fn request_object(kind: &str, ids: &RequestIds, now: Timestamp, capacity: usize) -> JsonWriter {
    JsonWriter::message(kind, now, capacity + 128)
        .text("request_id", &ids.request_id)
        .text("uid", &ids.uid)
}

/// Encodes an event of a request's log.
pub(crate) fn event(event: &Event, ids: &RequestIds) -> Bytes {
    let time = Timestamp::from_millis(event.time.as_ref().map_or(0, millis));
    let from_log = |kind: &str, capacity: usize| {
        request_object(kind, ids, time, capacity + 64)
            .number("seq", event.seq)
            .number("attempt", event.attempt.into())
    };
    match &event.kind {
        Some(Kind::Accepted(accepted)) => {
            from_log("accepted", 64).text("action", &accepted.action).finish()
        }
        Some(Kind::Started(started)) => {
            from_log("started", 64).text("worker", &started.worker).finish()
        }
        Some(Kind::Progress(progress)) => {
            progress_members(from_log("progress", 256), progress).finish()
        }
        Some(Kind::Output(output)) => {
            let object = from_log("output", size(output.data.as_ref()) + 64);
            payload(object.number("chunk_index", output.chunk_index), "data", output.data.as_ref())
                .finish()
        }
        Some(Kind::Retrying(retrying)) => {
            let retry_at = retrying.retry_at.as_ref().map_or(0, millis);
            from_log("retrying", 256)
                .text("retry_at", &Timestamp::from_millis(retry_at).to_string())
                .number("rewind_to_seq", retrying.rewind_to_seq)
                .boolean("released", retrying.released)
                .object("error", |object| logged_error(object, retrying.error.as_ref()))
                .finish()
        }
        Some(Kind::Succeeded(succeeded)) => {
            let object = from_log("complete", size(succeeded.result.as_ref()) + 192);
            let object =
                payload(object.boolean("success", true), "result", succeeded.result.as_ref());
            output_summary(object, succeeded.output.as_ref()).finish()
        }
        Some(Kind::Failed(failed)) => {
            let object = from_log("error", 512)
                .number("rewind_to_seq", failed.rewind_to_seq)
                .object("error", |object| logged_error(object, failed.error.as_ref()));
            output_summary(object, failed.output.as_ref()).finish()
        }
        Some(Kind::Cancelled(cancelled)) => {
            let object = from_log("cancelled", 256).text("reason", &cancelled.reason);
            output_summary(object, cancelled.output.as_ref()).finish()
        }
        // The event kind was written by a newer server; the client still needs the `seq`.
        None => from_log("unknown", 0).finish(),
    }
}

/// Content of `connected`, the first message of every connection.
pub(crate) struct Connected<'a> {
    pub(crate) connection_id: &'a str,
    pub(crate) user_id: &'a str,
    pub(crate) tenant_id: &'a str,
    pub(crate) heartbeat_ms: i64,
    pub(crate) max_message_bytes: usize,
    pub(crate) expires_at: Timestamp,
}

pub(crate) fn connected(connected: &Connected<'_>, now: Timestamp) -> Bytes {
    JsonWriter::message("connected", now, 320)
        .text("connection_id", connected.connection_id)
        .text("user_id", connected.user_id)
        .text("tenant_id", connected.tenant_id)
        .number("heartbeat_ms", connected.heartbeat_ms)
        .number("max_message_bytes", saturate::to_i64(connected.max_message_bytes))
        .text("expires_at", &connected.expires_at.to_string())
        .finish()
}

/// Content of an `acknowledgment` message.
pub(crate) struct Acknowledgment<'a> {
    pub(crate) status: &'a str,
    pub(crate) message: &'a str,
    pub(crate) duplicate: bool,
    pub(crate) last_seq: i64,
    pub(crate) queue_position: Option<&'a QueuePosition>,
    pub(crate) trace_id: Option<String>,
}

/// Encodes the acknowledgment of a durable request.
pub(crate) fn acknowledgment(
    ids: &RequestIds,
    content: &Acknowledgment<'_>,
    now: Timestamp,
) -> Bytes {
    let object = request_object("acknowledgment", ids, now, 288)
        .text("status", content.status)
        .text("message", content.message)
        .boolean("duplicate", content.duplicate)
        .number("last_seq", content.last_seq);
    let object = queue_position(object, content.queue_position);
    match &content.trace_id {
        Some(id) => object.text("trace_id", id).finish(),
        None => object.finish(),
    }
}

fn queue_position(object: JsonWriter, position: Option<&QueuePosition>) -> JsonWriter {
    let Some(position) = position else { return object };
    object.object("queue_position", |object| {
        let object = object.number("earliest", position.earliest).number("latest", position.latest);
        match &position.estimated_start_time {
            Some(start) => object
                .text("estimated_start_time", &Timestamp::from_millis(millis(start)).to_string()),
            None => object,
        }
    })
}

/// Encodes the result of a sync action, or of an async action that ended within the wait time.
pub(crate) fn completed(ids: &RequestIds, completed: &Completed, now: Timestamp) -> Bytes {
    let cancelled = completed.state() == RequestState::Cancelled;
    let object = match &completed.error {
        None => {
            let data = completed.result.as_ref();
            let object =
                request_object("response", ids, now, size(data) + 256).boolean("success", true);
            payload(object, "data", data)
        }
        Some(error) if cancelled => {
            request_object("cancelled", ids, now, 256).text("reason", &error.message)
        }
        Some(error) => request_object("error", ids, now, error.message.len() + 512)
            .object("error", |object| logged_error(object, Some(error))),
    };
    // A sync action has no log.
    let object = if completed.seq > 0 { object.number("seq", completed.seq) } else { object };
    output_summary(object, completed.output.as_ref()).finish()
}

/// Encodes the confirmation of a subscription, which describes the request.
pub(crate) fn subscribed(request: &Request, now: Timestamp) -> Bytes {
    let ids = RequestIds { request_id: request.request_id.clone(), uid: request.uid.clone() };
    let mut object = request_object("subscribed", &ids, now, 384)
        .number("last_seq", request.last_seq)
        .text("state", state(request))
        .text("action", &request.action)
        .number("attempt", request.attempt.into());
    if let Some(progress) = &request.progress {
        object = object.object("progress", |object| progress_members(object, progress));
    }
    object.finish()
}

/// Encodes the confirmation of the end of a subscription.
pub(crate) fn unsubscribed(request_id: &str, now: Timestamp) -> Bytes {
    JsonWriter::message("unsubscribed", now, 64).text("request_id", request_id).finish()
}

/// Encodes a request, in reply to `get`.
pub(crate) fn request(request: &Request, now: Timestamp) -> Bytes {
    let capacity = size(request.payload.as_ref()) + size(request.result.as_ref()) + 768;
    request_members(JsonWriter::message("request", now, capacity), request).finish()
}

/// Encodes a page of requests, in reply to `list`.
pub(crate) fn requests(requests: &[Request], next_page_token: &str, now: Timestamp) -> Bytes {
    JsonWriter::message("requests", now, requests.len() * 512)
        .list("requests", requests, request_members)
        .text("next_page_token", next_page_token)
        .finish()
}

/// Truncates an identifier to the maximum length of a valid one.
fn within_limit(request_id: &str) -> &str {
    match request_id.char_indices().nth(MAX_REQUEST_ID_CHARS) {
        Some((end, _)) => &request_id[..end],
        None => request_id,
    }
}

/// Encodes the error of a message or call, which is not an event of a log.
pub(crate) fn error(request_id: Option<&str>, failure: &RequestError, now: Timestamp) -> Bytes {
    let mut object = JsonWriter::message("error", now, failure.message.len() + 256);
    if let Some(request_id) = request_id.map(within_limit) {
        object = object.text("request_id", request_id);
    }
    object.object("error", |object| error_members(object, failure)).finish()
}

/// Encodes a message pushed by a service.
pub(crate) fn push(topic: &str, data: Option<&Payload>, now: Timestamp) -> Bytes {
    let object = JsonWriter::message("message", now, size(data) + topic.len() + 64);
    payload(object.text("topic", topic), "data", data).finish()
}

/// Encodes the confirmation of a new token.
pub(crate) fn authenticated(expires_at: Timestamp, now: Timestamp) -> Bytes {
    JsonWriter::message("authenticated", now, 64)
        .text("expires_at", &expires_at.to_string())
        .finish()
}

/// Encodes the warning that the token expires soon.
pub(crate) fn auth_expiring(expires_at: Timestamp, now: Timestamp) -> Bytes {
    JsonWriter::message("auth_expiring", now, 64)
        .text("expires_at", &expires_at.to_string())
        .finish()
}

/// Encodes the announcement that the gateway is about to close the connection.
pub(crate) fn draining(reconnect_after_ms: i64, now: Timestamp) -> Bytes {
    JsonWriter::message("draining", now, 64)
        .number("reconnect_after_ms", reconnect_after_ms)
        .finish()
}

/// Encodes the reply to `ping`.
pub(crate) fn pong(now: Timestamp) -> Bytes {
    JsonWriter::message("pong", now, 0).finish()
}

fn request_members(object: JsonWriter, request: &Request) -> JsonWriter {
    let time = |object: JsonWriter, name: &str, time: Option<&prost_types::Timestamp>| match time {
        Some(time) => object.text(name, &Timestamp::from_millis(millis(time)).to_string()),
        None => object,
    };
    let mut object = object
        .text("request_id", &request.request_id)
        .text("uid", &request.uid)
        .text("user_id", &request.user_id)
        .text("action", &request.action)
        .text("state", state(request))
        .number("attempt", request.attempt.into())
        .number("last_seq", request.last_seq)
        .number("priority", request.priority.into())
        .boolean("cancel_requested", request.cancel_requested);
    object = time(object, "create_time", request.create_time.as_ref());
    object = time(object, "start_time", request.start_time.as_ref());
    object = time(object, "finish_time", request.finish_time.as_ref());
    object = time(object, "not_before", request.not_before.as_ref());
    object = time(object, "deadline", request.deadline.as_ref());
    object = time(object, "close_by", request.close_by.as_ref());
    object = queue_position(object, request.queue_position.as_ref());
    object = object.text_unless_empty("redrive_of", &request.redrive_of);
    if let Some(progress) = &request.progress {
        object = object.object("progress", |object| progress_members(object, progress));
    }
    let payloads = [
        ("payload", &request.payload),
        ("metadata", &request.metadata),
        ("result", &request.result),
    ];
    for (name, value) in payloads {
        if value.is_some() {
            object = payload(object, name, value.as_ref());
        }
    }
    if let Some(error) = &request.error {
        object = object.object("error", |object| logged_error(object, Some(error)));
    }
    output_summary(object, request.output.as_ref())
}

fn state(request: &Request) -> &'static str {
    state_from_proto(request.state).map_or("UNKNOWN", streamer_core::RequestState::as_str)
}

fn progress_members(mut object: JsonWriter, progress: &Progress) -> JsonWriter {
    if let Some(percentage) = progress.percentage {
        object = object.float("percentage", percentage);
    }
    object = object.text("message", &progress.message);
    match &progress.metadata {
        Some(metadata) => payload(object, "metadata", Some(metadata)),
        None => object,
    }
}

fn logged_error(object: JsonWriter, error: Option<&Error>) -> JsonWriter {
    error_members(object, &error_from_proto(&error.cloned().unwrap_or_default()))
}

fn error_members(object: JsonWriter, error: &RequestError) -> JsonWriter {
    let object = object
        .text("code", error.code.as_str())
        .text("message", &error.message)
        .boolean("retryable", error.retryable);
    match &error.details {
        Some(details) => object.raw("details", details.as_bytes()),
        None => object,
    }
}

fn output_summary(object: JsonWriter, output: Option<&OutputSummary>) -> JsonWriter {
    let Some(output) = output else { return object };
    object.object("output", |object| {
        object.number("chunks", output.chunks).text("sha256", &hex(&output.sha256))
    })
}

fn size(payload: Option<&Payload>) -> usize {
    match payload.and_then(|payload| payload.body.as_ref()) {
        Some(Body::Data(data)) => data.len(),
        Some(Body::Json(_)) | None => 2,
    }
}

/// Writes a payload: JSON unchanged, text as a string, and any other content as base64. If the payload is
/// not JSON, also writes its `content_type`.
fn payload(object: JsonWriter, name: &str, payload: Option<&Payload>) -> JsonWriter {
    let Some(payload) = payload else { return object.raw(name, b"null") };
    let data = streamer_rpc::payload_bytes(Some(payload));
    if payload.content_type.is_empty() || payload.content_type == JSON {
        return object.raw(name, &data);
    }
    let mut value = Vec::with_capacity(data.len() + 2);
    let (encoding, text) = match std::str::from_utf8(&data) {
        Ok(text) if payload.content_type.starts_with("text/") => ("", text.to_owned()),
        _ => ("base64", STANDARD.encode(&data)),
    };
    write_text(&mut value, &text);
    object
        .raw(name, &value)
        .text("content_type", &payload.content_type)
        .text_unless_empty("encoding", encoding)
}

#[cfg(test)]
mod client_tests;

#[cfg(test)]
mod tests {
    use streamer_proto::common::v1 as proto;
    use streamer_rpc::json_payload;

    use super::*;

    fn json(frame: &Bytes) -> serde_json::Value {
        let begin = frame.iter().position(|byte| *byte == b'{').unwrap();
        serde_json::from_slice(&frame[begin..]).unwrap()
    }

    fn event_json(kind: Kind) -> serde_json::Value {
        let ids = RequestIds { request_id: "req-1".into(), uid: "U".into() };
        let time = Some(streamer_proto::timestamp(1500));
        json(&event(&Event { seq: 5, attempt: 1, time, kind: Some(kind) }, &ids))
    }

    #[test]
    fn progress_events_match_the_documentation() {
        let event_json = event_json(Kind::Progress(Progress {
            percentage: Some(45.5),
            message: "half \"done\"".into(),
            metadata: Some(json_payload(r#"{"rows":9223372036854775807}"#)),
        }));
        assert_eq!(
            event_json.to_string(),
            serde_json::json!({
                "type": "progress", "timestamp": "1970-01-01T00:00:01.500Z", "request_id": "req-1",
                "uid": "U", "seq": 5, "attempt": 1, "percentage": 45.5, "message": "half \"done\"",
                "metadata": {"rows": 9_223_372_036_854_775_807_i64}
            })
            .to_string()
        );
    }

    #[test]
    fn output_is_json_text_or_base64() {
        let output = |content_type: &str, data: &'static [u8]| {
            let body = Some(Body::Data(Bytes::from_static(data)));
            let data = Some(Payload { content_type: content_type.into(), body });
            event_json(Kind::Output(proto::Output { data, chunk_index: 0 }))
        };
        assert_eq!(output(JSON, b"{\"a\":1}")["data"]["a"], 1);
        assert_eq!(output("text/html", b"<p>")["data"], "<p>");
        let binary = output("application/octet-stream", b"\xff");
        assert_eq!((&binary["data"], &binary["encoding"]), (&"/w==".into(), &"base64".into()));
    }

    #[test]
    fn terminal_events_carry_the_output_summary() {
        let output = Some(OutputSummary { chunks: 2, sha256: vec![0xab; 32].into() });
        let complete = event_json(Kind::Succeeded(proto::Succeeded {
            result: Some(json_payload("7")),
            output: output.clone(),
        }));
        assert_eq!((&complete["result"], &complete["success"]), (&7.into(), &true.into()));
        assert_eq!(complete["output"]["sha256"], "ab".repeat(32));
        let failed = event_json(Kind::Failed(proto::Failed {
            error: Some(Error { code: 10, message: "no".into(), ..Error::default() }),
            rewind_to_seq: 2,
            output,
        }));
        assert_eq!(failed["type"], "error");
        assert_eq!(failed["error"]["code"], "PROCESSING_FAILED");
    }
}
