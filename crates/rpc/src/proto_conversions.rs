//! Conversion of domain types and store records to and from protobuf.

use streamer_core::{ErrorCode, RequestError, RequestState, Timestamp};
use streamer_proto::{common::v1 as proto, router::v1::Completed, timestamp};
use streamer_store::RequestRecord;

use crate::payload::{json_payload, payload_bytes};

/// Converts a state to protobuf.
#[must_use]
pub fn state_to_proto(state: RequestState) -> proto::RequestState {
    match state {
        RequestState::Queued => proto::RequestState::Queued,
        RequestState::Running => proto::RequestState::Running,
        RequestState::Succeeded => proto::RequestState::Succeeded,
        RequestState::Failed => proto::RequestState::Failed,
        RequestState::Cancelled => proto::RequestState::Cancelled,
    }
}

/// Converts a state from protobuf; `None` if it is unspecified or unknown.
#[must_use]
pub fn state_from_proto(state: i32) -> Option<RequestState> {
    match proto::RequestState::try_from(state).ok()? {
        proto::RequestState::Unspecified => None,
        proto::RequestState::Queued => Some(RequestState::Queued),
        proto::RequestState::Running => Some(RequestState::Running),
        proto::RequestState::Succeeded => Some(RequestState::Succeeded),
        proto::RequestState::Failed => Some(RequestState::Failed),
        proto::RequestState::Cancelled => Some(RequestState::Cancelled),
    }
}

/// Converts an error to protobuf.
#[must_use]
pub fn error_to_proto(error: &RequestError) -> proto::Error {
    proto::Error {
        code: code_to_proto(error.code).into(),
        message: error.message.clone(),
        retryable: error.retryable,
        details: error.details.clone().map(json_payload),
    }
}

/// Converts an error from protobuf.
#[must_use]
pub fn error_from_proto(error: &proto::Error) -> RequestError {
    let details = error
        .details
        .as_ref()
        .map(|details| String::from_utf8_lossy(&payload_bytes(Some(details))).into_owned());
    RequestError {
        code: code_from_proto(error.code()),
        message: error.message.clone(),
        retryable: error.retryable,
        details,
    }
}

/// Converts a record to protobuf, without payload and result.
#[must_use]
pub fn request_to_proto(record: &RequestRecord) -> proto::Request {
    let time = |moment: Timestamp| timestamp(moment.as_millis());
    let error = match (&record.error, record.state, &record.cancel_reason) {
        (Some(error), ..) => Some(error.clone()),
        (None, RequestState::Cancelled, reason) => {
            let reason = reason.clone().unwrap_or_default();
            Some(error_to_proto(&RequestError::new(ErrorCode::Cancelled, reason)))
        }
        _ => None,
    };
    proto::Request {
        uid: record.uid.to_string(),
        request_id: record.request_id(),
        tenant_id: record.owner.tenant.clone(),
        user_id: record.owner.user.clone(),
        action: record.action.clone(),
        state: state_to_proto(record.state).into(),
        attempt: record.attempt.as_i32(),
        last_seq: record.last_seq.as_i64(),
        create_time: Some(time(record.create_time)),
        start_time: record.start_time.map(time),
        finish_time: record.finish_time.map(time),
        not_before: (record.not_before > record.create_time).then(|| time(record.not_before)),
        deadline: record.deadline.map(time),
        priority: record.priority,
        progress: record.progress.clone(),
        metadata: record.metadata.clone().map(json_payload),
        cancel_requested: record.cancel_reason.is_some() && !record.state.is_terminal(),
        payload: None,
        result: None,
        error,
        output: record.output.clone(),
        redrive_of: record.redrive_of.map(|uid| uid.to_string()).unwrap_or_default(),
        close_by: record.close_by.map(time),
        queue_position: None,
    }
}

/// Returns the outcome that a terminal event contains; `None` for any other event.
#[must_use]
pub fn completed(event: proto::Event) -> Option<Completed> {
    use proto::event::Kind;
    let mut completed = Completed { seq: event.seq, ..Completed::default() };
    match event.kind? {
        Kind::Succeeded(succeeded) => {
            completed.set_state(proto::RequestState::Succeeded);
            completed.result = succeeded.result;
            completed.output = succeeded.output;
        }
        Kind::Failed(failed) => {
            completed.set_state(proto::RequestState::Failed);
            completed.error = failed.error;
            completed.output = failed.output;
        }
        Kind::Cancelled(cancelled) => {
            let error = RequestError::new(ErrorCode::Cancelled, cancelled.reason);
            completed.set_state(proto::RequestState::Cancelled);
            completed.error = Some(error_to_proto(&error));
            completed.output = cancelled.output;
        }
        Kind::Accepted(_)
        | Kind::Started(_)
        | Kind::Progress(_)
        | Kind::Output(_)
        | Kind::Retrying(_) => return None,
    }
    Some(completed)
}

