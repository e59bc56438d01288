//! Client of the event log, which is the internal API of the progress service.

use std::sync::Arc;

use prost::Message;
use streamer_cluster::with_route;
use streamer_core::Uid;
use streamer_handler::MemoryBudget;
use streamer_proto::{
    common::v1::{Event, event::Kind},
    internal::v1::{AnnounceRequest, PublishRequest},
    stubs::EventLogServiceStub,
};
use streamer_rpc::{Channel, Untraced, is_terminal, parse_uid, run_to_completion};
use streamer_telemetry::is_sampled;
use tonic::Status;

/// Budget for large batches in flight, in bytes; raised to two batches of the maximum size. Several copies of a batch
/// exist in memory: as reports, encoded for the call, decoded, and encoded for the store. A higher limit would not
/// increase the throughput, and would delay all other tasks during the copies.
const MAX_LARGE_BATCHES_BYTES: usize = 8 * 1024 * 1024;
/// Maximum size of a small batch, in bytes. Small batches do not wait for large ones.
const SMALL_BATCH_BYTES: usize = 64 * 1024;

#[derive(Clone)]
pub(crate) struct EventLogClient {
    client: EventLogServiceStub,
    /// Memory budget for large batches in flight.
    large: Arc<MemoryBudget>,
}

impl EventLogClient {
    pub(crate) fn new(event_log: Channel, max_batch_bytes: usize) -> Self {
        let client = EventLogServiceStub::new(event_log).max_encoding_message_size(max_batch_bytes);
        // Allows two tenants to publish a batch of the maximum size at the same time.
        let large =
            MemoryBudget::new(MAX_LARGE_BATCHES_BYTES.max(max_batch_bytes.saturating_mul(2)));
        Self { client, large }
    }

    /// Appends events to the log of a tenant's request; returns the cancellation reason if cancellation was requested.
    pub(crate) async fn publish(
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
