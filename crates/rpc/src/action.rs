//! Conversion of action declarations to and from protobuf.

use std::time::Duration;

use streamer_core::{ActionSpec, ErrorCodes, RetryPolicy, Violations, saturate, validate};
use streamer_proto::common::v1::{Action, ErrorCode as ProtoCode};

use crate::proto_conversions::{code_from_proto, code_to_proto};

/// Maximum value of `max_attempts` and `max_concurrency`.
const MAX_COUNT: i64 = 1_000_000;
/// Maximum duration in a declaration, in milliseconds: a year.
const MAX_MILLIS: i64 = 366 * 24 * 3600 * 1000;
/// Maximum size of a description, in bytes.
const MAX_DESCRIPTION_BYTES: usize = 4096;
/// Maximum size of a payload schema, in bytes.
const MAX_SCHEMA_BYTES: usize = 256 * 1024;

/// Converts a declaration to protobuf; the action is sync if it is estimated to take less than
/// `threshold`.
#[must_use]
pub fn action_to_proto(spec: &ActionSpec, threshold: Duration) -> Action {
    let limit = |duration: Option<Duration>| duration.map_or(0, saturate::to_millis);
    Action {
        name: spec.name.clone(),
        description: spec.description.clone(),
        sync: spec.is_sync(threshold),
        estimated_duration_ms: saturate::to_millis(spec.estimated_duration),
        max_attempts: saturate::to_i32(spec.retry.max_attempts),
        start_to_close_ms: limit(spec.start_to_close),
        permission: spec.permission.clone().unwrap_or_default(),
        max_concurrency: saturate::to_i32(spec.max_concurrency.unwrap_or(0)),
        payload_schema: spec.payload_schema.clone().unwrap_or_default(),
        initial_backoff_ms: saturate::to_millis(spec.retry.initial_backoff),
        max_backoff_ms: saturate::to_millis(spec.retry.max_backoff),
        schedule_to_start_ms: limit(spec.schedule_to_start),
        schedule_to_close_ms: limit(spec.schedule_to_close),
        heartbeat_timeout_ms: limit(spec.heartbeat_timeout),
        final_errors: spec
            .retry
            .final_errors
            .iter()
            .map(|code| code_to_proto(code).into())
            .collect(),
        workers: 0,
        available: false,
    }
}

/// Converts a declaration from protobuf and adds every violation under `field`. Fields that are 0
/// or empty get their default value.
#[must_use]
pub fn action_from_proto(action: &Action, field: &str, violations: &mut Violations) -> ActionSpec {
    let mut check = |name: &str, outcome| violations.check(&format!("{field}.{name}"), outcome);
    check("name", validate::action_name(&action.name));
    let description = action.description.len();
    check("description", validate::at_most(description, MAX_DESCRIPTION_BYTES, "description"));
    let schema = action.payload_schema.len();
    check("payload_schema", validate::at_most(schema, MAX_SCHEMA_BYTES, "payload_schema"));
    let attempts = i64::from(action.max_attempts);
    check("max_attempts", validate::in_range(attempts, 0, MAX_COUNT, ""));
    let concurrency = i64::from(action.max_concurrency);
    check("max_concurrency", validate::in_range(concurrency, 0, MAX_COUNT, ""));
    for (name, value) in [
        ("estimated_duration_ms", action.estimated_duration_ms),
        ("start_to_close_ms", action.start_to_close_ms),
        ("schedule_to_start_ms", action.schedule_to_start_ms),
        ("schedule_to_close_ms", action.schedule_to_close_ms),
        ("heartbeat_timeout_ms", action.heartbeat_timeout_ms),
        ("initial_backoff_ms", action.initial_backoff_ms),
        ("max_backoff_ms", action.max_backoff_ms),
    ] {
        check(name, validate::in_range(value, 0, MAX_MILLIS, " ms"));
    }
    let defaults = ActionSpec::new(String::new());
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let time = |value: i64| positive(value).map(Duration::from_millis);
    let number = |value: i32| u32::try_from(value).ok().filter(|value| *value > 0);
    let text = |value: &String| (!value.is_empty()).then(|| value.clone());
    let final_errors =
        action.final_errors.iter().filter_map(|code| ProtoCode::try_from(*code).ok());
    ActionSpec {
        name: action.name.clone(),
        description: action.description.clone(),
        estimated_duration: match time(action.estimated_duration_ms) {
            None if action.sync => ActionSpec::sync(String::new()).estimated_duration,
            None => defaults.estimated_duration,
            Some(duration) => duration,
        },
        retry: RetryPolicy {
            max_attempts: number(action.max_attempts).unwrap_or(defaults.retry.max_attempts),
            initial_backoff: time(action.initial_backoff_ms)
                .unwrap_or(defaults.retry.initial_backoff),
            max_backoff: time(action.max_backoff_ms).unwrap_or(defaults.retry.max_backoff),
            final_errors: final_errors
                .fold(ErrorCodes::NONE, |all, code| all.with(code_from_proto(code))),
        },
        start_to_close: time(action.start_to_close_ms),
        schedule_to_start: time(action.schedule_to_start_ms),
        schedule_to_close: time(action.schedule_to_close_ms),
        heartbeat_timeout: time(action.heartbeat_timeout_ms),
        permission: text(&action.permission),
        max_concurrency: number(action.max_concurrency),
        payload_schema: text(&action.payload_schema),
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::ErrorCode;

    use super::*;

    #[test]
    fn a_declaration_round_trips() {
        let limit = Duration::from_millis(1234);
        let retry = RetryPolicy {
            max_attempts: 7,
            final_errors: ErrorCodes::NONE.with(ErrorCode::Timeout),
            ..RetryPolicy::default()
        };
        let spec = ActionSpec::new("report")
            .describe("Reports")
            .retry(retry)
            .start_to_close(limit)
            .schedule_to_start(limit * 2)
            .schedule_to_close(limit * 3)
            .heartbeat_timeout(limit * 4)
            .permission("reports:run")
            .max_concurrency(3)
            .payload_schema("{}");
        let mut violations = Violations::default();
        let message = action_to_proto(&spec, Duration::from_secs(5));
        assert_eq!(action_from_proto(&message, "actions[0]", &mut violations), spec);
        assert!(violations.is_empty(), "{violations}");
    }

    #[test]
    fn violations_name_their_fields() {
        let action = Action { name: "No".into(), heartbeat_timeout_ms: -1, ..Action::default() };
        let mut violations = Violations::default();
        drop(action_from_proto(&action, "actions[2]", &mut violations));
        let text = violations.to_string();
        assert!(
            text.contains("actions[2].name:") && text.contains("actions[2].heartbeat_timeout_ms:"),
            "{text}"
        );
    }
}
