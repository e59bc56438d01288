//! What a handler works with while it runs.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use streamer_core::{Limits, RequestState, Timestamp, TraceParent, Uid, limits};
use tokio_util::sync::CancellationToken;

use crate::{HandlerError, Report, ReportQueue};

/// Spare room of buffers beyond this is given back, in bytes.
const SHRUNK_BYTES: usize = 4096;

/// Which attempt of which request this is.
#[derive(Clone, Debug)]
pub struct AttemptInfo {
    /// The server's id of the request.
    pub uid: Uid,
    /// The caller's id of it.
    pub request_id: String,
    /// Whose it is.
    pub tenant: String,
    /// Whose it is.
    pub user: String,
    /// What was asked for.
    pub action: String,
    /// IANA media type of the payload.
    pub content_type: String,
    /// From 1.
    pub attempt: u32,
    /// What an earlier attempt left.
    pub checkpoint: Option<Bytes>,
    /// W3C `traceparent` of this run, for what the handler calls.
    pub trace_parent: Option<TraceParent>,
    /// W3C `tracestate` that goes with it.
    pub trace_state: Option<String>,
    /// The attempt is cut off when it has not ended by then.
    pub deadline: Option<Timestamp>,
}

/// One request of the tenant, for handlers that report on them.
#[derive(Clone, Debug)]
pub struct RequestSummary {
    /// The server's id.
    pub uid: Uid,
    /// What was asked for.
    pub action: String,
    /// Where it stands.
    pub state: RequestState,
    /// Attempts so far.
    pub attempts: u32,
    /// When it was accepted.
    pub create_time: Timestamp,
    /// When its latest attempt began.
    pub start_time: Option<Timestamp>,
    /// When it ended.
    pub finish_time: Option<Timestamp>,
}

/// Where [`Context::requests`] reads.
#[async_trait]
pub trait RequestHistory: Send + Sync {
    /// The requests of this user that were accepted in `from..until`, newest first, at most
    /// `limit`.
    async fn requests(
        &self,
        tenant: &str,
        user: &str,
        from: Timestamp,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestSummary>, HandlerError>;
}

/// Handed to every run of a handler.
pub struct Context {
    info: AttemptInfo,
    reports: Arc<ReportQueue>,
    cancellation: CancellationToken,
    limits: Limits,
    history: Option<Arc<dyn RequestHistory>>,
}

impl Context {
    /// For whoever runs handlers.
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

