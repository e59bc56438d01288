//! Channels between services: the same generated client works in process and over the network.

use std::{convert::Infallible, future::Future, net::SocketAddr, pin::Pin, sync::Arc};

use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION};
use streamer_proto::seam::Channel;
use tonic::{Extensions, Status, body::Body, metadata::MetadataMap};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

use crate::{
    RpcMetrics,
    rpc_metrics::Measured,
    spans::{ClientSpans, ServerSpans},
};

/// Returns a channel to a server in this process: calls are function calls, and messages are moved.
pub fn local<S>(server: S, metrics: &RpcMetrics) -> Channel
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    let service = server.map_err(|never| match never {});
    let service = Measured { service, metrics: metrics.clone() };
    Channel::Local(BoxCloneSyncService::new(ServerSpans(service)))
}

/// Returns a channel to a server in a different process.
pub fn remote<S>(server: S) -> Channel
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Status>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    Channel::Remote(BoxCloneSyncService::new(ClientSpans(server)))
}

/// Header of a submission between services: the `uid` to assign to the request, so that a
/// retry is idempotent. Ignored in calls from clients.
pub const REQUEST_UID: &str = "streamer-request-uid";
/// Header of a submission between services: the `uid` of the submission of the same client that this one must follow.
/// Ignored in calls from clients.
pub const AFTER_UID: &str = "streamer-after-uid";
/// Header of a retry: the number of previous attempts, which may have been executed (gRFC A6). Attempts that were not
/// executed (transparent retries) do not count. Ignored in calls from clients.
pub const PREVIOUS_ATTEMPTS: &str = "grpc-previous-rpc-attempts";
/// Header of every call between services: the token that all services share.
pub const SERVICE_TOKEN: &str = "streamer-service-token";
/// Metadata of a rejection between services: nothing was executed, and a different instance may have
/// capacity.
pub const NOT_ADMITTED: &str = "streamer-not-admitted";
/// Header of a call that was forwarded by an instance of the same service: it is not forwarded again.
pub const FORWARDED: &str = "streamer-forwarded";

/// Header of a watch that a gateway opens for its subscribers; the gateway counts their watches.
pub const WATCH_COUNTED: &str = "streamer-watch-counted";

/// Header of a call that a gateway makes or forwards for a client: the address of the client.
pub const CLIENT_ADDRESS: &str = "streamer-client-address";

/// Connection that a request was received on; stored in the extensions of the request.
#[derive(Clone)]
pub struct Peer(Arc<dyn Connection>);

/// Accepted TCP connection, as seen by the services that handle its requests.
pub trait Connection: Send + Sync {
    /// Returns the address of the peer.
    fn address(&self) -> SocketAddr;

    /// Records that a request on the connection had a valid token.
    fn authenticated(&self);

    /// Returns a future that completes when the connection must be closed in favor of other connections, which
    /// is possible until it is authenticated.
    fn evicted(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

impl Peer {
    /// Returns the peer of the given connection, which counts as open until the peer is dropped.
    pub fn new(connection: Arc<dyn Connection>) -> Self {
        Self(connection)
    }

    /// Returns the address of the peer.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Returns a future that completes when the connection must be closed in favor of other connections.
    pub fn evicted(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        self.0.evicted()
    }

    /// Records that a request on the connection had a valid token.
    pub fn authenticated(&self) {
        self.0.authenticated();
    }
}

/// Returns a gRPC request with the given `authorization` header.
pub fn with_authorization<T>(message: T, authorization: HeaderValue) -> tonic::Request<T> {
    // Capacity for two more headers: the client's address and the UID of a submission.
    let mut headers = HeaderMap::with_capacity(3);
    headers.insert(AUTHORIZATION, authorization);
    let metadata = MetadataMap::from_headers(headers);
    tonic::Request::from_parts(metadata, Extensions::default(), message)
}
