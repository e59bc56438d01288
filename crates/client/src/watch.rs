//! Watching a request over gRPC, over as many calls as it takes.

use std::time::Duration;

use streamer_core::{output::hex, retry::Backoff};
use streamer_proto::{
    common::v1::{Event, OutputSummary, Payload, RequestState, event::Kind, payload::Body},
    progress::v1::{WatchRequest, WatchResponse},
    router::v1::{CancelRequest, Completed, GetRequest, SubmitRequest, SubmitResponse},
};
use streamer_rpc::{completed, is_terminal, payload_bytes};
use tokio::time::sleep;
use tonic::Streaming;

use crate::{Api, ClientError, OutputCheck};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Calls in a row that brought nothing, after which it gives up.
const MAX_FAILURES: u32 = 8;

impl Api {
    /// Asks for an action. Safe to repeat when an async one has an `id`.
    ///
    /// # Errors
    /// When the server refuses or cannot be reached.
    pub async fn submit(&self, request: SubmitRequest) -> Result<SubmitResponse, ClientError> {
        let answer = self.router().submit(self.call(request)).await;
        Ok(answer.map_err(|status| self.error(&status))?.into_inner())
    }

    /// Follows a request from after this `seq`; 0 for all of its events.
    #[must_use]
    pub fn watch(&self, request_id: impl Into<String>, after_seq: i64) -> Watch {
        Watch {
            api: self.clone(),
            request_id: request_id.into(),
            last_seq: after_seq,
            stream: None,
            waiting: Vec::new(),
            ended: false,
            backoff: Backoff::new(FIRST_BACKOFF, MAX_BACKOFF),
            check: (after_seq == 0).then(OutputCheck::default),
        }
    }

    /// Waits for a request to end, however long that takes.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub async fn wait(&self, request_id: impl Into<String>) -> Result<Completed, ClientError> {
        let request_id = request_id.into();
        let mut watch = self.watch(request_id.clone(), 0);
        let mut last = None;
        while let Some(event) = watch.next().await? {
            last = Some(event);
        }
        last.and_then(completed).ok_or_else(|| {
            ClientError::Unexpected(format!("the log of {request_id} ends without an outcome"))
        })
    }

    /// Asks that a request end; says where it stands.
    ///
    /// # Errors
    /// When the server refuses or cannot be reached.
    pub async fn cancel(
        &self,
        request_id: impl Into<String>,
        reason: impl Into<String>,
    ) -> Result<RequestState, ClientError> {
        let request = CancelRequest { request_id: request_id.into(), reason: reason.into() };
        let answer = self.router().cancel(self.call(request)).await;
        let answer = answer.map_err(|status| self.error(&status))?.into_inner();
        Ok(answer.request.unwrap_or_default().state())
    }

    /// Where a request stands.
    ///
    /// # Errors
    /// When the server refuses or cannot be reached.
    pub async fn state(&self, request_id: impl Into<String>) -> Result<RequestState, ClientError> {
        let request = GetRequest { request_id: request_id.into(), ..GetRequest::default() };
        let answer = self.router().get(self.call(request)).await;
        let answer = answer.map_err(|status| self.error(&status))?.into_inner();
        Ok(answer.request.unwrap_or_default().state())
    }
}

/// The events of one request, each once and in order; lost streams are opened again after the last
/// one. At the end the output is compared with its proof, if all of it was read.
pub struct Watch {
    api: Api,
    request_id: String,
    last_seq: i64,
    stream: Option<Streaming<WatchResponse>>,
    /// In reverse.
    waiting: Vec<Event>,
    ended: bool,
    backoff: Backoff,
    check: Option<OutputCheck>,
}

impl Watch {
    /// The last `seq` that was handed out.
    #[must_use]
    pub fn last_seq(&self) -> i64 {
        self.last_seq
    }

    /// The next event; `None` after the terminal one.
    ///
    /// # Errors
    /// When the server refuses, cannot be reached for long, or sends what is not the log.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(event) = self.waiting.pop() {
                return self.take(event).map(Some);
            }
            if self.ended {
                return Ok(None);
            }
            match self.fill().await {
                Ok(()) => {}
                Err(error) if error.is_transient() && self.backoff.failures() < MAX_FAILURES => {
                    self.stream = None;
                    sleep(self.backoff.wait()).await;
                }
                // A watch may last longer than its token. One that was refused at once stays so.
                Err(error) if error.is_unauthenticated() && self.stream.take().is_some() => {
                    if !self.api.renew_token().await? {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

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
                self.waiting = response.events;
                self.waiting.retain(|event| event.seq > self.last_seq);
                self.waiting.reverse();
            }
            // After the terminal event, which may have been seen before.
            None => self.ended = true,
        }
        Ok(())
    }

    fn take(&mut self, event: Event) -> Result<Event, ClientError> {
        if event.seq != self.last_seq + 1 {
            return Err(ClientError::Unexpected(format!(
                "event {} of {} follows event {}",
                event.seq, self.request_id, self.last_seq
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

fn verify(check: &mut OutputCheck, event: &Event) -> Result<(), ClientError> {
    let proven = |check: &OutputCheck, output: Option<&OutputSummary>| match output {
        Some(output) => check.verify(output.chunks, &hex(&output.sha256)).map_err(Into::into),
        None => Ok(()),
    };
    match &event.kind {
        Some(Kind::Started(_)) => check.started(event.seq),
        Some(Kind::Output(output)) => check.chunk(&payload_bytes(output.data.as_ref())),
        Some(Kind::Retrying(retrying)) => check.rewind(retrying.rewind_to_seq),
        Some(Kind::Failed(failed)) => {
            check.rewind(failed.rewind_to_seq);
            return proven(check, failed.output.as_ref());
        }
        Some(Kind::Succeeded(succeeded)) => return proven(check, succeeded.output.as_ref()),
        Some(Kind::Cancelled(cancelled)) => return proven(check, cancelled.output.as_ref()),
        Some(Kind::Accepted(_) | Kind::Progress(_)) | None => {}
    }
    Ok(())
}

/// A JSON payload.
#[must_use]
pub fn json(text: impl Into<String>) -> Payload {
    Payload { content_type: String::new(), body: Some(Body::Data(text.into().into())) }
}
