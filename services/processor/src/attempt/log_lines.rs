//! Log lines about attempts.

use std::time::Duration;

use streamer_core::{ErrorCode, validate};
use streamer_proto::common::v1::{Error, event::Kind};
use streamer_rpc::error_from_proto;
use streamer_store::RequestRecord;
use tracing::Span;

/// Returns the span of an attempt, whose fields are in all log lines about it.
pub(crate) fn attempt_span(record: &RequestRecord) -> Span {
    tracing::info_span!(
        "attempt",
        request_id = record.request_id(),
        uid = %record.uid,
        tenant_id = record.owner.tenant,
        action = record.action,
        attempt = record.attempt.as_u32(),
    )
}

/// Logs that an attempt failed or was cancelled, with the fields of the current span. `duration` is absent if the
/// attempt did not run on this processor.
pub(crate) fn log_end(kind: &Kind, duration: Option<Duration>) {
    match kind {
        Kind::Retrying(retrying) => {
            log(retrying.error.as_ref(), duration, "attempt failed; the request is retried");
        }
        Kind::Failed(failed) => log(failed.error.as_ref(), duration, "request failed"),
        Kind::Cancelled(_) => log(None, duration, "request cancelled"),
        Kind::Succeeded(_)
        | Kind::Accepted(_)
        | Kind::Started(_)
        | Kind::Progress(_)
        | Kind::Output(_) => {}
    }
}

fn log(error: Option<&Error>, duration: Option<Duration>, message: &'static str) {
    let code = error.map(|error| ErrorCode::as_str(error_from_proto(error).code));
    let duration_ms = duration.map(|duration| duration.as_secs_f64() * 1000.0);
    tracing::info!(code, duration_ms, "{message}");
    // The message is text of the handler, which may contain data of the payload.
    if let Some(error) = error {
        tracing::debug!(error = validate::logged_text(&error.message), "error of the attempt");
    }
}
