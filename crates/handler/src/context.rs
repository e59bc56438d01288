//! Context of a running handler.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use streamer_core::{AttemptNumber, Limits, RequestState, Timestamp, TraceParent, Uid, limits};
use tokio_util::sync::CancellationToken;

use crate::{HandlerError, Report, ReportQueue};

/// Size above which the spare capacity of a buffer is released, in bytes.
const SHRINK_THRESHOLD_BYTES: usize = 4096;

/// Identifies an attempt and describes its request.
#[derive(Clone, Debug)]
pub struct AttemptInfo {
    /// ID that the server assigned to the request.
    pub uid: Uid,
    /// ID that the client specified for the request.
    pub request_id: String,
    /// Tenant that owns the request.
    pub tenant: String,
    /// User who owns the request.
    pub user: String,
    /// Name of the action.
    pub action: String,
    /// IANA media type of the payload.
    pub content_type: String,
    /// Number of the attempt, starting at 1.
    pub attempt: AttemptNumber,
    /// Checkpoint that an earlier attempt saved, if any.
    pub checkpoint: Option<Bytes>,
    /// W3C `traceparent` of the attempt, for calls that the handler makes.
    pub trace_parent: Option<TraceParent>,
    /// W3C `tracestate` that belongs to `trace_parent`.
    pub trace_state: Option<String>,
    /// Time at which the attempt is aborted if it has not finished; `None` for no time limit.
    pub deadline: Option<Timestamp>,
}

/// Summary of a request, for handlers that report on requests.
#[derive(Clone, Debug)]
pub struct RequestSummary {
    /// ID that the server assigned to the request.
    pub uid: Uid,
    /// Name of the action.
    pub action: String,
    /// Current state.
    pub state: RequestState,
    /// Number of attempts so far.
    pub attempts: u32,
    /// Time at which the request was accepted.
    pub create_time: Timestamp,
    /// Time at which its latest attempt started.
    pub start_time: Option<Timestamp>,
    /// Time at which the request finished.
    pub finish_time: Option<Timestamp>,
}

/// Provides the requests that [`Context::requests`] returns.
#[async_trait]
pub trait RequestHistory: Send + Sync {
    /// Returns up to `limit` requests of the given user that were accepted in `from..until`, newest first.
    async fn requests(
        &self,
        tenant: &str,
        user: &str,
        from: Timestamp,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestSummary>, HandlerError>;
}

/// Context of an attempt, which is passed to its handler.
pub struct Context {
    info: AttemptInfo,
    reports: Arc<ReportQueue>,
    cancellation: CancellationToken,
    limits: Limits,
    history: Option<Arc<dyn RequestHistory>>,
}

impl Context {
    /// Creates a context; called by the processor and by workers.
    #[must_use]
    pub fn new(
        info: AttemptInfo,
        reports: Arc<ReportQueue>,
        cancellation: CancellationToken,
        limits: Limits,
        history: Option<Arc<dyn RequestHistory>>,
    ) -> Self {
        Self { info, reports, cancellation, limits, history }
    }

    /// Creates a context for testing a handler without a server. The reports of the handler are in the returned queue.
    #[must_use]
    pub fn for_test(action: &str) -> (Self, Arc<ReportQueue>) {
        let reports = Arc::new(ReportQueue::default());
        let info = AttemptInfo {
            uid: Uid::new(Timestamp::default()),
            request_id: "test".into(),
            tenant: "test".into(),
            user: "test".into(),
            action: action.into(),
            content_type: "application/json".into(),
            attempt: AttemptNumber::FIRST,
            checkpoint: None,
            trace_parent: None,
            trace_state: None,
            deadline: None,
        };
        let token = CancellationToken::new();
        (Self::new(info, reports.clone(), token, Limits::default(), None), reports)
    }

    /// Returns the ID that the server assigned to the request.
    #[must_use]
    pub fn uid(&self) -> Uid {
        self.info.uid
    }

    /// Returns the ID that the client specified for the request.
    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.info.request_id
    }

    /// Returns the tenant that owns the request.
    #[must_use]
    pub fn tenant(&self) -> &str {
        &self.info.tenant
    }

