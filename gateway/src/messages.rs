//! What the server sends: subprotocol `streamer.v1.json`, server to client, as whole frames.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use streamer_core::{RequestError, Timestamp, limits::MAX_REQUEST_ID_CHARS, output::hex};
use streamer_proto::{
    common::v1::{
        Error, Event, OutputSummary, Payload, Progress, QueuePosition, Request, RequestState,
        event::Kind, payload::Body,
    },
    millis,
    router::v1::Completed,
};
use streamer_rpc::{JSON, error_from_proto, state_from_proto};

use crate::json::{Object, write_text};

/// How a request is named in every message about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) request_id: String,
    pub(crate) uid: String,
}

fn about(kind: &str, names: &Names, now: Timestamp, capacity: usize) -> Object {
    Object::message(kind, now, capacity + 128)
        .text("request_id", &names.request_id)
        .text("uid", &names.uid)
}

/// An event of a request's log.
pub(crate) fn event(event: &Event, names: &Names) -> Bytes {
    let time = Timestamp::from_millis(event.time.as_ref().map_or(0, millis));
    let from_log = |kind: &str, capacity: usize| {
        about(kind, names, time, capacity + 64)
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
        Some(Kind::Progress(progress)) => members(from_log("progress", 256), progress).finish(),
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
                .object("error", |object| logged_error(object, retrying.error.as_ref()))
                .finish()
        }
        Some(Kind::Succeeded(succeeded)) => {
            let object = from_log("complete", size(succeeded.result.as_ref()) + 192);
            let object =
                payload(object.boolean("success", true), "result", succeeded.result.as_ref());
            summary(object, succeeded.output.as_ref()).finish()
        }
        Some(Kind::Failed(failed)) => {
            let object = from_log("error", 512)
                .number("rewind_to_seq", failed.rewind_to_seq)
                .object("error", |object| logged_error(object, failed.error.as_ref()));
            summary(object, failed.output.as_ref()).finish()
        }
        Some(Kind::Cancelled(cancelled)) => {
            let object = from_log("cancelled", 256).text("reason", &cancelled.reason);
            summary(object, cancelled.output.as_ref()).finish()
        }
        // A kind that a newer server writes: its place in the sequence is told all the same.
        None => from_log("unknown", 0).finish(),
    }
}

/// The first message of every connection.
pub(crate) struct Connected<'a> {
    pub(crate) connection_id: &'a str,
    pub(crate) user_id: &'a str,
    pub(crate) tenant_id: &'a str,
    pub(crate) heartbeat_ms: i64,
    pub(crate) max_message_bytes: usize,
    pub(crate) expires_at: Timestamp,
}

pub(crate) fn connected(connected: &Connected<'_>, now: Timestamp) -> Bytes {
    Object::message("connected", now, 320)
        .text("connection_id", connected.connection_id)
        .text("user_id", connected.user_id)
        .text("tenant_id", connected.tenant_id)
        .number("heartbeat_ms", connected.heartbeat_ms)
        .number("max_message_bytes", i64::try_from(connected.max_message_bytes).unwrap_or(i64::MAX))
        .text("expires_at", &connected.expires_at.to_string())
        .finish()
}

/// What is said of a request that is durable.
pub(crate) struct Acknowledged<'a> {
    pub(crate) status: &'a str,
    pub(crate) message: &'a str,
    pub(crate) duplicate: bool,
    pub(crate) last_seq: i64,
    pub(crate) queue_position: Option<&'a QueuePosition>,
    pub(crate) trace_id: Option<String>,
}

/// The request is durable.
pub(crate) fn acknowledgment(names: &Names, said: &Acknowledged<'_>, now: Timestamp) -> Bytes {
    let object = about("acknowledgment", names, now, 288)
        .text("status", said.status)
        .text("message", said.message)
        .boolean("duplicate", said.duplicate)
        .number("last_seq", said.last_seq);
    let object = place(object, said.queue_position);
    match &said.trace_id {
        Some(id) => object.text("trace_id", id).finish(),
        None => object.finish(),
    }
}

