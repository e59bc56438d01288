//! Replies of calls.

use std::sync::Arc;

use bytes::Bytes;
use streamer_auth::Caller;
use streamer_core::{RequestError, Uid};
use streamer_proto::{common::v1::Event, router::v1::SubmitResponse};
use streamer_telemetry::TraceContext;
use tonic::Status;

use crate::{fanout::OpenedWatch, topic::Subscriber};

/// Result of a call.
pub(crate) enum Reply {
    /// A frame to send unchanged.
    Frame(Bytes),
    /// The outcome of a submission. The events of a stored request are delivered to the connection.
    Submitted {
        uid: Uid,
        outcome: Result<Box<SubmitResponse>, Status>,
        request_id: String,
        latest: bool,
        trace: Option<Box<TraceContext>>,
    },
    /// The outcome of opening a watch for a subscription.
    Opened { outcome: Result<Box<OpenedWatch>, Status>, request_id: String, latest: bool },
    /// The outcome of reading a page of a log.
    LogPage(Arc<Subscriber>, Result<Vec<Event>, Status>),
    /// The verified credentials of a new token.
    Authenticated(Caller),
    /// The error of a failed call.
    Failed { request_id: Option<String>, error: RequestError },
}
