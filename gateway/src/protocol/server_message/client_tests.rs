//! The Rust client parses every message with all of its members.

use streamer_client::{ReceivedMessage, ServerMessage};
use streamer_core::ErrorCode;
use streamer_proto::{common::v1 as proto, timestamp};
use streamer_rpc::json_payload;

use super::*;

const NOW: Timestamp = Timestamp::from_millis(1500);

/// Parses a frame and checks its type.
fn parse(kind: &str, frame: &Bytes) -> ServerMessage {
    let begin = frame.iter().position(|byte| *byte == b'{').unwrap();
    let text = std::str::from_utf8(&frame[begin..]).unwrap();
    let received = ReceivedMessage::parse(text).unwrap();
    let is_known = !matches!(received.message, ServerMessage::Unknown(_));
    assert!(received.message.kind() == kind && is_known == (kind != "unknown"), "{text}");
    assert_eq!(received.timestamp, "1970-01-01T00:00:01.500Z");
    received.message
}

fn ids() -> RequestIds {
    RequestIds { request_id: "r".into(), uid: "U".into() }
}

fn sample_error() -> Option<Error> {
    Some(Error { code: 8, message: "slow".into(), retryable: true, ..Error::default() })
}

fn sample_output() -> Option<OutputSummary> {
    Some(OutputSummary { chunks: 2, sha256: vec![0xab; 32].into() })
}

