//! Validation of submissions.

use std::ops::RangeInclusive;

use bytes::Bytes;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use streamer_core::{Limits, Timestamp, Uid, Violations, limits, validate};
use streamer_proto::{millis, router::v1::SubmitRequest};
use streamer_rpc::{JSON, compact_received, payload_into_parts};
use streamer_store::StoredPayload;

/// Parsed submission, before the checks that depend on its action.
pub(crate) struct Submission {
    pub(crate) client_id: Option<String>,
    pub(crate) action: String,
    pub(crate) payload: StoredPayload,
    pub(crate) metadata: Option<Bytes>,
    pub(crate) wait_ms: i64,
    pub(crate) priority: i32,
    pub(crate) delay_ms: i64,
    pub(crate) deadline: Option<Timestamp>,
    /// UID of the request, assigned by the calling service or by this router.
    pub(crate) uid: Uid,
    /// The submission that this one must follow. Boxed, because most have none.
    pub(crate) after: Option<Box<Uid>>,
}

/// Parses a submission and adds every violation to `violations`.
pub(crate) fn parse(
    request: SubmitRequest,
    uid: Uid,
    server_limits: &Limits,
    now: Timestamp,
    violations: &mut Violations,
) -> Submission {
    let client_id = (!request.id.is_empty()).then_some(request.id);
    if let Some(id) = &client_id {
        violations.check("id", validate::request_id(id));
    }
    violations.check("action", validate::action_name(&request.action));

    // The payload and the metadata outlive the message that contained them.
    let max_message_bytes = server_limits.max_message_bytes();
    let (content_type, data) = payload_into_parts(request.payload);
    let data = compact_received(data, max_message_bytes);
    let content_type_limit = limits::MAX_CONTENT_TYPE_BYTES;
    violations.check(
        "payload.content_type",
        validate::at_most(content_type.len(), content_type_limit, "content type"),
    );
    let payload_limit = server_limits.max_payload_bytes;
    violations.check(
        "payload",
        validate::at_most(data.len(), payload_limit, server_limits.payload_option),
    );
    if content_type == JSON {
        violations.check("payload", well_formed_json(&data).map(drop));
    }

    let metadata = request.metadata.map(|metadata| payload_into_parts(Some(metadata)).1);
    let metadata = metadata.map(|metadata| compact_received(metadata, max_message_bytes));
    if let Some(metadata) = &metadata {
        violations.check("metadata", check_metadata(metadata));
    }
    let wait_ms = request.wait.map_or(0, |wait| duration_ms(&wait));
    violations.check("wait", validate::in_range(wait_ms, 0, limits::MAX_WAIT_MS, " ms"));
    let delay_ms = request.delay.map_or(0, |delay| duration_ms(&delay));
    violations.check("delay", validate::in_range(delay_ms, 0, limits::MAX_DELAY_MS, " ms"));
    let highest = i64::from(limits::MAX_PRIORITY);
    violations.check("priority", validate::in_range(request.priority.into(), 0, highest, ""));
    if let Some(deadline) = &request.deadline {
        violations.check("deadline", well_formed_time(deadline));
    }
    let deadline = request.deadline.map(|deadline| Timestamp::from_millis(millis(&deadline)));
    if deadline.is_some_and(|deadline| deadline <= now) {
        violations.push("deadline", format!("must be in the future, the current time is {now}"));
    }
    Submission {
        client_id,
        action: request.action,
        payload: StoredPayload { content_type, data },
        metadata,
        wait_ms,
        priority: request.priority,
        delay_ms,
        deadline,
        uid,
        after: None,
    }
}

/// Returns the hash of an action and payload, which must be equal in all submissions with the same `client_id`.
pub(crate) fn fingerprint(action: &str, payload: &StoredPayload) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in [action.as_bytes(), payload.content_type.as_bytes(), &payload.data[..]] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Validates JSON of any nesting depth without building a value.
fn well_formed_json(data: &[u8]) -> Result<&RawValue, String> {
    serde_json::from_slice(data).map_err(|error| format!("is not JSON: {error}"))
}

fn check_metadata(metadata: &[u8]) -> Result<(), String> {
    validate::at_most(metadata.len(), limits::MAX_METADATA_BYTES, "metadata")?;
    if well_formed_json(metadata)?.get().starts_with('{') {
        Ok(())
    } else {
        Err("must be a JSON object".into())
    }
}

