//! Clients of the services that the gateway calls.

use streamer_proto::stubs::{ProgressServiceStub, RouterServiceStub};
use streamer_rpc::Channel;

pub(crate) struct Upstreams {
    router: RouterServiceStub,
    progress: ProgressServiceStub,
}

impl Upstreams {
    pub(crate) fn new(router: Channel, progress: Channel, max_message_bytes: usize) -> Self {
        Self {
            router: RouterServiceStub::new(router)
                .max_encoding_message_size(max_message_bytes)
                .max_decoding_message_size(max_message_bytes.saturating_mul(2)),
            progress: ProgressServiceStub::new(progress)
                .max_decoding_message_size(max_message_bytes.saturating_mul(2)),
        }
    }

    pub(crate) fn router(&self) -> RouterServiceStub {
        self.router.clone()
    }

    pub(crate) fn progress(&self) -> ProgressServiceStub {
        self.progress.clone()
    }
}
