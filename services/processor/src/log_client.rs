//! How this service writes to the log: the progress service's internal calls.

use std::sync::Arc;

use prost::Message;
use streamer_core::Uid;
use streamer_handler::OutputBudget;
use streamer_proto::{
    common::v1::{Event, event::Kind},
    internal::v1::{
        AnnounceRequest, PublishRequest, event_log_service_client::EventLogServiceClient,
    },
};
use streamer_rpc::{Channel, Untraced, is_terminal, run_to_completion, with_route};
use streamer_telemetry::is_sampled;
use tonic::Status;

/// Bytes of large batches that are on their way at the same time. Each is held several times over: as
/// reports, encoded for the call, decoded, and encoded for the store. More would not be stored faster, and
/// everything else would wait for its turn among the tasks that copy them.
const LARGE_BATCHES_BYTES: usize = 8 * 1024 * 1024;
/// Batches up to this size do not wait for larger ones.
const SMALL_BATCH_BYTES: usize = 64 * 1024;

#[derive(Clone)]
pub(crate) struct LogClient {
    client: EventLogServiceClient<Channel>,
    /// Of the large batches that are on their way.
    large: Arc<OutputBudget>,
}

impl LogClient {
    pub(crate) fn new(progress: Channel, max_batch_bytes: usize) -> Self {
        let client =
            EventLogServiceClient::new(progress).max_encoding_message_size(max_batch_bytes);
        // Two tenants with the largest batches at the same time.
        let large = OutputBudget::new(LARGE_BATCHES_BYTES.max(max_batch_bytes.saturating_mul(2)));
        Self { client, large }
    }

    /// Appends events of a tenant's request; says why cancellation was asked for, when it was.
    pub(crate) async fn publish(
        &self,
        tenant: &Arc<str>,
        request: PublishRequest,
    ) -> Result<Option<String>, Status> {
        let Some(uid) = Uid::from_slice(&request.uid) else {
            return Err(Status::invalid_argument("uid must be 16 bytes"));
        };
        let _reserved = match request.encoded_len() {
            0..=SMALL_BATCH_BYTES => None,
            large => Some(self.large.reserve(tenant, large).await),
        };
        // Those that come once per event are not part of a trace.
        let is_untraced = is_sampled() && !request.events.last().is_some_and(ends_attempt);
        let mut call = with_route(request, uid);
        if is_untraced {
            call.extensions_mut().insert(Untraced);
        }
        let response = self.client.clone().publish(call).await?;
        Ok(response.into_inner().cancel_reason)
    }

    /// Delivers events that are durable, also when the caller stops waiting. A hint: when it fails,
    /// watchers find the events in the store.
    pub(crate) async fn announce(&self, uid: Uid, events: Vec<Event>) {
        let uid_bytes = uid.to_bytes().to_vec().into();
        let request = AnnounceRequest { uid: uid_bytes, events, created: None };
        let mut client = self.client.clone();
        let announced =
            run_to_completion(async move { client.announce(with_route(request, uid)).await });
        if let Err(status) = announced.await {
            tracing::warn!(%uid, %status, "could not announce events");
        }
    }
}

/// Whether nothing of the same attempt follows.
fn ends_attempt(event: &Event) -> bool {
    is_terminal(event) || matches!(event.kind, Some(Kind::Retrying(_)))
}