    /// For testing a handler without a server: what it reports is in the queue.
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
            attempt: 1,
            checkpoint: None,
            trace_parent: None,
            trace_state: None,
            deadline: None,
        };
        let token = CancellationToken::new();
        (Self::new(info, reports.clone(), token, Limits::default(), None), reports)
    }

    /// The server's id of the request.
    #[must_use]
    pub fn uid(&self) -> Uid {
        self.info.uid
    }

    /// The caller's id of the request.
    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.info.request_id
    }

    /// The tenant that asks.
    #[must_use]
    pub fn tenant(&self) -> &str {
        &self.info.tenant
    }

    /// The user who asks.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.info.user
    }

    /// IANA media type of the payload.
    #[must_use]
    pub fn content_type(&self) -> &str {
        &self.info.content_type
    }

    /// Which attempt this is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.info.attempt
    }

    /// The attempt is cut off when it has not ended by then; `None` when it may take for ever.
    #[must_use]
    pub fn deadline(&self) -> Option<Timestamp> {
        self.info.deadline
    }

    /// W3C `traceparent` to send with calls that the handler makes, so that they are part of the
    /// trace. `None` if the request came without one and is not traced here. While the handler runs,
    /// the `tracing` span and the OpenTelemetry context of this place are current, too.
    #[must_use]
    pub fn trace_parent(&self) -> Option<String> {
        self.info.trace_parent.map(TraceParent::to_text)
    }

    /// W3C `tracestate` that goes with [`Self::trace_parent`].
    #[must_use]
    pub fn trace_state(&self) -> Option<&str> {
        self.info.trace_state.as_deref()
    }

    /// Says how far the work is, 0 to 100, and what is being done (at most 4,096 bytes). Watchers
    /// see it once it is durable; this does not wait for that, only while very much is underway.
    ///
    /// # Errors
    /// When a value is out of bounds, or the attempt is not this handler's any more.
    pub async fn progress(
        &self,
        percentage: f64,
        message: impl Into<String>,
    ) -> Result<(), HandlerError> {
        self.push_progress(Some(percentage), message.into(), None).await
    }

    /// As [`Self::progress`], with anything more (as JSON, at most 64 KiB).
    ///
    /// # Errors
    /// As [`Self::progress`].
    pub async fn progress_with(
        &self,
        percentage: f64,
        message: impl Into<String>,
        metadata: &impl Serialize,
    ) -> Result<(), HandlerError> {
        let metadata = serde_json::to_vec(metadata)?;
        self.push_progress(Some(percentage), message.into(), Some(metadata.into())).await
    }

    /// As [`Self::progress_with`], with the metadata as JSON text, and without a percentage when
    /// there is no telling.
    ///
    /// # Errors
    /// As [`Self::progress`], and when the metadata is not JSON.
    pub async fn report_progress(
        &self,
        percentage: Option<f64>,
        message: String,
        metadata: Option<Bytes>,
    ) -> Result<(), HandlerError> {
        if let Some(metadata) = &metadata {
            well_formed_json("progress.metadata", metadata)?;
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
        bounded("progress.message", message.len(), limits::MAX_PROGRESS_MESSAGE_BYTES)?;
        let metadata_bytes = metadata.as_ref().map_or(0, Bytes::len);
        bounded("progress.metadata", metadata_bytes, limits::MAX_PROGRESS_METADATA_BYTES)?;
        self.reports.push(Report::Progress { percentage, message, metadata }).await
    }

    /// Says that the handler lives, when it has nothing else to say: for actions that declare a
    /// heartbeat timeout.
    ///
    /// # Errors
    /// When the attempt is not this handler's any more.
    pub async fn heartbeat(&self) -> Result<(), HandlerError> {
        self.reports.push(Report::KeepAlive).await
    }

    /// Puts out the next chunk of the result, as JSON.
    ///
    /// # Errors
    /// When it is larger than `limits.max_output_chunk_bytes`, or the attempt is not this
    /// handler's any more.
    pub async fn output(&self, chunk: &impl Serialize) -> Result<(), HandlerError> {
        self.push_output("application/json", json(chunk)?).await
    }

    /// Puts out the next chunk of the result, as bytes of this media type (at most 255 bytes).
    ///
    /// # Errors
    /// As [`Self::output`], and when it is said to be JSON and is not.
    pub async fn output_bytes(
        &self,
        content_type: &str,
        chunk: impl Into<Bytes>,
    ) -> Result<(), HandlerError> {
        let data = chunk.into();
        bounded("output.content_type", content_type.len(), limits::MAX_CONTENT_TYPE_BYTES)?;
        if content_type == "application/json" {
            well_formed_json("output", &data)?;
        }
        self.push_output(content_type, data).await
    }

    async fn push_output(&self, content_type: &str, data: Bytes) -> Result<(), HandlerError> {
        bounded("output chunk", data.len(), self.limits.max_output_chunk_bytes)?;
        self.reports.push(Report::Output { content_type: content_type.to_owned(), data }).await
    }

    /// Leaves a note (as JSON, at most 256 KiB) that the next attempt begins from.
    ///
    /// # Errors
    /// When it is too large, or the attempt is not this handler's any more.
    pub async fn save_checkpoint(&self, checkpoint: &impl Serialize) -> Result<(), HandlerError> {
        self.save_checkpoint_bytes(json(checkpoint)?).await
    }

    /// As [`Self::save_checkpoint`], with bytes of any kind.
    ///
    /// # Errors
    /// As [`Self::save_checkpoint`].
    pub async fn save_checkpoint_bytes(
        &self,
        checkpoint: impl Into<Bytes>,
    ) -> Result<(), HandlerError> {
        let data = checkpoint.into();
        bounded("checkpoint", data.len(), limits::MAX_CHECKPOINT_BYTES)?;
        self.reports.push(Report::Checkpoint(data)).await
    }

    /// What an earlier attempt left, as it is.
    #[must_use]
    pub fn checkpoint_bytes(&self) -> Option<&Bytes> {
        self.info.checkpoint.as_ref()
    }

    /// Which attempt of which request this is.
    #[must_use]
    pub fn info(&self) -> &AttemptInfo {
        &self.info
    }

    /// What an earlier attempt left.
    ///
    /// # Errors
    /// When it is there and of another shape.
    pub fn checkpoint<T: DeserializeOwned>(&self) -> Result<Option<T>, HandlerError> {
        match &self.info.checkpoint {
            None => Ok(None),
            Some(data) => Ok(Some(serde_json::from_slice(data)?)),
        }
    }

    /// Whether cancellation was asked for.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancellation.is_cancelled()
    }

    /// Returns once cancellation is asked for. A handler then ends as soon as it can, with
    /// [`HandlerError::cancelled`]; one that does not is cut off.
    pub async fn cancelled(&self) {
        self.cancellation.cancelled().await;
    }

    /// Sleeps, unless cancellation is asked for.
    ///
    /// # Errors
    /// [`HandlerError::cancelled`].
    pub async fn sleep(&self, duration: std::time::Duration) -> Result<(), HandlerError> {
        tokio::select! {
            () = self.cancelled() => Err(HandlerError::cancelled()),
            () = tokio::time::sleep(duration) => Ok(()),
        }
    }

    /// The asking user's own requests that were accepted in `from..until`, newest first, at most
    /// `limit`.
    ///
    /// # Errors
    /// When they cannot be read here or now.
    pub async fn requests(
        &self,
        from: Timestamp,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestSummary>, HandlerError> {
        match &self.history {
            Some(history) => history.requests(self.tenant(), self.user(), from, until, limit).await,
            None => Err(HandlerError::fatal("request history is not available here")),
        }
    }
}

/// As JSON, without the spare room that a growing buffer has: it may be held for long, and counts by its length.
pub(crate) fn json(value: &impl Serialize) -> Result<Bytes, serde_json::Error> {
    let mut json = serde_json::to_vec(value)?;
    if json.len() > SHRUNK_BYTES {
        json.shrink_to_fit();
    }
    Ok(json.into())
}

/// Looks only whether it is JSON, however deep it nests; builds nothing.
fn well_formed_json(what: &str, data: &[u8]) -> Result<(), HandlerError> {
    match serde_json::from_slice::<&serde_json::value::RawValue>(data) {
        Ok(_) => Ok(()),
        Err(error) => Err(HandlerError::fatal(format!("{what} is not JSON: {error}"))),
    }
}

fn bounded(what: &str, bytes: usize, limit: usize) -> Result<(), HandlerError> {
    if bytes <= limit {
        Ok(())
    } else {
        Err(HandlerError::fatal(format!("{what} must be at most {limit} bytes, is {bytes}")))
    }
}
