//! Parses messages as `gateway/src/protocol/server_message.rs` writes them.

use streamer_core::{ErrorCode, RequestError, RequestState};

use super::*;

/// Parses a message with the given type; `members` are the members after `type` and `timestamp`.
fn parse(kind: &str, members: &str) -> Result<ServerMessage, ClientError> {
    let comma = if members.is_empty() { "" } else { "," };
    let text = format!(
        "{{\"type\":\"{kind}\",\"timestamp\":\"1970-01-01T00:00:01.500Z\"{comma}{members}}}"
    );
    let received = ReceivedMessage::parse(text.as_str())?;
    assert_eq!(received.message.kind(), kind);
    assert_eq!((received.timestamp, received.text), ("1970-01-01T00:00:01.500Z".into(), text));
    Ok(received.message)
}

/// Parses an event of request `r`, the fifth of its log, in attempt 1.
fn event(kind: &str, members: &str) -> ServerMessage {
    let head = r#""request_id":"r","uid":"U","seq":5,"attempt":1"#;
    let message = parse(kind, &format!("{head},{members}")).unwrap();
    assert_eq!((message.request_id(), message.seq()), (Some("r"), Some(5)));
    message
}

/// Returns the error for a message with members that are missing or have the wrong type.
fn invalid(kind: &str, members: &str) -> String {
    match parse(kind, members) {
        Err(ClientError::Protocol(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn connected_announces_the_limits_of_the_connection() {
    let ServerMessage::Connected(connected) = parse(
        "connected",
        r#""connection_id":"C","user_id":"ann","tenant_id":"acme","heartbeat_ms":25000,
           "max_message_bytes":1049600,"expires_at":"2026-11-24T04:05:00.007Z""#,
    )
    .unwrap() else {
        panic!()
    };
    assert_eq!((connected.heartbeat_ms, connected.max_message_bytes), (25_000, 1_049_600));
    assert_eq!((connected.connection_id.as_str(), connected.user_id.as_str()), ("C", "ann"));
    assert_eq!(connected.tenant_id, "acme");
    assert_eq!(connected.expires_at, "2026-11-24T04:05:00.007Z");
}

#[test]
fn an_acknowledgment_may_contain_the_queue_position_and_the_trace() {
    let members = r#""request_id":"job-1","uid":"U","status":"queued","duplicate":false,
        "message":"accepted for execution","last_seq":1"#;
    let ServerMessage::Acknowledgment(plain) = parse("acknowledgment", members).unwrap() else {
        panic!()
    };
    assert_eq!((plain.status, plain.last_seq), (Some(RequestState::Queued), 1));
    assert!(!plain.duplicate && plain.queue_position.is_none() && plain.trace_id.is_none());
    assert_eq!(plain.message, "accepted for execution");
    let members = format!(
        r#"{members},"queue_position":{{"earliest":1,"latest":3,
           "estimated_start_time":"2026-11-24T04:05:00.007Z"}},"trace_id":"ab""#
    );
    let message = parse("acknowledgment", &members).unwrap();
    assert_eq!((message.request_id(), message.seq()), (Some("job-1"), None));
    let ServerMessage::Acknowledgment(full) = message else { panic!() };
    let position = full.queue_position.unwrap();
    assert_eq!((position.earliest, position.latest), (1, 3));
    assert_eq!(position.estimated_start_time.unwrap(), "2026-11-24T04:05:00.007Z");
    assert_eq!(full.trace_id.unwrap(), "ab");
}

#[test]
fn a_response_has_a_seq_only_if_the_action_is_async() {
    let members = r#""request_id":"r","uid":"U","success":true,"data":{"n":1.0}"#;
    let message = parse("response", members).unwrap();
    assert_eq!((message.request_id(), message.seq()), (Some("r"), None));
    let ServerMessage::Response(response) = message else { panic!() };
    assert_eq!(response.data.get(), r#"{"n":1.0}"#);
    assert!(response.output.is_none());
    let members = format!(r#"{members},"seq":7,"output":{{"chunks":2,"sha256":"ab"}}"#);
    let message = parse("response", &members).unwrap();
    assert_eq!(message.seq(), Some(7));
    let ServerMessage::Response(response) = message else { panic!() };
    let output = response.output.unwrap();
    assert_eq!((output.chunks, output.sha256.as_str()), (2, "ab"));
}

#[test]
fn a_snapshot_contains_the_state_and_the_latest_progress() {
    let members = r#""request_id":"r","uid":"U","last_seq":5,"action":"echo_async","attempt":1"#;
    let subscribed = |state: &str| {
        let members = format!(
            r#"{members},"state":"{state}","progress":{{"percentage":45.5,"message":"half"}}"#
        );
        let message = parse("subscribed", &members).unwrap();
        assert_eq!((message.request_id(), message.seq()), (Some("r"), None));
        let ServerMessage::Subscribed(subscribed) = message else { panic!() };
        subscribed
    };
    let running = subscribed("RUNNING");
    assert_eq!((running.state, running.last_seq), (Some(RequestState::Running), 5));
    let progress = running.progress.unwrap();
    assert_eq!((progress.percentage, progress.message.as_str()), (Some(45.5), "half"));
    // A state of a newer server.
    assert_eq!(subscribed("PAUSED").state, None);
}

#[test]
fn unsubscribed_contains_only_the_request() {
    let message = parse("unsubscribed", r#""request_id":"r""#).unwrap();
    assert_eq!((message.request_id(), message.seq()), (Some("r"), None));
}

const REQUEST: &str = r#""request_id":"r","uid":"U","user_id":"ann","action":"work","state":"FAILED",
    "attempt":2,"last_seq":9,"priority":4,"cancel_requested":false,
    "create_time":"2026-11-24T04:05:00.007Z","redrive_of":"V",
    "progress":{"message":"","metadata":{"rows":3}}"#;

#[test]
fn a_request_contains_its_payload_and_outcome() {
    let members = format!(
        r#"{REQUEST},"payload":"/w==","content_type":"image/png","encoding":"base64",
           "metadata":{{"a": 1}},"error":{{"code":"PROCESSING_FAILED","message":"no",
           "retryable":false}},"output":{{"chunks":0,"sha256":"e3"}}"#
    );
    let message = parse("request", &members).unwrap();
    assert_eq!((message.request_id(), message.seq()), (Some("r"), None));
    let ServerMessage::Request(request) = message else { panic!() };
    assert_eq!((request.state, request.attempt), (Some(RequestState::Failed), 2));
    assert_eq!(request.create_time.unwrap(), "2026-11-24T04:05:00.007Z");
    assert_eq!((request.finish_time, request.redrive_of.as_deref()), (None, Some("V")));
    assert_eq!(request.payload.unwrap().get(), r#""/w==""#);
    assert_eq!(request.content_type.as_deref(), Some("image/png"));
    assert_eq!(request.metadata.unwrap().get(), r#"{"a": 1}"#);
    let progress = request.progress.unwrap();
    assert_eq!((progress.percentage, progress.metadata.unwrap().get()), (None, r#"{"rows":3}"#));
    assert_eq!(request.error.unwrap().error_code(), ErrorCode::ProcessingFailed);
    assert!(request.result.is_none());
}

#[test]
fn a_page_contains_requests_and_the_token_for_the_next_page() {
    let members = format!(r#""requests":[{{{REQUEST}}},{{{REQUEST}}}],"next_page_token":"t""#);
    let ServerMessage::Requests(page) = parse("requests", &members).unwrap() else { panic!() };
    assert_eq!((page.requests.len(), page.next_page_token.as_str()), (2, "t"));
    assert_eq!(page.requests[1].user_id, "ann");
}

#[test]
fn accepted_and_started_are_the_first_events() {
    let ServerMessage::Accepted(accepted) = event("accepted", r#""action":"work""#) else {
        panic!()
    };
    assert_eq!((accepted.action.as_str(), accepted.event.uid.as_str()), ("work", "U"));
    let ServerMessage::Started(started) = event("started", r#""worker":"w""#) else { panic!() };
    assert_eq!((started.worker.as_str(), started.event.attempt), ("w", 1));
}

#[test]
fn progress_may_lack_a_percentage() {
    let progress = |members: &str| {
        let ServerMessage::Progress(progress) = event("progress", members) else { panic!() };
        progress
    };
    let full = progress(
        r#""percentage":45.5,"message":"half \"done\"","metadata":{"rows":9223372036854775807}"#,
    );
    assert_eq!((full.percentage, full.message.as_str()), (Some(45.5), "half \"done\""));
    assert_eq!(full.metadata.unwrap().get(), r#"{"rows":9223372036854775807}"#);
    assert_eq!(progress(r#""message":"""#).percentage, None);
    // JSON cannot represent NaN.
    assert_eq!(progress(r#""percentage":null,"message":"""#).percentage, None);
}

#[test]
fn output_is_json_text_or_base64() {
    let output = |members: &str| {
        let members = format!(r#""chunk_index":3,"data":{members}"#);
        let ServerMessage::Output(output) = event("output", &members) else { panic!() };
        assert_eq!(output.chunk_index, 3);
        output
    };
    // The checksum covers the bytes of the JSON, including its spaces.
    assert_eq!(*output(r#"{"a": 1}"#).bytes().unwrap(), *br#"{"a": 1}"#);
    assert_eq!(*output("null").bytes().unwrap(), *b"null");
    assert_eq!(*output(r#""a""#).bytes().unwrap(), *br#""a""#);
    let text = output(r#""<p>\n","content_type":"text/html""#);
    assert_eq!(*text.bytes().unwrap(), *b"<p>\n");
    let binary = r#""/w==","content_type":"image/png","encoding":"base64""#;
    assert_eq!(*output(binary).bytes().unwrap(), [0xff]);
    let malformed = output(r#""?","content_type":"image/png","encoding":"base64""#);
    assert!(malformed.bytes().unwrap_err().to_string().contains("malformed output chunk"));
}

#[test]
fn retrying_contains_the_error_of_the_attempt() {
    let ServerMessage::Retrying(retrying) = event(
        "retrying",
        r#""retry_at":"2026-11-24T04:05:00.007Z","rewind_to_seq":2,
           "error":{"code":"TIMEOUT","message":"slow","retryable":true}"#,
    ) else {
        panic!()
    };
    assert_eq!(
        (retrying.retry_at.as_str(), retrying.rewind_to_seq),
        ("2026-11-24T04:05:00.007Z", 2)
    );
    assert_eq!(retrying.error.error_code(), ErrorCode::Timeout);
}

#[test]
fn complete_contains_the_result_as_sent() {
    let members = r#""success":true,"result": 1e3 ,"output":{"chunks":0,"sha256":"e3"}"#;
    let ServerMessage::Complete(complete) = event("complete", members) else { panic!() };
    assert_eq!((complete.result.get(), complete.output.unwrap().chunks), ("1e3", 0));
}

#[test]
fn an_error_is_an_event_if_it_has_a_seq() {
    let body = r#""error":{"code":"RATE_LIMITED","message":"no","retryable":true,
        "details":{"retry_after_ms":5}}"#;
    let members = format!(r#""rewind_to_seq":2,{body},"output":{{"chunks":1,"sha256":"ab"}}"#);
    let ServerMessage::Error(failed) = event("error", &members) else { panic!() };
    assert_eq!((failed.attempt, failed.rewind_to_seq), (Some(1), 2));
    assert_eq!(failed.output.unwrap().chunks, 1);
    // The error of a message that cannot be assigned to a request.
    let message = parse("error", body).unwrap();
    assert_eq!((message.request_id(), message.seq()), (None, None));
    let ServerMessage::Error(rejected) = message else { panic!() };
    let expected = RequestError {
        details: Some(r#"{"retry_after_ms":5}"#.into()),
        ..RequestError::new(ErrorCode::RateLimited, "no")
    };
    assert_eq!(RequestError::from(rejected.error), expected);
}

#[test]
fn an_error_code_of_a_newer_server_is_kept() {
    let body = r#""error":{"code":"TEAPOT","message":"no","retryable":false}"#;
    let ServerMessage::Error(message) = parse("error", body).unwrap() else { panic!() };
    assert_eq!(message.error.code, "TEAPOT");
    assert_eq!(RequestError::from(message.error).code, ErrorCode::InternalError);
}

#[test]
fn cancelled_is_an_event_or_the_outcome_of_a_call() {
    let ServerMessage::Cancelled(cancelled) =
        event("cancelled", r#""reason":"enough","output":{"chunks":1,"sha256":"ab"}"#)
    else {
        panic!()
    };
    assert_eq!((cancelled.reason.as_str(), cancelled.attempt), ("enough", Some(1)));
    let message = parse("cancelled", r#""request_id":"r","uid":"U","reason":"enough""#).unwrap();
    assert_eq!((message.request_id(), message.seq()), (Some("r"), None));
}

#[test]
fn pushed_data_is_kept_as_sent() {
    let members = r#""topic":"news","data":{"n":9223372036854775807}"#;
    let ServerMessage::Push(push) = parse("message", members).unwrap() else { panic!() };
    assert_eq!((push.topic.as_str(), push.data.get()), ("news", r#"{"n":9223372036854775807}"#));
}

#[test]
fn messages_about_the_connection_are_parsed() {
    let members = r#""expires_at":"2026-11-24T04:05:00.007Z""#;
    let ServerMessage::Authenticated(fresh) = parse("authenticated", members).unwrap() else {
        panic!()
    };
    assert_eq!(fresh.expires_at, "2026-11-24T04:05:00.007Z");
    let ServerMessage::AuthExpiring(expiring) = parse("auth_expiring", members).unwrap() else {
        panic!()
    };
    assert_eq!(expiring.expires_at, "2026-11-24T04:05:00.007Z");
    let draining = parse("draining", r#""reconnect_after_ms":1500"#).unwrap();
    let ServerMessage::Draining(draining) = draining else { panic!() };
    assert_eq!(draining.reconnect_after_ms, 1500);
    assert!(matches!(parse("pong", "").unwrap(), ServerMessage::Pong));
}

#[test]
fn types_and_members_of_newer_servers_are_accepted() {
    assert!(matches!(parse("pong", r#""load":0.5"#).unwrap(), ServerMessage::Pong));
    // Unknown members are not read, whatever they contain.
    let nested = "[".repeat(200) + &"]".repeat(200);
    event("started", &format!(r#""worker":"w","zone":{{"name":1e999}},"nested":{nested}"#));
    let ServerMessage::Unknown(unknown) = parse("maintenance", r#""at":5"#).unwrap() else {
        panic!()
    };
    assert_eq!(
        (unknown.kind.as_str(), unknown.request_id, unknown.seq),
        ("maintenance", None, None)
    );
    let unreadable = parse("maintenance", r#""seq":{"from":5},"request_id":[]"#).unwrap();
    assert!(matches!(unreadable, ServerMessage::Unknown(unknown) if unknown.seq.is_none()));
    // An event whose kind the gateway does not know either.
    assert!(matches!(event("unknown", r#""x":1"#), ServerMessage::Unknown(_)));
}

#[test]
fn an_error_names_the_type_and_the_member() {
    let event = r#""request_id":"r","uid":"U","attempt":1"#;
    for (kind, members, expected) in [
        ("progress", format!(r#"{event},"message":"""#), "progress: missing field `seq`"),
        ("progress", format!(r#"{event},"seq":5"#), "progress: missing field `message`"),
        ("output", format!(r#"{event},"seq":5,"chunk_index":0"#), "output: missing field `data`"),
        ("error", String::new(), "error: missing field `error`"),
        (
            "error",
            r#""error":{"message":"no","retryable":true}"#.to_owned(),
            "error: missing field `code`",
        ),
        ("subscribed", r#""request_id":"r""#.to_owned(), "subscribed: missing field `uid`"),
        ("requests", r#""requests":[]"#.to_owned(), "requests: missing field `next_page_token`"),
        (
            "draining",
            r#""reconnect_after_ms":"soon""#.to_owned(),
            "draining: invalid type: string \"soon\", expected u64",
        ),
    ] {
        let error = invalid(kind, &members);
        assert!(error.starts_with(expected) && error.contains(" in {\"type\":"), "{error}");
    }
    for (text, expected) in [
        ("{}", "missing field `type`"),
        (r#"{"type":"pong"}"#, "missing field `timestamp`"),
        ("[", "EOF while parsing"),
    ] {
        let error = ReceivedMessage::parse(text).unwrap_err().to_string();
        assert!(error.contains(expected) && error.ends_with(text), "{error}");
    }
}
