//! The services that the router talks to.

use http::HeaderValue;
use streamer_core::{Limits, Timestamp, Uid};
use streamer_proto::{
    common::v1::{Event, Payload, Request},
    internal::v1::{
        AnnounceRequest, ExecuteRequest, SignalCancelRequest, WakeRequest, WakeResponse,
        event_log_service_client::EventLogServiceClient,
        execution_service_client::ExecutionServiceClient,
    },
    progress::v1::progress_service_client::ProgressServiceClient,
    timestamp,
};
use streamer_rpc::{Channel, with_authorization};
use streamer_store::RequestRecord;
use tonic::Status;

pub(crate) struct Peers {
    processor: ExecutionServiceClient<Channel>,
    event_log: EventLogServiceClient<Channel>,
    progress: ProgressServiceClient<Channel>,
}

impl Peers {
    pub(crate) fn new(
        processor: Channel,
        event_log: Channel,
        progress: Channel,
        limits: &Limits,
    ) -> Self {
        let max_message_bytes = limits.max_message_bytes();
        Self {
            processor: ExecutionServiceClient::new(processor)
                // A declared action may be larger than a payload.
                .max_decoding_message_size(limits.max_worker_message_bytes())
                .max_encoding_message_size(max_message_bytes),
            event_log: EventLogServiceClient::new(event_log),
            progress: ProgressServiceClient::new(progress)
                .max_decoding_message_size(max_message_bytes.saturating_mul(2)),
        }
    }

    pub(crate) fn processor(&self) -> ExecutionServiceClient<Channel> {
        self.processor.clone()
    }

    pub(crate) fn progress(&self) -> ProgressServiceClient<Channel> {
        self.progress.clone()
    }

    /// Runs a sync action, in the caller's name.
    pub(crate) async fn execute(
        &self,
        authorization: HeaderValue,
        request: ExecuteRequest,
    ) -> Result<Option<Payload>, Status> {
        let request = with_authorization(request, authorization);
        Ok(self.processor().execute(request).await?.into_inner().result)
    }

    /// Tells the progress service of a durable event; a hint.
    pub(crate) async fn announce(&self, uid: Uid, event: Event, created: Option<Request>) {
        let uid_bytes = uid.to_bytes().to_vec().into();
        let request = AnnounceRequest { uid: uid_bytes, events: vec![event], created };
        if let Err(status) = self.event_log.clone().announce(request).await {
            tracing::warn!(%uid, %status, "could not announce an event");
        }
    }

    /// Tells the processor that a request waits, which is a hint, and hears how it looks there.
    pub(crate) async fn wake(
        &self,
        record: &RequestRecord,
        not_before: Option<Timestamp>,
    ) -> Option<WakeResponse> {
        let uid = record.uid;
        let request = WakeRequest {
            uid: uid.to_bytes().to_vec().into(),
            action: record.action.clone(),
            tenant_id: record.owner.tenant.clone(),
            not_before: not_before.map(|at| timestamp(at.as_millis())),
        };
        match self.processor().wake(request).await {
            Ok(response) => Some(response.into_inner()),
            Err(status) => {
                tracing::warn!(%uid, %status, "could not wake the processor; its poll will find it");
                None
            }
        }
    }

    /// Tells the processor that cancellation was asked for; a hint.
    pub(crate) async fn signal_cancel(&self, uid: Uid, reason: &str) {
        let uid_bytes = uid.to_bytes().to_vec().into();
        let request = SignalCancelRequest { uid: uid_bytes, reason: reason.to_owned() };
        if let Err(status) = self.processor().signal_cancel(request).await {
            tracing::warn!(%uid, %status, "could not signal a cancellation; the lease renewal will");
        }
    }
}