fn place(object: Object, position: Option<&QueuePosition>) -> Object {
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

/// The outcome of a sync action, or of an async one that ended in time.
pub(crate) fn completed(names: &Names, completed: &Completed, now: Timestamp) -> Bytes {
    let cancelled = completed.state() == RequestState::Cancelled;
    let object = match &completed.error {
        None => {
            let data = completed.result.as_ref();
            let object = about("response", names, now, size(data) + 256).boolean("success", true);
            payload(object, "data", data)
        }
        Some(error) if cancelled => {
            about("cancelled", names, now, 256).text("reason", &error.message)
        }
        Some(error) => about("error", names, now, error.message.len() + 512)
            .object("error", |object| logged_error(object, Some(error))),
    };
    // A sync action has no log.
    let object = if completed.seq > 0 { object.number("seq", completed.seq) } else { object };
    summary(object, completed.output.as_ref()).finish()
}

/// Where a subscription begins.
pub(crate) fn subscribed(request: &Request, now: Timestamp) -> Bytes {
    let names = Names { request_id: request.request_id.clone(), uid: request.uid.clone() };
    let mut object = about("subscribed", &names, now, 384)
        .number("last_seq", request.last_seq)
        .text("state", state(request))
        .text("action", &request.action)
        .number("attempt", request.attempt.into());
    if let Some(progress) = &request.progress {
        object = object.object("progress", |object| members(object, progress));
    }
    object.finish()
}

/// A subscription has ended.
pub(crate) fn unsubscribed(request_id: &str, now: Timestamp) -> Bytes {
    Object::message("unsubscribed", now, 64).text("request_id", request_id).finish()
}

/// One request, in answer to `get`.
pub(crate) fn request(request: &Request, now: Timestamp) -> Bytes {
    let capacity = size(request.payload.as_ref()) + size(request.result.as_ref()) + 768;
    describe(Object::message("request", now, capacity), request).finish()
}

/// A page of requests, in answer to `list`.
pub(crate) fn requests(requests: &[Request], next_page_token: &str, now: Timestamp) -> Bytes {
    Object::message("requests", now, requests.len() * 512)
        .list("requests", requests, describe)
        .text("next_page_token", next_page_token)
        .finish()
}

/// The beginning of a name that is too long to be valid: enough to recognise it by.
fn within_limit(name: &str) -> &str {
    match name.char_indices().nth(MAX_REQUEST_ID_CHARS) {
        Some((end, _)) => &name[..end],
        None => name,
    }
}

/// Something was refused, or failed outside a log.
pub(crate) fn error(request_id: Option<&str>, failure: &RequestError, now: Timestamp) -> Bytes {
    let mut object = Object::message("error", now, failure.message.len() + 256);
    if let Some(request_id) = request_id.map(within_limit) {
        object = object.text("request_id", request_id);
    }
    object.object("error", |object| error_members(object, failure)).finish()
}

/// A message that a service pushes.
pub(crate) fn push(topic: &str, data: Option<&Payload>, now: Timestamp) -> Bytes {
    let object = Object::message("message", now, size(data) + topic.len() + 64);
    payload(object.text("topic", topic), "data", data).finish()
}

/// The token was taken.
pub(crate) fn authenticated(expires_at: Timestamp, now: Timestamp) -> Bytes {
    Object::message("authenticated", now, 64).text("expires_at", &expires_at.to_string()).finish()
}

/// The token ends soon.
pub(crate) fn auth_expiring(expires_at: Timestamp, now: Timestamp) -> Bytes {
    Object::message("auth_expiring", now, 64).text("expires_at", &expires_at.to_string()).finish()
}

/// The gateway is about to close.
pub(crate) fn draining(reconnect_after_ms: i64, now: Timestamp) -> Bytes {
    Object::message("draining", now, 64).number("reconnect_after_ms", reconnect_after_ms).finish()
}

/// In answer to `ping`.
pub(crate) fn pong(now: Timestamp) -> Bytes {
    Object::message("pong", now, 0).finish()
}

fn describe(object: Object, request: &Request) -> Object {
    let time = |object: Object, name: &str, time: Option<&prost_types::Timestamp>| match time {
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
    object = place(object, request.queue_position.as_ref());
    object = object.text_unless_empty("redrive_of", &request.redrive_of);
    if let Some(progress) = &request.progress {
        object = object.object("progress", |object| members(object, progress));
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
    summary(object, request.output.as_ref())
}

fn state(request: &Request) -> &'static str {
    state_from_proto(request.state).map_or("UNKNOWN", streamer_core::RequestState::as_str)
}

fn members(mut object: Object, progress: &Progress) -> Object {
    if let Some(percentage) = progress.percentage {
        object = object.float("percentage", percentage);
    }
    object = object.text("message", &progress.message);
    match &progress.metadata {
        Some(metadata) => payload(object, "metadata", Some(metadata)),
        None => object,
    }
}

fn logged_error(object: Object, error: Option<&Error>) -> Object {
    error_members(object, &error_from_proto(&error.cloned().unwrap_or_default()))
}

fn error_members(object: Object, error: &RequestError) -> Object {
    let object = object
        .text("code", error.code.as_str())
        .text("message", &error.message)
        .boolean("retryable", error.retryable);
    match &error.details {
        Some(details) => object.raw("details", details.as_bytes()),
        None => object,
    }
}

fn summary(object: Object, output: Option<&OutputSummary>) -> Object {
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

/// JSON as it is; text as a string; everything else as base64. What is not JSON says what it is in
/// a member beside it.
fn payload(object: Object, name: &str, payload: Option<&Payload>) -> Object {
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
mod tests {
    use streamer_proto::common::v1 as proto;
    use streamer_rpc::json_payload;

    use super::*;

    fn json(frame: &Bytes) -> serde_json::Value {
        let begin = frame.iter().position(|byte| *byte == b'{').unwrap();
        serde_json::from_slice(&frame[begin..]).unwrap()
    }

    fn shown(kind: Kind) -> serde_json::Value {
        let names = Names { request_id: "req-1".into(), uid: "U".into() };
        let time = Some(streamer_proto::timestamp(1500));
        json(&event(&Event { seq: 5, attempt: 1, time, kind: Some(kind) }, &names))
    }

    #[test]
    fn progress_reads_as_documented() {
        let shown = shown(Kind::Progress(Progress {
            percentage: Some(45.5),
            message: "half \"done\"".into(),
            metadata: Some(json_payload(r#"{"rows":9223372036854775807}"#)),
        }));
        assert_eq!(
            shown.to_string(),
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
            shown(Kind::Output(proto::Output { data, chunk_index: 0 }))
        };
        assert_eq!(output(JSON, b"{\"a\":1}")["data"]["a"], 1);
        assert_eq!(output("text/html", b"<p>")["data"], "<p>");
        let binary = output("application/octet-stream", b"\xff");
        assert_eq!((&binary["data"], &binary["encoding"]), (&"/w==".into(), &"base64".into()));
    }

    #[test]
    fn terminal_events_carry_the_proof() {
        let output = Some(OutputSummary { chunks: 2, sha256: vec![0xab; 32].into() });
        let complete = shown(Kind::Succeeded(proto::Succeeded {
            result: Some(json_payload("7")),
            output: output.clone(),
        }));
        assert_eq!((&complete["result"], &complete["success"]), (&7.into(), &true.into()));
        assert_eq!(complete["output"]["sha256"], "ab".repeat(32));
        let failed = shown(Kind::Failed(proto::Failed {
            error: Some(Error { code: 10, message: "no".into(), ..Error::default() }),
            rewind_to_seq: 2,
            output,
        }));
        assert_eq!(failed["type"], "error");
        assert_eq!(failed["error"]["code"], "PROCESSING_FAILED");
    }
}
