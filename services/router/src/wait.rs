//! Waiting for the outcome of an async request.

use std::time::Duration;

use streamer_auth::Caller;
use streamer_core::Uid;
use streamer_proto::{common::v1::Event, progress::v1::WatchRequest};
use streamer_rpc::{RouteKey, is_terminal, with_authorization};
use tokio::time::timeout;
use tonic::Status;

use crate::peers::Peers;

/// The terminal event of a request, if it comes in time.
pub(crate) async fn for_terminal_event(
    peers: &Peers,
    caller: &Caller,
    uid: Uid,
    limit: Duration,
) -> Result<Option<Event>, Status> {
    match timeout(limit, terminal_event(peers, caller, uid)).await {
        Ok(event) => event.map(Some),
        Err(_) => Ok(None),
    }
}

async fn terminal_event(peers: &Peers, caller: &Caller, uid: Uid) -> Result<Event, Status> {
    let watch = WatchRequest { request_id: uid.to_string(), ..WatchRequest::default() };
    let mut watch = with_authorization(watch, caller.authorization.clone());
    watch.extensions_mut().insert(RouteKey(uid));
    let mut stream = peers.progress().watch(watch).await?.into_inner();
    while let Some(response) = stream.message().await? {
        if let Some(last) = response.events.into_iter().last()
            && is_terminal(&last)
        {
            return Ok(last);
        }
    }
    Err(Status::unavailable("the watch ended without an outcome"))
}
