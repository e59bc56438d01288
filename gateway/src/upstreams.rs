//! Clients of the services that the gateway calls.

use streamer_proto::{
    progress::v1::progress_service_client::ProgressServiceClient,
    router::v1::router_service_client::RouterServiceClient,
};
use streamer_rpc::Channel;

pub(crate) struct Upstreams {
    router: RouterServiceClient<Channel>,
    progress: ProgressServiceClient<Channel>,
}

impl Upstreams {
    pub(crate) fn new(router: Channel, progress: Channel, max_message_bytes: usize) -> Self {
        Self {
            router: RouterServiceClient::new(router)
                .max_encoding_message_size(max_message_bytes)
                .max_decoding_message_size(max_message_bytes.saturating_mul(2)),
            progress: ProgressServiceClient::new(progress)
                .max_decoding_message_size(max_message_bytes.saturating_mul(2)),
        }
    }

    pub(crate) fn router(&self) -> RouterServiceClient<Channel> {
        self.router.clone()
    }

    pub(crate) fn progress(&self) -> ProgressServiceClient<Channel> {
        self.progress.clone()
    }
}
