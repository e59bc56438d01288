//! How one service reaches another: the same client, whether there is a network between them.

use std::convert::Infallible;

use http::{Request, Response};
use tonic::{Status, body::Body};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

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
    BoxCloneSyncService::new(server.map_err(|never| match never {}))
}