/// Checks that a time is within the range of `google.protobuf.Timestamp`.
pub(crate) fn well_formed_time(time: &prost_types::Timestamp) -> Result<(), String> {
    const YEARS_1_TO_9999: RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;
    if YEARS_1_TO_9999.contains(&time.seconds) && (0..1_000_000_000).contains(&time.nanos) {
        Ok(())
    } else {
        Err("must be in the years 1 to 9999, with 0 to 999999999 nanoseconds".into())
    }
}

fn duration_ms(duration: &prost_types::Duration) -> i64 {
    let millis = i64::from(duration.nanos) / 1_000_000;
    duration.seconds.saturating_mul(1000).saturating_add(millis)
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use streamer_rpc::json_payload;

    use super::*;

    fn violations_of(request: SubmitRequest) -> String {
        let mut violations = Violations::default();
        let limits = Limits { max_payload_bytes: 10, ..Limits::default() };
        let now = Timestamp::from_millis(0);
        parse(request, Uid::new(now), &limits, now, &mut violations);
        violations.to_string()
    }

    #[test]
    fn a_submission_does_not_retain_the_message_that_contained_it() {
        let request = SubmitRequest {
            action: "echo".into(),
            payload: Some(json_payload("{\"a\":1}")),
            metadata: Some(json_payload("{\"b\":2}")),
            ..SubmitRequest::default()
        };
        let mut message = request.encode_to_vec();
        // A field that no receiver knows: number 1000 with a million bytes.
        prost::encoding::bytes::encode(1000, &vec![0_u8; 1_000_000], &mut message);
        let message = Bytes::from(message);
        let request = SubmitRequest::decode(message.clone()).unwrap();
        let mut violations = Violations::default();
        let now = Timestamp::from_millis(0);
        let submission = parse(request, Uid::new(now), &Limits::default(), now, &mut violations);
        let is_within = |bytes: &Bytes| message.as_ptr_range().contains(&bytes.as_ptr());
        assert_eq!(
            (violations.to_string(), &*submission.payload.data),
            (String::new(), &b"{\"a\":1}"[..])
        );
        assert!(!is_within(&submission.payload.data));
        assert!(!is_within(&submission.metadata.unwrap()));
    }

    #[test]
    fn all_violations_are_reported_together() {
        let violations = violations_of(SubmitRequest {
            id: "a b".into(),
            action: "Nope".into(),
            payload: Some(json_payload("[1,2,3,4,5,6")),
            metadata: Some(json_payload("[]")),
            priority: 10,
            wait: Some(prost_types::Duration { seconds: 301, nanos: 0 }),
            delay: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
            deadline: Some(prost_types::Timestamp { seconds: -5, nanos: 0 }),
            ..SubmitRequest::default()
        });
        for field in [
            "id:",
            "action:",
            "payload: must be at most 10",
            "payload: is not JSON",
            "metadata:",
            "priority:",
            "wait:",
            "delay:",
            "deadline:",
        ] {
            assert!(violations.contains(field), "{field} is missing in {violations}");
        }
    }

    #[test]
    fn times_outside_the_protobuf_range_are_rejected() {
        let deadline = |seconds, nanos| SubmitRequest {
            action: "echo".into(),
            deadline: Some(prost_types::Timestamp { seconds, nanos }),
            ..SubmitRequest::default()
        };
        assert_eq!(violations_of(deadline(253_402_300_799, 999_999_999)), "");
        for (seconds, nanos) in
            [(253_402_300_800, 0), (i64::MAX, 0), (1_000, -1), (1_000, i32::MAX)]
        {
            let violations = violations_of(deadline(seconds, nanos));
            assert!(
                violations.contains("deadline: must be in the years 1 to 9999"),
                "{violations}"
            );
        }
    }

    #[test]
    fn a_minimal_submission_is_valid() {
        let request = SubmitRequest { action: "echo".into(), ..SubmitRequest::default() };
        assert_eq!(violations_of(request), "");
    }

    #[test]
    fn fingerprints_differ_by_action_and_payload() {
        let payload = |data: &'static str| StoredPayload {
            content_type: JSON.into(),
            data: Bytes::from_static(data.as_bytes()),
        };
        assert_eq!(fingerprint("a", &payload("1")), fingerprint("a", &payload("1")));
        assert_ne!(fingerprint("a", &payload("1")), fingerprint("b", &payload("1")));
        assert_ne!(fingerprint("a", &payload("1")), fingerprint("a", &payload("2")));
    }
}
