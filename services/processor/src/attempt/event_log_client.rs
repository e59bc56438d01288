//! Client of the event log, which is the internal API of the progress service.

use std::{sync::Arc, time::Duration};

use prost::Message;
use streamer_cluster::with_route;
use streamer_core::{Uid, backoff::Backoff};
use streamer_handler::{MemoryBudget, ReportBatch, Reservation};
use streamer_proto::{
    common::v1::{Event, event::Kind},
    internal::v1::{AnnounceRequest, PublishRequest},
    stubs::EventLogServiceStub,
};
use streamer_rpc::{Channel, Untraced, is_terminal, parse_uid, run_to_completion};
use streamer_telemetry::{LatencyHistogram, Metrics, is_sampled};
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};

/// Budget for large batches in flight, in bytes; raised to two batches of the maximum size. Several copies of a batch
/// exist in memory: as reports, encoded for the call, decoded, and encoded for the store. A higher limit would not
/// increase the throughput, and would delay all other tasks during the copies.
const MAX_LARGE_BATCHES_BYTES: usize = 8 * 1024 * 1024;
/// Maximum size of a small batch, in bytes. Small batches do not wait for large ones.
const SMALL_BATCH_BYTES: usize = 64 * 1024;
/// Initial backoff after a failed publish call; it doubles up to [`MAX_PUBLISH_BACKOFF`].
const PUBLISH_BACKOFF: Duration = Duration::from_millis(20);
const MAX_PUBLISH_BACKOFF: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(crate) struct EventLogClient {
    client: EventLogServiceStub,
    /// Memory budget for large batches in flight.
    large: Arc<MemoryBudget>,
    /// Time from a report until it is durable.
    report_seconds: LatencyHistogram,
}

/// Reservation and age of the reports from which a batch of events is made.
#[derive(Default)]
pub(crate) struct ReportedBatch {
    reserved: Reservation,
    oldest: Option<Instant>,
}

impl ReportedBatch {
    /// Adds the reservation and age of further reports, whose content must be in the batch.
    pub(crate) fn add(&mut self, ReportBatch { reserved, oldest, .. }: ReportBatch) {
        self.reserved.merge(reserved);
        self.oldest = self.oldest.or(oldest);
    }

    /// Adds the reservation for a result.
    pub(crate) fn reserve(&mut self, reserved: Reservation) {
        self.reserved.merge(reserved);
    }
}

impl EventLogClient {
    pub(crate) fn new(event_log: Channel, max_batch_bytes: usize, metrics: &Metrics) -> Self {
        let client = EventLogServiceStub::new(event_log).max_encoding_message_size(max_batch_bytes);
        // Allows two tenants to publish a batch of the maximum size at the same time.
        let large =
            MemoryBudget::new(MAX_LARGE_BATCHES_BYTES.max(max_batch_bytes.saturating_mul(2)));
        let report_seconds = metrics.latency(
            "streamer_processor_report_duration_seconds",
            "Time from the oldest report in a batch until the batch is durable",
        );
        Self { client, large, report_seconds }
    }

    /// Appends events to the log of a tenant's request, with retries until they are durable or the attempt is fenced.
    /// The sequence numbers of the events make retries idempotent. Returns the cancellation reason if cancellation was
    /// requested.
    pub(crate) async fn publish(
        &self,
        uid: Uid,
        tenant: &Arc<str>,
        batch: PublishRequest,
        source: ReportedBatch,
    ) -> Result<Option<String>, Status> {
        let ReportedBatch { reserved: _reserved, oldest } = source;
        let oldest = oldest.unwrap_or_else(Instant::now);
        let mut backoff = Backoff::new(PUBLISH_BACKOFF, MAX_PUBLISH_BACKOFF);
        loop {
            match self.publish_once(tenant, batch.clone()).await {
                Ok(cancel_reason) => {
                    self.report_seconds.observe(oldest.elapsed());
                    return Ok(cancel_reason);
                }
                // Fenced, or not retryable: lease recovery finishes the attempt.
                Err(status) if is_permanent(&status) => return Err(status),
                Err(status) => {
                    let wait = backoff.wait();
                    tracing::warn!(%uid, %status, ?wait, "failed to publish events, retrying");
                    sleep(wait).await;
                }
            }
        }
    }

    async fn publish_once(
        &self,
        tenant: &Arc<str>,
        request: PublishRequest,
    ) -> Result<Option<String>, Status> {
        let uid = parse_uid(&request.uid)?;
        let _reserved = match request.encoded_len() {
            0..=SMALL_BATCH_BYTES => None,
            large => Some(self.large.reserve(tenant, large).await),
        };
        // Calls that may occur once per event are not traced.
        let is_untraced = is_sampled() && !request.events.last().is_some_and(ends_attempt);
        let mut call = with_route(request, uid);
        if is_untraced {
            call.extensions_mut().insert(Untraced);
        }
        let response = self.client.clone().publish(call).await?;
        Ok(response.into_inner().cancel_reason)
    }

    /// Announces durable events to watchers, even if the caller stops waiting. The call is a hint: if it fails,
    /// watchers read the events from the store.
    pub(crate) async fn announce(&self, uid: Uid, events: Vec<Event>) {
        let uid_bytes = uid.to_bytes().to_vec().into();
        let request = AnnounceRequest { uid: uid_bytes, events, created: None };
        let mut client = self.client.clone();
        let announced =
            run_to_completion(async move { client.announce(with_route(request, uid)).await });
        if let Err(status) = announced.await {
            tracing::warn!(%uid, %status, "failed to announce events");
        }
    }
}

/// Returns whether the event is the last of its attempt.
fn ends_attempt(event: &Event) -> bool {
    is_terminal(event) || matches!(event.kind, Some(Kind::Retrying(_)))
}

fn is_permanent(status: &Status) -> bool {
    match status.code() {
        Code::Aborted
        | Code::InvalidArgument
        | Code::OutOfRange
        | Code::FailedPrecondition
        | Code::Unimplemented
        | Code::DataLoss => true,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::Internal
        | Code::Unavailable
        | Code::Unauthenticated => false,
    }
}
