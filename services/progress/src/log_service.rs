//! Implementation of `streamer.internal.v1.EventLogService`.

use std::sync::Arc;

use streamer_core::{AttemptNumber, Clock, ErrorCode, Seq, Timestamp, Uid};
use streamer_proto::{
    common::v1::Event,
    internal::v1::{
        AnnounceRequest, AnnounceResponse, PublishRequest, PublishResponse,
        event_log_service_server::EventLogService,
    },
    millis,
};
use streamer_rpc::{error_status, parse_uid, run_to_completion, store_status};
use streamer_store::{
    Append, AppendOutcome, EventNumbers, RequestNumbers, Store, Writer, check_events,
};
use streamer_telemetry::trace_span;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument;

use crate::{metrics::ProgressMetrics, topics::Topics};

/// Event log API for processors and routers.
#[derive(Clone)]
pub struct LogService {
    topics: Arc<Topics>,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    metrics: ProgressMetrics,
}

impl LogService {
    pub(crate) fn new(
        topics: Arc<Topics>,
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        metrics: ProgressMetrics,
    ) -> Self {
        Self { topics, store, clock, metrics }
    }
}

impl LogService {
    /// Appends events to the log and delivers them to watchers. Must run to completion: events that are stored but not
    /// delivered are found only when the topic is compared with the store.
    async fn append(
        &self,
        uid: Uid,
        attempt: AttemptNumber,
        request: PublishRequest,
    ) -> Result<PublishResponse, Status> {
        let start = Instant::now();
        let appended = self
            .store
            .append(Append {
                uid,
                writer: Writer::Attempt(attempt),
                events: request.events.clone(),
                checkpoint: request.checkpoint,
                retry_at: request.retry_at.map(|at| Timestamp::from_millis(millis(&at))),
                now: self.clock.now(),
            })
            .instrument(trace_span!("store.append"))
            .await
            .map_err(|error| store_status(&error))?;
        match appended {
            AppendOutcome::Applied { cancel_reason } => {
                self.metrics.events.inc_by(request.events.len() as u64);
                self.metrics.append_seconds.observe(start.elapsed());
                self.topics.push(uid, &request.events);
                Ok(PublishResponse { cancel_reason })
            }
            AppendOutcome::Fenced { state, attempt: current, last_seq } => {
                self.metrics.fenced.inc();
                Err(Status::new(
                    Code::Aborted,
                    format!(
                        "attempt {attempt} is fenced: the request is {state}, at attempt \
                         {current} and seq {last_seq}"
                    ),
                ))
            }
            AppendOutcome::NotFound => {
                self.metrics.fenced.inc();
                Err(Status::new(Code::Aborted, "request not found (deleted)"))
            }
        }
    }
}

#[tonic::async_trait]
impl EventLogService for LogService {
    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<PublishResponse>, Status> {
        let request = request.into_inner();
        let uid = parse_uid(&request.uid)?;
        if !request.events.is_empty() || request.checkpoint.is_none() {
            check_contiguous(&request.events)?;
        }
        let attempt = AttemptNumber::from_i32(request.attempt).ok();
        let attempt = attempt.filter(|attempt| *attempt >= AttemptNumber::FIRST);
        let attempt =
            attempt.ok_or_else(|| Status::invalid_argument("attempt must be positive"))?;
        let service = self.clone();
        let response =
            run_to_completion(async move { service.append(uid, attempt, request).await });
        Ok(Response::new(response.await?))
    }

    async fn announce(
        &self,
        request: Request<AnnounceRequest>,
    ) -> Result<Response<AnnounceResponse>, Status> {
        let request = request.into_inner();
        let uid = parse_uid(&request.uid)?;
        check_contiguous(&request.events)?;
        match request.created {
            Some(created) => {
                created.check_numbers().map_err(|error| invalid(error.to_string()))?;
                self.topics.create(uid, &created, &request.events);
            }
            None => self.topics.push(uid, &request.events),
        }
        Ok(Response::new(AnnounceResponse {}))
    }
}

fn check_contiguous(events: &[Event]) -> Result<(), Status> {
    check_events(events).map_err(|error| invalid(error.to_string()))?;
    let contiguous = events.windows(2).all(|pair| pair[1].seq() == pair[0].seq().next());
    match events.first() {
        Some(first) if contiguous && first.seq() > Seq::NONE => Ok(()),
        Some(_) => Err(invalid("events must have consecutive sequence numbers, from 1")),
        None => Err(invalid("events must not be empty")),
    }
}

fn invalid(rule: impl Into<String>) -> Status {
    error_status(ErrorCode::ValidationError, rule)
}

#[cfg(test)]
mod tests;
