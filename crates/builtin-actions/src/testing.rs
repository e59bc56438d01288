//! Helpers for tests of handlers.

use std::sync::Arc;

use serde_json::Value;
use streamer_core::{AttemptNumber, Limits, Timestamp, Uid};
use streamer_handler::{
    AttemptInfo, Context, DynHandler, HandlerError, Report, ReportQueue, RequestHistory,
};
use tokio_util::sync::CancellationToken;

/// Builder of a test context with more options than [`Context::for_test`].
#[derive(Default)]
pub(crate) struct TestContext {
    pub(crate) attempt: AttemptNumber,
    pub(crate) cancelled: bool,
    pub(crate) history: Option<Arc<dyn RequestHistory>>,
}

impl TestContext {
    pub(crate) fn build(self) -> (Context, Arc<ReportQueue>) {
        let reports = Arc::new(ReportQueue::default());
        let info = AttemptInfo {
            uid: Uid::new(Timestamp::default()),
            request_id: "test".into(),
            tenant: "test".into(),
            user: "test".into(),
            action: "test".into(),
            content_type: "application/json".into(),
            attempt: self.attempt.max(AttemptNumber::FIRST),
            checkpoint: None,
            trace_parent: None,
            trace_state: None,
            deadline: None,
        };
        let cancellation = CancellationToken::new();
        if self.cancelled {
            cancellation.cancel();
        }
        let context =
            Context::new(info, reports.clone(), cancellation, Limits::default(), self.history);
        (context, reports)
    }
}

/// Runs a handler as the server does, with JSON input and output.
pub(crate) async fn run(
    handler: &impl DynHandler,
    context: &Context,
    payload: &Value,
) -> Result<Value, HandlerError> {
    let result = handler.run(context, payload.to_string().into()).await?;
    Ok(serde_json::from_slice(&result).unwrap())
}

/// Reports of a handler by kind, each in order.
#[derive(Default)]
pub(crate) struct Reported {
    pub(crate) progress: Vec<(f64, String, Option<Value>)>,
    pub(crate) output: Vec<(String, String)>,
}

impl Reported {
    pub(crate) fn take(reports: &ReportQueue) -> Self {
        let mut reported = Self::default();
        for report in reports.take() {
            match report {
                Report::Progress { percentage, message, metadata } => {
                    let metadata = metadata.map(|json| serde_json::from_slice(&json).unwrap());
                    reported.progress.push((percentage.unwrap(), message, metadata));
                }
                Report::Output { content_type, data } => {
                    reported.output.push((content_type, String::from_utf8(data.to_vec()).unwrap()));
                }
                Report::Checkpoint(_) | Report::KeepAlive => {}
            }
        }
        reported
    }
}