    /// Returns the user who owns the request.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.info.user
    }

    /// Returns the IANA media type of the payload.
    #[must_use]
    pub fn content_type(&self) -> &str {
        &self.info.content_type
    }

    /// Returns the number of the attempt, starting at 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.info.attempt.as_u32()
    }

    /// Returns the time at which the attempt is aborted if it has not finished; `None` for no time limit.
    #[must_use]
    pub fn deadline(&self) -> Option<Timestamp> {
        self.info.deadline
    }

    /// Returns the W3C `traceparent` to send with calls that the handler makes, so that they are part of the trace.
    /// Returns `None` if the request has no `traceparent` and is not traced in this process. While the handler runs,
    /// the `tracing` span and the OpenTelemetry context are also current.
    #[must_use]
    pub fn trace_parent(&self) -> Option<String> {
        self.info.trace_parent.map(TraceParent::to_text)
    }

    /// Returns the W3C `tracestate` that belongs to [`Self::trace_parent`].
    #[must_use]
    pub fn trace_state(&self) -> Option<&str> {
        self.info.trace_state.as_deref()
    }

    /// Reports progress, from 0 to 100 percent, with a message of at most 4,096 bytes. Watchers receive the report
    /// after it is durable. This call returns earlier, unless many reports are pending.
    ///
    /// # Errors
    /// Returns an error if a value is out of range, or if the attempt no longer belongs to this handler.
    pub async fn progress(
        &self,
        percentage: f64,
        message: impl Into<String>,
    ) -> Result<(), HandlerError> {
        self.push_progress(Some(percentage), message.into(), None).await
    }

    /// Like [`Self::progress`], with metadata (at most 64 KiB as JSON).
    ///
    /// # Errors
    /// Returns the same errors as [`Self::progress`].
    pub async fn progress_with(
        &self,
        percentage: f64,
        message: impl Into<String>,
        metadata: &impl Serialize,
    ) -> Result<(), HandlerError> {
        let metadata = serde_json::to_vec(metadata)?;
        self.push_progress(Some(percentage), message.into(), Some(metadata.into())).await
    }

    /// Like [`Self::progress_with`], with the metadata as JSON text, and with `None` for an unknown percentage.
    ///
    /// # Errors
    /// Returns the same errors as [`Self::progress`], and an error if the metadata is not JSON.
    pub async fn report_progress(
        &self,
        percentage: Option<f64>,
        message: String,
        metadata: Option<Bytes>,
    ) -> Result<(), HandlerError> {
        if let Some(metadata) = &metadata {
            check_json("progress.metadata", metadata)?;
        }
        self.push_progress(percentage, message, metadata).await
    }

    async fn push_progress(
        &self,
        percentage: Option<f64>,
        message: String,
        metadata: Option<Bytes>,
    ) -> Result<(), HandlerError> {
        if let Some(percentage) = percentage
            && !(0.0..=100.0).contains(&percentage)
        {
            return Err(HandlerError::fatal(format!(
                "progress.percentage must be 0 to 100, is {percentage}"
            )));
        }
        check_size("progress.message", message.len(), limits::MAX_PROGRESS_MESSAGE_BYTES)?;
        let metadata_bytes = metadata.as_ref().map_or(0, Bytes::len);
        check_size("progress.metadata", metadata_bytes, limits::MAX_PROGRESS_METADATA_BYTES)?;
        self.reports.push(Report::Progress { percentage, message, metadata }).await
    }

    /// Reports that the handler is alive when it has nothing else to report. Use it for actions that declare a
    /// heartbeat timeout.
    ///
    /// # Errors
    /// Returns an error if the attempt no longer belongs to this handler.
    pub async fn heartbeat(&self) -> Result<(), HandlerError> {
        self.reports.push(Report::KeepAlive).await
    }

    /// Outputs the next chunk of the result, as JSON.
    ///
    /// # Errors
    /// Returns an error if the chunk is larger than `limits.max_output_chunk_bytes`, or if the attempt no longer
    /// belongs to this handler.
    pub async fn output(&self, chunk: &impl Serialize) -> Result<(), HandlerError> {
        self.push_output("application/json", to_json(chunk)?).await
    }

    /// Outputs the next chunk of the result, as bytes with the media type `content_type` (at most 255 bytes).
    ///
    /// # Errors
    /// Returns the same errors as [`Self::output`], and an error if the media type is JSON and the chunk is not.
    pub async fn output_bytes(
        &self,
        content_type: &str,
        chunk: impl Into<Bytes>,
    ) -> Result<(), HandlerError> {
        let data = chunk.into();
        check_size("output.content_type", content_type.len(), limits::MAX_CONTENT_TYPE_BYTES)?;
        if content_type == "application/json" {
            check_json("output", &data)?;
        }
        self.push_output(content_type, data).await
    }

    async fn push_output(&self, content_type: &str, data: Bytes) -> Result<(), HandlerError> {
        check_size("output chunk", data.len(), self.limits.max_output_chunk_bytes)?;
        self.reports.push(Report::Output { content_type: content_type.to_owned(), data }).await
    }

    /// Saves a checkpoint from which the next attempt can continue (at most 256 KiB as JSON).
    ///
    /// # Errors
    /// Returns an error if the checkpoint is too large, or if the attempt no longer belongs to this handler.
    pub async fn save_checkpoint(&self, checkpoint: &impl Serialize) -> Result<(), HandlerError> {
        self.save_checkpoint_bytes(to_json(checkpoint)?).await
    }

    /// Like [`Self::save_checkpoint`], with arbitrary bytes.
    ///
    /// # Errors
    /// Returns the same errors as [`Self::save_checkpoint`].
    pub async fn save_checkpoint_bytes(
        &self,
        checkpoint: impl Into<Bytes>,
    ) -> Result<(), HandlerError> {
        let data = checkpoint.into();
        check_size("checkpoint", data.len(), limits::MAX_CHECKPOINT_BYTES)?;
        self.reports.push(Report::Checkpoint(data)).await
    }

    /// Returns the checkpoint that an earlier attempt saved, if any, as bytes.
    #[must_use]
    pub fn checkpoint_bytes(&self) -> Option<&Bytes> {
        self.info.checkpoint.as_ref()
    }

    /// Returns information about the attempt and its request.
    #[must_use]
    pub fn info(&self) -> &AttemptInfo {
        &self.info
    }

    /// Returns the checkpoint that an earlier attempt saved, if any.
    ///
    /// # Errors
    /// Returns an error if the checkpoint has a different type.
    pub fn checkpoint<T: DeserializeOwned>(&self) -> Result<Option<T>, HandlerError> {
        match &self.info.checkpoint {
            None => Ok(None),
            Some(data) => Ok(Some(serde_json::from_slice(data)?)),
        }
    }

    /// Returns whether cancellation is requested.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancellation.is_cancelled()
    }

    /// Waits until cancellation is requested. The handler should then return as soon as possible, with
    /// [`HandlerError::cancelled`]; otherwise, it is aborted.
    pub async fn cancelled(&self) {
        self.cancellation.cancelled().await;
    }

    /// Sleeps for `duration`, or until cancellation is requested.
    ///
    /// # Errors
    /// Returns [`HandlerError::cancelled`] if cancellation is requested.
    pub async fn sleep(&self, duration: std::time::Duration) -> Result<(), HandlerError> {
        tokio::select! {
            () = self.cancelled() => Err(HandlerError::cancelled()),
            () = tokio::time::sleep(duration) => Ok(()),
        }
    }

    /// Returns up to `limit` requests of the same user that were accepted in `from..until`, newest first.
    ///
    /// # Errors
    /// Returns an error if the request history is not available in this process, or if it cannot be read.
    pub async fn requests(
        &self,
        from: Timestamp,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestSummary>, HandlerError> {
        match &self.history {
            Some(history) => history.requests(self.tenant(), self.user(), from, until, limit).await,
            None => {
                Err(HandlerError::fatal("the request history is not available in this process"))
            }
        }
    }
}

/// Serializes to JSON without spare capacity, because the buffer may be kept for a long time and only its length is
/// counted.
pub(crate) fn to_json(value: &impl Serialize) -> Result<Bytes, serde_json::Error> {
    let mut json = serde_json::to_vec(value)?;
    if json.len() > SHRINK_THRESHOLD_BYTES {
        json.shrink_to_fit();
    }
    Ok(json.into())
}

/// Checks that the data is JSON of any nesting depth, without building a value.
fn check_json(what: &str, data: &[u8]) -> Result<(), HandlerError> {
    match serde_json::from_slice::<&serde_json::value::RawValue>(data) {
        Ok(_) => Ok(()),
        Err(error) => Err(HandlerError::fatal(format!("{what} is not JSON: {error}"))),
    }
}

fn check_size(what: &str, bytes: usize, limit: usize) -> Result<(), HandlerError> {
    if bytes <= limit {
        Ok(())
    } else {
        Err(HandlerError::fatal(format!("{what} must be at most {limit} bytes, is {bytes}")))
    }
}
