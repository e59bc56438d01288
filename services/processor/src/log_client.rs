//! How this service writes to the log: the progress service's internal calls.

use streamer_core::Uid;
use streamer_proto::{
    common::v1::Event,
    internal::v1::{
        AnnounceRequest, PublishRequest, event_log_service_client::EventLogServiceClient,
    },
};
use streamer_rpc::{Channel, run_to_completion, with_route};
use tonic::Status;

#[derive(Clone)]
pub(crate) struct LogClient {
    client: EventLogServiceClient<Channel>,
}

impl LogClient {
    pub(crate) fn new(progress: Channel, max_batch_bytes: usize) -> Self {
        let client =
            EventLogServiceClient::new(progress).max_encoding_message_size(max_batch_bytes);
        Self { client }
    }

    /// Appends events; says why cancellation was asked for, when it was.
    pub(crate) async fn publish(&self, request: PublishRequest) -> Result<Option<String>, Status> {
        let response = match Uid::from_slice(&request.uid) {
            Some(uid) => self.client.clone().publish(with_route(request, uid)).await?,
            None => return Err(Status::invalid_argument("uid must be 16 bytes")),
        };
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