pub(crate) fn code_to_proto(code: ErrorCode) -> proto::ErrorCode {
    match code {
        ErrorCode::ValidationError => proto::ErrorCode::ValidationError,
        ErrorCode::InvalidAction => proto::ErrorCode::InvalidAction,
        ErrorCode::Unauthorized => proto::ErrorCode::Unauthorized,
        ErrorCode::Forbidden => proto::ErrorCode::Forbidden,
        ErrorCode::NotFound => proto::ErrorCode::NotFound,
        ErrorCode::Conflict => proto::ErrorCode::Conflict,
        ErrorCode::RateLimited => proto::ErrorCode::RateLimited,
        ErrorCode::Timeout => proto::ErrorCode::Timeout,
        ErrorCode::Cancelled => proto::ErrorCode::Cancelled,
        ErrorCode::ProcessingFailed => proto::ErrorCode::ProcessingFailed,
        ErrorCode::Unavailable => proto::ErrorCode::Unavailable,
        ErrorCode::InternalError => proto::ErrorCode::InternalError,
    }
}

pub(crate) fn code_from_proto(code: proto::ErrorCode) -> ErrorCode {
    match code {
        proto::ErrorCode::ValidationError => ErrorCode::ValidationError,
        proto::ErrorCode::InvalidAction => ErrorCode::InvalidAction,
        proto::ErrorCode::Unauthorized => ErrorCode::Unauthorized,
        proto::ErrorCode::Forbidden => ErrorCode::Forbidden,
        proto::ErrorCode::NotFound => ErrorCode::NotFound,
        proto::ErrorCode::Conflict => ErrorCode::Conflict,
        proto::ErrorCode::RateLimited => ErrorCode::RateLimited,
        proto::ErrorCode::Timeout => ErrorCode::Timeout,
        proto::ErrorCode::Cancelled => ErrorCode::Cancelled,
        proto::ErrorCode::ProcessingFailed => ErrorCode::ProcessingFailed,
        proto::ErrorCode::Unavailable => ErrorCode::Unavailable,
        proto::ErrorCode::Unspecified | proto::ErrorCode::InternalError => ErrorCode::InternalError,
    }
}

/// Applies the next event of a request's log to the request.
pub fn apply_event(request: &mut proto::Request, event: &proto::Event) {
    use proto::event::Kind;
    if event.seq <= request.last_seq {
        return;
    }
    request.last_seq = event.seq;
    request.attempt = event.attempt;
    let finish = |request: &mut proto::Request, state: RequestState| {
        request.state = state_to_proto(state).into();
        request.finish_time = event.time;
        request.cancel_requested = false;
    };
    match &event.kind {
        Some(Kind::Accepted(_)) => request.state = state_to_proto(RequestState::Queued).into(),
        Some(Kind::Started(_)) => {
            request.state = state_to_proto(RequestState::Running).into();
            request.start_time = event.time;
            request.progress = None;
        }
        Some(Kind::Progress(progress)) => request.progress = Some(progress.clone()),
        Some(Kind::Output(_)) | None => {}
        Some(Kind::Retrying(retrying)) => {
            request.state = state_to_proto(RequestState::Queued).into();
            request.not_before = retrying.retry_at;
            request.progress = None;
        }
        Some(Kind::Succeeded(succeeded)) => {
            finish(request, RequestState::Succeeded);
            request.output = succeeded.output.clone();
        }
        Some(Kind::Failed(failed)) => {
            finish(request, RequestState::Failed);
            request.output = failed.output.clone();
            request.error = failed.error.clone();
        }
        Some(Kind::Cancelled(cancelled)) => {
            finish(request, RequestState::Cancelled);
            request.output = cancelled.output.clone();
            let error = RequestError::new(ErrorCode::Cancelled, cancelled.reason.clone());
            request.error = Some(error_to_proto(&error));
        }
    }
}

/// Returns whether the event is terminal.
#[must_use]
pub fn is_terminal(event: &proto::Event) -> bool {
    use proto::event::Kind;
    matches!(event.kind, Some(Kind::Succeeded(_) | Kind::Failed(_) | Kind::Cancelled(_)))
}