fn sample_progress() -> Progress {
    let metadata = Some(json_payload(r#"{"rows":3}"#));
    Progress { percentage: Some(45.5), message: "half".into(), metadata }
}

fn sample_position() -> Option<QueuePosition> {
    let estimated_start_time = Some(timestamp(1500));
    Some(QueuePosition { earliest: 1, latest: 3, estimated_start_time })
}

/// Returns a request with all members.
fn sample_request() -> Request {
    let body = Some(Body::Data(Bytes::from_static(b"\xff")));
    Request {
        uid: "U".into(),
        request_id: "r".into(),
        tenant_id: "acme".into(),
        user_id: "ann".into(),
        action: "work".into(),
        state: RequestState::Failed.into(),
        attempt: 2,
        last_seq: 9,
        create_time: Some(timestamp(1500)),
        start_time: Some(timestamp(1500)),
        finish_time: Some(timestamp(1500)),
        not_before: Some(timestamp(1500)),
        deadline: Some(timestamp(1500)),
        close_by: Some(timestamp(1500)),
        priority: 4,
        progress: Some(sample_progress()),
        metadata: Some(json_payload(r#"{"a":1}"#)),
        cancel_requested: true,
        payload: Some(Payload { content_type: "image/png".into(), body }),
        result: Some(json_payload("1e3")),
        error: sample_error(),
        output: sample_output(),
        redrive_of: "V".into(),
        queue_position: sample_position(),
    }
}

#[test]
fn events_are_parsed() {
    let output = |content_type: &str, data: &'static [u8]| {
        let body = Some(Body::Data(Bytes::from_static(data)));
        let data = Some(Payload { content_type: content_type.into(), body });
        Kind::Output(proto::Output { data, chunk_index: 0 })
    };
    let error = sample_error();
    for (kind, event_kind) in [
        ("accepted", Some(Kind::Accepted(proto::Accepted { action: "work".into() }))),
        ("started", Some(Kind::Started(proto::Started { worker: "w".into() }))),
        ("progress", Some(Kind::Progress(sample_progress()))),
        ("progress", Some(Kind::Progress(Progress::default()))),
        ("output", Some(output(JSON, b"{\"a\": 1}"))),
        ("output", Some(output("text/html", b"<p>"))),
        ("output", Some(output("image/png", b"\xff"))),
        (
            "retrying",
            Some(Kind::Retrying(proto::Retrying {
                retry_at: Some(timestamp(1500)),
                rewind_to_seq: 2,
                error: error.clone(),
                released: true,
            })),
        ),
        (
            "complete",
            Some(Kind::Succeeded(proto::Succeeded {
                result: Some(json_payload("7")),
                output: sample_output(),
            })),
        ),
        ("complete", Some(Kind::Succeeded(proto::Succeeded::default()))),
        (
            "error",
            Some(Kind::Failed(proto::Failed { error, rewind_to_seq: 2, output: sample_output() })),
        ),
        (
            "cancelled",
            Some(Kind::Cancelled(proto::Cancelled {
                reason: "enough".into(),
                output: sample_output(),
            })),
        ),
        ("unknown", None),
    ] {
        let time = Some(timestamp(1500));
        let message =
            parse(kind, &event(&Event { seq: 5, attempt: 1, time, kind: event_kind }, &ids()));
        assert_eq!((message.request_id(), message.seq()), (Some("r"), Some(5)), "{kind}");
        if let ServerMessage::Output(output) = message {
            let bytes = output.bytes().unwrap();
            assert!([&b"{\"a\": 1}"[..], b"<p>", b"\xff"].contains(&&*bytes), "{bytes:?}");
        }
    }
}

#[test]
fn outcomes_of_calls_are_parsed() {
    let outcome = |state: RequestState, seq: i64| {
        let failed = state != RequestState::Succeeded;
        completed(
            &ids(),
            &Completed {
                state: state.into(),
                result: (!failed).then(|| json_payload("7")),
                error: sample_error().filter(|_| failed),
                output: sample_output().filter(|_| seq > 0),
                seq,
                duplicate: false,
            },
            NOW,
        )
    };
    for (kind, state) in [
        ("response", RequestState::Succeeded),
        ("error", RequestState::Failed),
        ("cancelled", RequestState::Cancelled),
    ] {
        assert_eq!(parse(kind, &outcome(state, 0)).seq(), None);
        assert_eq!(parse(kind, &outcome(state, 7)).seq(), Some(7));
    }
    let failure = RequestError::limited("gateway.rate_limit", "too many", None);
    let ServerMessage::Error(message) = parse("error", &error(None, &failure, NOW)) else {
        panic!()
    };
    assert_eq!(RequestError::from(message.error), failure);
    let unavailable = RequestError::new(ErrorCode::Unavailable, "no");
    assert_eq!(parse("error", &error(Some("r"), &unavailable, NOW)).request_id(), Some("r"));
}

#[test]
fn replies_are_parsed() {
    let position = sample_position();
    let content = Acknowledgment {
        status: "queued",
        message: "accepted for execution",
        duplicate: false,
        last_seq: 1,
        queue_position: position.as_ref(),
        trace_id: Some("ab".into()),
    };
    let ServerMessage::Acknowledgment(parsed) =
        parse("acknowledgment", &acknowledgment(&ids(), &content, NOW))
    else {
        panic!()
    };
    assert_eq!(parsed.status, Some(streamer_core::RequestState::Queued));
    assert_eq!(parsed.queue_position.unwrap().latest, 3);
    let sample = sample_request();
    let ServerMessage::Subscribed(parsed) = parse("subscribed", &subscribed(&sample, NOW)) else {
        panic!()
    };
    assert_eq!(parsed.state, Some(streamer_core::RequestState::Failed));
    let ServerMessage::Request(parsed) = parse("request", &request(&sample, NOW)) else { panic!() };
    assert_eq!(parsed.payload.unwrap().get(), r#""/w==""#);
    assert_eq!((parsed.result.unwrap().get(), parsed.close_by.is_some()), ("1e3", true));
    let minimal = Request::default();
    let ServerMessage::Request(parsed) = parse("request", &request(&minimal, NOW)) else {
        panic!()
    };
    assert_eq!(parsed.state, None);
    let page = requests(&[sample, minimal], "t", NOW);
    let ServerMessage::Requests(parsed) = parse("requests", &page) else { panic!() };
    assert_eq!((parsed.requests.len(), parsed.next_page_token.as_str()), (2, "t"));
    assert_eq!(parse("unsubscribed", &unsubscribed("r", NOW)).request_id(), Some("r"));
}

#[test]
fn messages_about_the_connection_are_parsed() {
    let content = Connected {
        connection_id: "C",
        user_id: "ann",
        tenant_id: "acme",
        heartbeat_ms: 25_000,
        max_message_bytes: 1_049_600,
        expires_at: NOW,
    };
    let ServerMessage::Connected(parsed) = parse("connected", &connected(&content, NOW)) else {
        panic!()
    };
    assert_eq!((parsed.heartbeat_ms, parsed.max_message_bytes), (25_000, 1_049_600));
    parse("authenticated", &authenticated(NOW, NOW));
    parse("auth_expiring", &auth_expiring(NOW, NOW));
    parse("draining", &draining(1500, NOW));
    parse("pong", &pong(NOW));
    parse("message", &push("news", Some(&json_payload("1")), NOW));
    parse("message", &push("news", None, NOW));
}
