//! Watches a request over gRPC, with retries.

use std::time::Duration;

use streamer_core::{Backoff, hex};
use streamer_proto::{
    common::v1::{Event, OutputSummary, Payload, RequestState, event::Kind, payload::Body},
    progress::v1::{WatchRequest, WatchResponse},
    router::v1::{CancelRequest, Completed, GetRequest, SubmitRequest, SubmitResponse},
};
use streamer_rpc::{completed, is_terminal, payload_bytes};
use tokio::time::sleep;
use tonic::Streaming;

use crate::{Api, ClientError, OutputVerifier};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Maximum number of consecutive retries without a response.
const MAX_RETRIES: u32 = 8;

impl Api {
    /// Submits a request. For an async action, the call can be repeated safely if the request has an `id`.
    ///
    /// # Errors
    /// Returns an error if the server rejects the call or cannot be reached.
    pub async fn submit(&self, request: SubmitRequest) -> Result<SubmitResponse, ClientError> {
        let response = self.router().submit(self.call(request)).await;
        Ok(response.map_err(|status| self.error(&status))?.into_inner())
    }

    /// Follows a request, starting after the event `after_seq`; 0 for all events.
    #[must_use]
    pub fn watch(&self, request_id: impl Into<String>, after_seq: i64) -> Watch {
        Watch {
            api: self.clone(),
            request_id: request_id.into(),
            last_seq: after_seq,
            stream: None,
            pending: Vec::new(),
            ended: false,
            backoff: Backoff::new(FIRST_BACKOFF, MAX_BACKOFF),
            check: (after_seq == 0).then(OutputVerifier::default),
        }
    }

    /// Waits for a request to end, without a timeout.
    ///
    /// # Errors
    /// Returns an error if the request cannot be watched.
    pub async fn wait(&self, request_id: impl Into<String>) -> Result<Completed, ClientError> {
        let request_id = request_id.into();
        let mut watch = self.watch(request_id.clone(), 0);
        let mut last_event = None;
        while let Some(event) = watch.next().await? {
            last_event = Some(event);
        }
        last_event.and_then(completed).ok_or_else(|| {
            ClientError::Protocol(format!("the log of {request_id} has no terminal event"))
        })
    }

    /// Cancels a request and returns its state.
    ///
    /// # Errors
    /// Returns an error if the server rejects the call or cannot be reached.
    pub async fn cancel(
        &self,
        request_id: impl Into<String>,
        reason: impl Into<String>,
    ) -> Result<RequestState, ClientError> {
        let request = CancelRequest { request_id: request_id.into(), reason: reason.into() };
        let response = self.router().cancel(self.call(request)).await;
        let response = response.map_err(|status| self.error(&status))?.into_inner();
        Ok(response.request.unwrap_or_default().state())
    }

    /// Returns the state of a request.
    ///
    /// # Errors
    /// Returns an error if the server rejects the call or cannot be reached.
    pub async fn state(&self, request_id: impl Into<String>) -> Result<RequestState, ClientError> {
        let request = GetRequest { request_id: request_id.into(), ..GetRequest::default() };
        let response = self.router().get(self.call(request)).await;
        let response = response.map_err(|status| self.error(&status))?.into_inner();
        Ok(response.request.unwrap_or_default().state())
    }
}

/// Watch of one request: yields each event once and in order, and resumes lost streams after the last
/// event. Verifies the output at the end if the log was read from its beginning.
pub struct Watch {
    api: Api,
    request_id: String,
    last_seq: i64,
    stream: Option<Streaming<WatchResponse>>,
    /// Received events that are not returned yet, the last one first.
    pending: Vec<Event>,
    ended: bool,
    backoff: Backoff,
    check: Option<OutputVerifier>,
}

impl Watch {
    /// Returns the `seq` of the last event that [`Self::next`] returned.
    #[must_use]
    pub fn last_seq(&self) -> i64 {
        self.last_seq
    }

    /// Returns the next event; `None` after the terminal event.
    ///
    /// # Errors
    /// Returns an error if the server rejects the call, stays unreachable after all retries, or skips events,
    /// or if the output does not match its checksum.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(event) = self.pending.pop() {
                return self.accept(event).map(Some);
            }
            if self.ended {
                return Ok(None);
            }
            match self.fill().await {
                Ok(()) => {}
                Err(error) if error.is_transient() && self.backoff.failures() < MAX_RETRIES => {
                    self.stream = None;
                    sleep(self.backoff.wait()).await;
                }
                // The token may have expired during the stream. A token that was rejected before the
                // stream opened is not renewed.
                Err(error) if error.is_unauthenticated() && self.stream.take().is_some() => {
                    if !self.api.renew_token().await? {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Receives the next batch of events; opens the stream if none is open.
    async fn fill(&mut self) -> Result<(), ClientError> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let watch = WatchRequest {
                    request_id: self.request_id.clone(),
                    after_seq: Some(self.last_seq),
                    ..WatchRequest::default()
                };
                let opened = self.api.progress().watch(self.api.call(watch)).await;
                let opened = opened.map_err(|status| self.api.error(&status))?;
                self.stream.insert(opened.into_inner())
            }
        };
        match stream.message().await.map_err(|status| self.api.error(&status))? {
            Some(response) => {
                self.backoff.reset();
                self.pending = response.events;
                self.pending.retain(|event| event.seq > self.last_seq);
                self.pending.reverse();
            }
            // The terminal event was received, or it is the event `after_seq`.
            None => self.ended = true,
        }
        Ok(())
    }

    /// Checks that the event is the next event of the log, and updates the output checksum.
    fn accept(&mut self, event: Event) -> Result<Event, ClientError> {
        if event.seq != self.last_seq + 1 {
            return Err(ClientError::Protocol(format!(
                "expected event {} of request {}, received event {}",
                self.last_seq + 1,
                self.request_id,
                event.seq
            )));
        }
        self.last_seq = event.seq;
        self.ended |= is_terminal(&event);
        if let Some(check) = &mut self.check {
            verify(check, &event)?;
        }
        Ok(event)
    }
}

fn verify(check: &mut OutputVerifier, event: &Event) -> Result<(), ClientError> {
    let compare = |check: &OutputVerifier, output: Option<&OutputSummary>| match output {
        Some(output) => check.verify(output.chunks, &hex(&output.sha256)).map_err(Into::into),
        None => Ok(()),
    };
    match &event.kind {
        Some(Kind::Started(_)) => check.started(event.seq),
        Some(Kind::Output(output)) => check.chunk(&payload_bytes(output.data.as_ref())),
        Some(Kind::Retrying(retrying)) => check.rewind(retrying.rewind_to_seq),
        Some(Kind::Failed(failed)) => {
            check.rewind(failed.rewind_to_seq);
            return compare(check, failed.output.as_ref());
        }
        Some(Kind::Succeeded(succeeded)) => return compare(check, succeeded.output.as_ref()),
        Some(Kind::Cancelled(cancelled)) => return compare(check, cancelled.output.as_ref()),
        Some(Kind::Accepted(_) | Kind::Progress(_)) | None => {}
    }
    Ok(())
}

/// Returns a JSON payload.
#[must_use]
pub fn json(text: impl Into<String>) -> Payload {
    Payload { content_type: String::new(), body: Some(Body::Data(text.into().into())) }
}
