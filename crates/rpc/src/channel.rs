//! How one service reaches another: the same client, whether there is a network between them.

use std::{convert::Infallible, future::Future, net::SocketAddr, pin::Pin, sync::Arc};

use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION};
use tonic::{Extensions, Status, body::Body, metadata::MetadataMap};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

use crate::spans::{ClientSpans, ServerSpans};

/// What a generated client talks through. Its error is what the client then answers with.
pub type Channel = BoxCloneSyncService<Request<Body>, Response<Body>, Status>;

/// A channel to a server in this process: its calls are function calls, without sockets.
pub fn local<S>(server: S) -> Channel
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    BoxCloneSyncService::new(ServerSpans(server.map_err(|never| match never {})))
}

/// A channel to a server in a different process.
pub fn remote<S>(server: S) -> Channel
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Status>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    BoxCloneSyncService::new(ClientSpans(server))
}

/// Header of a submission between services: the `uid` that the request shall have, so that repeating
/// the call does no harm. Nobody else's is believed.
pub const REQUEST_UID: &str = "streamer-request-uid";
/// Header of a call that may have been made before, with an unknown outcome.
pub const REPEATED: &str = "streamer-repeated";
/// Header of every call between services: the token that they share.
pub const SERVICE_TOKEN: &str = "streamer-service-token";
/// Metadata of a refusal between services: nothing was begun, and another instance may have room.
pub const NOT_TAKEN: &str = "streamer-not-taken";
/// Header of a call that another instance of the same service passes on: it goes no further.
pub const FORWARDED: &str = "streamer-forwarded";

/// Header of a watch that a gateway opens for its subscribers, which it counts itself.
pub const WATCH_COUNTED: &str = "streamer-watch-counted";

/// Header of a call that a gateway makes or passes on for a client: the address of the client.
pub const CLIENT_ADDRESS: &str = "streamer-client-address";

/// The connection that a request came over; in its extensions.
#[derive(Clone)]
pub struct Peer(Arc<dyn Connection>);

/// An accepted TCP connection, as the services that handle its requests see it.
pub trait Connection: Send + Sync {
    /// Where it comes from.
    fn address(&self) -> SocketAddr;

    /// A request that came over it had a valid token.
    fn authenticated(&self);

    /// Returns once it has to make room for others, as it may before it is authenticated.
    fn evicted(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

impl Peer {
    /// The other end of this connection, which counts as open as long as this lives.
    pub fn new(connection: Arc<dyn Connection>) -> Self {
        Self(connection)
    }

    /// Where it comes from.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Returns once it has to make room for others.
    pub fn evicted(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        self.0.evicted()
    }

    /// Says that a request that came over it had a valid token.
    pub fn authenticated(&self) {
        self.0.authenticated();
    }
}

/// A call in the name of whoever holds this token.
pub fn with_authorization<T>(message: T, authorization: HeaderValue) -> tonic::Request<T> {
    // Those who call for a client add its address, and for a submission its uid.
    let mut headers = HeaderMap::with_capacity(3);
    headers.insert(AUTHORIZATION, authorization);
    let metadata = MetadataMap::from_headers(headers);
    tonic::Request::from_parts(metadata, Extensions::default(), message)
}
